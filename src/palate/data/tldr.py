"""Reddit TL;DR (Stiennon et al. 2020): which of two summaries of a post is better, by workers who each judged many.

The `comparisons` of `openai/summarize_from_feedback` as choices: the user is the worker, the prompt is the post alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from palate.data.draws import of_user, python_order
from palate.data.pairs import PairSet
from palate.data.readers import load_valid_pairs
from palate.data.validation import ValidationReport
from palate.errors import DataError

Source = Iterable[Mapping[str, Any]]
Row = dict[str, Any]


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
            parts of the data set, or any iterables of such dicts.
        seen_limit, unseen_limit: most comparisons to learn from of a seen worker (150 and 100 were published) and of an unseen
            one; None for all.

    Raises:
        DataError: a row of another shape, with its number; no worker in both parts; a limit below 1, a negative seed.
    Cost: one pass and a copy of the texts.
    """
    limits = seen_limit, unseen_limit
    if seed < 0 or any(limit is not None and limit < 1 for limit in limits):
        raise DataError(f"seed is {seed} and the limits are {limits}; expected 0 or more, and limits of at least 1 or None")
    parts: list[dict[str, list[Row]]] = [{}, {}]
    for of_worker, name, source in zip(parts, ("train", "validation"), (train, validation), strict=True):
        for row in _rows(name, source):
            of_worker.setdefault(row["user_id"], []).append(row)
    workers = sorted(parts[0].keys() & parts[1].keys())
    if not workers:
        raise DataError(f"no worker is in both parts (train has {len(parts[0])} workers, validation {len(parts[1])})")
    seen = {workers[i] for i in python_order(seed, len(workers))[: len(workers) // 2]}
    rows: list[Row] = []
    for worker in workers:
        pool, tested = (part[worker] for part in parts)
        names, limit = (("train", "test_seen"), seen_limit) if worker in seen else (("support", "test_unseen"), unseen_limit)
        drawn = python_order(of_user(seed, worker), len(pool))[:limit]
        for name, chosen in zip(names, ([pool[i] for i in sorted(drawn)], tested), strict=True):
            rows += [row | {"split": name} for row in chosen]
    return load_valid_pairs(rows)


def _rows(part: str, source: Source) -> Iterator[Row]:
    for number, row in enumerate(source):
        try:
            summaries, choice = [one["text"] for one in row["summaries"]], row["choice"]
            if len(summaries) != 2 or choice not in (0, 1):
                raise TypeError(f"{len(summaries)} summaries and choice {choice!r}")
            sides = {"chosen": summaries[choice], "rejected": summaries[1 - choice]}
            yield {"user_id": row["worker"], "prompt": row["info"]["post"], **sides, "conversation_id": f"{part} {number}"}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{part} row {number}: {error!r}; expected info.post, two summaries with text, choice 0 or 1, and worker"
            ) from error
