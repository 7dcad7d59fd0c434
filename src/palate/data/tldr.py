"""Reddit TL;DR (Stiennon et al. 2020): which of two summaries of a post is better, by workers who each judged many.

The `comparisons` of `openai/summarize_from_feedback` as choices: the user is the worker, the prompt is the post alone (no title,
no subreddit, no instruction). Three preparations are published, and figures on different ones are not comparable:

| | `load_tldr` | `load_tldr_paper` | `load_tldr_lore` |
|---|---|---|---|
| source | MRM (arXiv 2601.18731), its code | LoRe (arXiv 2504.14439), the paper | LoRe, its code |
| workers | in both parts of the data set | with 50 annotations or more (40 of them) | in both parts, less the two smallest |
| to learn from | `train` | a random half of all | `train` |
| tested on | all of `validation` | all of the other half | all of `validation` |

In each of them half of the workers are seen, 150 comparisons (or 100) of a seen worker are learned from, and 50 of an unseen one.
A row that is no comparison is a bad row, as if it were not there; what else is bad is left out after the draws. So is a
comparison that a worker made before, where what is learned from comes before what is tested, so that none is on both sides.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from palate.data.draws import of_user, python_order
from palate.data.foreign import Source, choices_in, meant_by, records_of
from palate.data.pairs import PairSet
from palate.data.rows import Problem, Reason
from palate.data.validation import Tally, ValidationReport
from palate.errors import DataError

Row = dict[str, Any]
_COLUMNS = ("info", "summaries", "choice", "worker")


def load_tldr(
    train: Source, validation: Source, *, seen_limit: int | None = 150, unseen_limit: int | None = 50, seed: int = 42
) -> tuple[PairSet, ValidationReport]:
    """The comparisons of the workers who are in both parts, split as published, and the report on rows that were left out.

    As the MRM repository prepares them: half of the workers, drawn with the seed, are seen; of the comparisons in `train` each
    worker's first so many in an order drawn for them are learned from; all of `validation` is tested. `split` says so: `train`,
    `test_seen`, `support`, `test_unseen`, as `given_split` and `palate compare` read it, and nothing beyond the limits. There is
    no least number of choices a worker, and the draws are those of Python's `random`, as there.

    Args:
        train, validation: rows with `info.post`, `summaries` (two, each with `text`), `choice` (0 or 1) and `worker`: the two
            parts of the data set as files (JSON Lines or Parquet, one or several) or as any iterables of such dicts.
        seen_limit, unseen_limit: most comparisons to learn from of a seen worker (150 and 100 were published) and of an unseen
            one; None for all.

    Raises:
        DataError: a part of which no row is a comparison, with the first; no worker in both parts; a limit below 1, a negative
            seed.
    Cost: one pass and a copy of the texts.
    """
    _check(seed, seen_limit, unseen_limit)
    tally = Tally(train)
    return _split(*_in_both(train, validation, tally), seen_limit, unseen_limit, seed, tally)


def load_tldr_lore(
    train: Source, validation: Source, *, seen_limit: int | None = 150, unseen_limit: int | None = 50, seed: int = 0
) -> tuple[PairSet, ValidationReport]:
    """The comparisons as LoRe's code prepares them, and the report on rows that were left out.

    Of the workers in both parts the two with the fewest comparisons in `train` are left out (the code says "fewer than 50" and
    drops two, whatever they have; of equals the later id goes). `train` is learned from, all of `validation` tested. There the
    workers are shuffled out of an unordered set, so that its draws differ from run to run; here they are those of the seed.

    Arguments, errors and cost as of `load_tldr`; besides, `DataError` where there are not four workers.
    """
    _check(seed, seen_limit, unseen_limit)
    tally = Tally(train)
    pools, tests = _in_both(train, validation, tally)
    if len(pools) < 4:
        raise DataError(f"{len(pools)} workers are in both parts; expected at least 4, of whom the two smallest are left out")
    kept = sorted(pools, key=lambda worker: (-len(pools[worker]), worker))[:-2]
    return _split({w: pools[w] for w in kept}, {w: tests[w] for w in kept}, seen_limit, unseen_limit, seed, tally)


def load_tldr_paper(
    *parts: Source,
    min_annotations: int = 50,
    seen_limit: int | None = 150,
    unseen_limit: int | None = 50,
    seed: int = 0,
) -> tuple[PairSet, ValidationReport]:
    """The comparisons as the paper of LoRe describes them, and the report on rows that were left out.

    All parts together; workers with fewer than `min_annotations` are left out (the paper has 40 workers left, with about 4,000
    comparisons each); a random half of a worker's comparisons, rounded down, is learned from up to the limit, and the other half
    is tested in full. A post that a worker compared more than once may fall on both sides, as there. The paper names no seed.

    Args:
        parts: as `train` and `validation` of `load_tldr`; one or more.
        min_annotations: 50 is published.
        seen_limit, unseen_limit: as of `load_tldr`.

    Raises:
        DataError: a part of which no row is a comparison, with the first; no worker with enough; a limit below 1, a negative
            seed.
    """
    _check(seed, seen_limit, unseen_limit, min_annotations)
    tally = Tally(parts[0] if parts else ())
    everything = _of_worker(tally, *((f"part {i}", part) for i, part in enumerate(parts, start=1)))
    kept = {worker: rows for worker, rows in everything.items() if len(rows) >= max(min_annotations, 2)}
    if not kept:
        most = max(map(len, everything.values()), default=0)
        raise DataError(
            f"none of {len(everything)} workers has {min_annotations} comparisons (at most {most}); expected the whole data set, "
            "or lower min_annotations"
        )
    pools: dict[str, list[Row]] = {}
    tests: dict[str, list[Row]] = {}
    for worker in sorted(kept):
        # Other draws than those that choose within the limit, or the limit would take the beginning of this order.
        order = python_order(of_user(seed, f"half of {worker}"), len(kept[worker]))
        half = len(order) // 2
        pools[worker] = [kept[worker][i] for i in sorted(order[:half])]
        tests[worker] = [kept[worker][i] for i in sorted(order[half:])]
    return _split(pools, tests, seen_limit, unseen_limit, seed, tally)


def _check(seed: int, seen_limit: int | None, unseen_limit: int | None, min_annotations: int = 1) -> None:
    limits = seen_limit, unseen_limit
    if seed < 0 or any(limit is not None and limit < 1 for limit in limits):
        raise DataError(f"seed is {seed} and the limits are {limits}; expected 0 or more, and limits of at least 1 or None")
    if min_annotations < 1:
        raise DataError(f"min_annotations is {min_annotations}; expected at least 1")


def _in_both(train: Source, validation: Source, tally: Tally) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    pools, tests = _of_worker(tally, ("train", train)), _of_worker(tally, ("validation", validation))
    workers = sorted(pools.keys() & tests.keys())
    if not workers:
        raise DataError(f"no worker is in both parts (train has {len(pools)} workers, validation {len(tests)})")
    return {worker: pools[worker] for worker in workers}, {worker: tests[worker] for worker in workers}


def _split(
    pools: Mapping[str, list[Row]],
    tests: Mapping[str, list[Row]],
    seen_limit: int | None,
    unseen_limit: int | None,
    seed: int,
    tally: Tally,
) -> tuple[PairSet, ValidationReport]:
    """Half of the workers, rounded down, are seen; of each pool a random part within the limit is learned from."""
    workers = sorted(pools)
    seen = {workers[i] for i in python_order(seed, len(workers))[: len(workers) // 2]}
    rows: list[Row] = []
    for worker in workers:
        pool, tested = pools[worker], tests[worker]
        names, limit = (("train", "test_seen"), seen_limit) if worker in seen else (("support", "test_unseen"), unseen_limit)
        drawn = python_order(of_user(seed, worker), len(pool))[:limit]
        for name, chosen in zip(names, ([pool[i] for i in sorted(drawn)], tested), strict=True):
            rows += [row | {"split": name} for row in chosen]
    return choices_in([(rows, _with_post)], (), tally)


def _with_post(row: Mapping[str, Any]) -> Iterator[Row | Problem]:
    """The row, if it has a post. `validation` also holds comparisons of CNN/DM, whose summaries are of an article."""
    if row["prompt"] is None:
        message = f"info.post of {row['place']} is None; expected a post (CNN/DM has articles instead)"
        yield Problem(Reason.EMPTY_TEXT, message)
    else:
        yield {name: value for name, value in row.items() if name != "place"}


def _of_worker(tally: Tally, *parts: tuple[str, Source]) -> dict[str, list[Row]]:
    of_worker: dict[str, list[Row]] = {}
    for name, source in parts:
        for row in _rows(name, source, tally):
            of_worker.setdefault(row["user_id"], []).append(row)
    return of_worker


def _rows(part: str, source: Source, tally: Tally) -> Iterator[Row]:
    """The comparisons; what is none goes into the tally. Raises `DataError` with the first row where none is one."""
    numbered = enumerate(records_of(source, _COLUMNS))
    for number, row in meant_by(numbered, _comparison, tally, name=part, place=f"{part} row"):
        yield row | {"place": f"{part} {number}"}


def _comparison(row: Mapping[str, Any]) -> Row:
    try:
        summaries, choice, worker = [one["text"] for one in row["summaries"]], row["choice"], row["worker"]
        if len(summaries) != 2 or isinstance(choice, float) or choice not in (0, 1):
            raise TypeError(f"{len(summaries)} summaries and choice {choice!r}")
        if not isinstance(worker, str):
            raise TypeError(f"worker {worker!r:.60}")
        sides = {"chosen": summaries[choice], "rejected": summaries[1 - choice]}
        return {"user_id": worker, "prompt": row["info"]["post"], **sides}
    except (KeyError, TypeError) as error:
        message = f"{error!r}; expected info.post, two summaries with text, choice 0 or 1, and worker (a text)"
        raise DataError(message) from error
