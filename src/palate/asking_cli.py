"""`palate ask`: a person at the terminal is asked the most telling pairs, until their ranking is settled (`palate.questions`)."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from palate import cache_cli, hub_cli, terminal
from palate.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from palate.data.pairs import Choice, PairSet, Text
    from palate.living.profile import LiveProfile
    from palate.living.terms import Rewards

UNSURE, STOP = "?", "q"
RANKED: "tuple[Literal['best', 'order'], ...]" = ("best", "order")
MOST_SHOWN = 10  # prompts of which the ranking is shown: more scroll away


class Pairs(NamedTuple):
    """What can be asked."""

    texts: "Sequence[Text]"
    pairs: "NDArray[np.int64]"  # (Q, 2) rows of texts

    def choice(self, user: str, chosen: int, rejected: int) -> "Choice":
        """A pair as a row, as of now."""
        from palate.data.pairs import Choice

        return Choice(
            user, self.texts[chosen].prompt, self.texts[chosen].response, self.texts[rejected].response, timestamp=time.time()
        )


class Rule(NamedTuple):
    """When to end."""

    what: Literal["best", "order"]
    error: float
    most: int
    seed: int


def ask(
    model: hub_cli.AnyModel,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="What to ask about: with --prompt, responses to it, one JSON string a line; without, pairs, as the rows of "
            "`palate fit`, whoever chose what in them.",
            show_default=False,
        ),
    ],
    user: Annotated[str, typer.Option(metavar="ID", help="Who answers.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            metavar="ROWS",
            help="File of the answers, .jsonl: rows as of `palate adapt`, one added at each answer. What this user answered "
            "there before is known, and not asked again.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="What the responses of FILE answer.", show_default=False)] = None,
    until: Annotated[
        str, typer.Option(help="What has to be settled: 'best', the first of the ranking, or 'order', all of it.")
    ] = "best",
    error: Annotated[float, typer.Option(help="Probability that more answers would change it.", min=0, max=1)] = 0.05,
    most: Annotated[int, typer.Option(help="Ask at most so many questions.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of which response of a pair is shown first.", min=0)] = 0,
    cache: cache_cli.CacheFolder = None,
    no_cache: cache_cli.NoCache = False,
) -> None:
    """Ask somebody which of two responses is better, the most telling pair first, and rank the responses for them.

    Answer 1 or 2, ? for "I can't say", q to stop. It ends when more answers cannot be expected to change the ranking.
    """
    from palate.living.population import Population
    from palate.models.base import load_model

    rule = Rule(terminal.one_of(until, RANKED, "--until"), error, most, seed)
    if out.suffix.lower() != ".jsonl":
        raise DataError(f"--out is {str(out)!r}; expected a file whose name ends in .jsonl")
    fitted = load_model(model)
    if not fitted.n_weights:
        raise DataError(
            f"{model} has no personal weights, so everybody gets the crowd's ranking (palate rank) and nothing is to be asked"
        )
    population, pairs = Population.of(fitted), _candidates(file, prompt) if prompt is not None else _of_rows(file)
    _check(pairs, user)
    features = cache_cli.kept(terminal.saved_encoder(model), cache, no_cache)
    with terminal.progress(f"Encoding {len(pairs.texts)} texts") as advance, cache_cli.watched(features, advance):
        rewards = population.rewards(features.encode(pairs.texts))
    life, closed = population.start(user), []
    if (before := _before(out, user)) is not None:
        life, closed = life.update(features.embed(before)), _known(pairs, before)
        terminal.note(f"{user} has made {len(before)} choices in {out}")
    rankings = _rankings(pairs.texts, rewards)
    life, why = _asked(life, pairs, rewards, list(rankings.values()), closed, rule, out)
    terminal.note(f"{why}; {life.n_choices} choices of {user} are known")
    for rows, part in list(rankings.items())[:MOST_SHOWN]:
        _show(life, part, [pairs.texts[row] for row in rows])
    if len(rankings) > MOST_SHOWN:
        terminal.note(f"and {len(rankings) - MOST_SHOWN} more prompts; palate rank shows them")
    if out.exists():
        terminal.note(f"the answers are in {out}; palate adapt {model} {out} --out PROFILES makes the profile")


def _asked(
    life: "LiveProfile",
    pairs: Pairs,
    rewards: "Rewards",
    rankings: "Sequence[Rewards]",
    closed: list[int],
    rule: Rule,
    out: Path,
) -> "tuple[LiveProfile, str]":
    """The profile after the questions, and why they ended. Every choice is in the file before the next question."""
    import numpy as np
    import torch

    from palate.living.terms import Terms
    from palate.questions import Pool, next_questions, should_stop

    first, second = pairs.pairs.T
    slopes, offset = (torch.from_numpy(column[first] - column[second]) for column in (rewards.slopes, rewards.offset))
    pool, order = Pool(slopes, offset), np.random.default_rng(rule.seed)
    closed = [*closed, *torch.nonzero((slopes == 0).all(1))[:, 0].tolist()]  # no answer to these says anything about the user
    for number in range(1, rule.most + 1):
        if all(should_stop(life, part, what=rule.what, error=rule.error) for part in rankings):
            return life, f"the {rule.what} is settled but for a probability of {rule.error:g}"
        rows = next_questions(life, pool, asked=closed)
        if not rows:
            return life, "nothing is left to ask"
        closed = [*closed, rows[0]]
        left, right = order.permutation(pairs.pairs[rows[0]]).tolist()  # which one is shown first must not tell anything
        said = _answer(number, pairs.texts[left], pairs.texts[right])
        if said == STOP:
            return life, "stopped"
        if said != UNSURE:
            chosen, rejected = (left, right) if said == "1" else (right, left)
            _append(pairs.choice(life.user_id, chosen, rejected), out)
            apart = (column[[chosen]] - column[[rejected]] for column in (rewards.offset, rewards.slopes))
            life = life.update(Terms.pairs(*apart))
    return life, f"{rule.most} questions were asked"


def _candidates(file: Path, prompt: str) -> Pairs:
    import numpy as np

    from palate.data.pairs import Text

    if str(file) == "-":
        raise DataError("the responses cannot come from standard input, which is where the answers come from; give a file")
    distinct: dict[str, str] = {}
    for response in terminal.read_candidates(file):
        distinct.setdefault(response.strip(), response)  # two that differ in white space alone are one in a row
    responses = list(distinct.values())
    if len(responses) < 2:
        raise DataError(f"{file} has one response; expected at least two different ones to choose between")
    return Pairs([Text(prompt, response) for response in responses], np.stack(np.triu_indices(len(responses), k=1), axis=1))


def _of_rows(file: Path) -> Pairs:
    import numpy as np

    pairs, _ = terminal.read_choices(file)
    sides = np.sort(np.stack([pairs.chosen, pairs.rejected], axis=1), axis=1)  # who chose what is forgotten here
    return Pairs(pairs.texts, np.unique(sides, axis=0))


def _check(pairs: Pairs, user: str) -> None:
    """Refuse what could not be written down as a row, before anybody has answered it."""
    import numpy as np

    from palate.data.rows import as_row, check_row

    _, place = np.unique(pairs.pairs, return_index=True)  # a pair for each text: what can be wrong is wrong with a text
    for first, second in pairs.pairs[np.unique(place // 2)].tolist():
        found = check_row(as_row(pairs.choice(user, first, second)))
        if isinstance(found, list):
            raise DataError(f"an answer would be a bad row: {found[0].message}")


def _before(out: Path, user: str) -> "PairSet | None":
    """What the user answered in an earlier run."""
    if not out.exists() or not out.stat().st_size:
        return None
    pairs, _ = terminal.read_choices(out)
    mine = pairs[pairs.users == user]
    return mine if len(mine) else None


def _known(pairs: Pairs, before: "PairSet") -> list[int]:
    """Which of the pairs were answered before, whichever way round."""
    rows = zip(before.chosen.tolist(), before.rejected.tolist(), strict=True)
    seen = {frozenset((before.texts[chosen], before.texts[rejected])) for chosen, rejected in rows}
    texts = pairs.texts
    return [row for row, (a, b) in enumerate(pairs.pairs.tolist()) if frozenset((texts[a], texts[b])) in seen]


def _rankings(texts: "Sequence[Text]", rewards: "Rewards") -> "dict[tuple[int, ...], Rewards]":
    """The rows of the texts of each prompt, which are one ranking, with their rewards."""
    from palate.living.terms import Rewards

    found: dict[object, list[int]] = {}
    for row, text in enumerate(texts):
        found.setdefault(text.prompt, []).append(row)
    return {tuple(rows): Rewards(rewards.offset[rows], rewards.slopes[rows]) for rows in found.values()}


def _answer(number: int, first: "Text", second: "Text") -> str:
    """1, 2, `UNSURE` or `STOP`; the end of the input is a stop."""
    terminal.note(f"\n{number}. {first.prompt_text}\n\n  1: {first.response}\n\n  2: {second.response}\n")
    while True:
        terminal.note(f"1 or 2, {UNSURE} (I can't say), {STOP} (stop):")
        line = sys.stdin.readline()
        said = line.strip().lower() if line else STOP
        if said in ("1", "2", UNSURE, STOP):
            return said
        terminal.note(f"{said[:40]!r} is no answer")


def _append(choice: "Choice", out: Path) -> None:
    from palate.data.rows import as_row

    with out.open("ab+") as file:
        end = file.tell()
        file.seek(max(0, end - 1))
        cut = file.read(1) not in (b"", b"\n")  # a last line without its end
        file.write(b"\n" * cut + json.dumps(as_row(choice), ensure_ascii=False).encode() + b"\n")


def _show(life: "LiveProfile", rewards: "Rewards", texts: "Sequence[Text]") -> None:
    from palate.questions import ranking, settled

    found = settled(life, rewards)
    rows = []
    for number, place in enumerate(ranking(life, rewards), start=1):
        sure = "" if place.above_next is None else f"{place.above_next:.0%}"
        rows.append((texts[place.candidate].response, number, f"{place.reward:.3f}", sure))
    terminal.show(terminal.table(texts[0].prompt_text, ("Response", "Place", "Reward", "Better than the next"), rows))
    terminal.note(
        f"another one is the best with a probability of {found.wrong_best:.2f}; the order is another, {found.wrong_order:.2f}"
    )
