"""PersonalLLM (Zollo et al. 2024): eight answers to every prompt, each scored by ten reward models, and users who mix the ten.

A user is a weight vector w over the ten scores and prefers the answer with the higher w . R. Whether R is the raw column or the
standardised one decides whose scores matter: the spread of `llama3_sfairx` is twice that of `oasst_pythia_7b`. Both are published
(LoRe takes raw columns, PersonalLLM itself standardised ones) and their figures are not comparable, so the data say which they
are, and so does everything that is made of them. Standardising is (score - mean) / sd with PersonalLLM's own constants:

| scorer | mean | sd | | scorer | mean | sd |
|---|---|---|---|---|---|---|
| gemma_2b | 4.3304 | 2.0386 | | beaver_7b | 6.2335 | 3.0126 |
| gemma_7b | 1.6260 | 2.6097 | | oasst_pythia_7b | 4.7064 | 1.3659 |
| mistral_raft | 8.3092 | 3.0728 | | oasst_pythia_1b | 4.2939 | 2.3018 |
| llama3_sfairx | 1.0638 | 2.9530 | | mistral_ray | 3.0136 | 1.6903 |
| oasst_deberta_v3 | 2.8977 | 1.7208 | | mistral_weqweasdas | 7.0711 | 2.5786 |

The users are generated here, from their weights: no array of users x prompts x features is ever formed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palate.data.foreign import Source, number, records_of, said_by, text
from palate.data.pairs import PairSet, Text
from palate.data.rows import Problem, Reason
from palate.data.splits import SIDES
from palate.data.validation import Tally, ValidationReport
from palate.errors import DataError

MEAN_SD: Mapping[str, tuple[float, float]] = {
    "gemma_2b": (4.3304, 2.0386),
    "gemma_7b": (1.6260, 2.6097),
    "mistral_raft": (8.3092, 3.0728),
    "llama3_sfairx": (1.0638, 2.9530),
    "oasst_deberta_v3": (2.8977, 1.7208),
    "beaver_7b": (6.2335, 3.0126),
    "oasst_pythia_7b": (4.7064, 1.3659),
    "oasst_pythia_1b": (4.2939, 2.3018),
    "mistral_ray": (3.0136, 1.6903),
    "mistral_weqweasdas": (7.0711, 2.5786),
}
SCORERS: tuple[str, ...] = tuple(MEAN_SD)
N_ANSWERS = 8
_BLOCK = 50  # users whose rewards of all answers are held at a time

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ScoredAnswers:
    """M prompts with eight answers each and ten scores of every answer.

    Attributes:
        prompts: M texts.
        answers: M tuples of eight texts.
        scores: (M, 8, 10), in the order of `SCORERS`; standardised where `standardised` says so, otherwise as published.
        answered_by: M tuples of eight names of language models, or empty where the file was read without them.
    """

    prompts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    scores: Floats
    standardised: bool
    answered_by: tuple[tuple[str, ...], ...] = ()

    def __repr__(self) -> str:
        state = "standardised" if self.standardised else "raw"
        return f"ScoredAnswers({len(self.prompts)} prompts x {N_ANSWERS} answers x {len(SCORERS)} {state} scores)"

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, eq=False)
class MixedUsers:
    """Choices of simulated users, with the truth.

    Attributes:
        pairs: their choices; `split` says `train`, `test_seen`, `support` or `test_unseen`. The conversation is the prompt.
        weights: (U, 10) w of the users, in the order of `pairs.user_ids`; without noise, so the best possible accuracy is 1.
        standardised: whether the weights are on standardised or on raw scores; say it beside every figure.
        n_equal: choices left out because the two answers have the same text or the same reward, so that there is no choice.
    """

    pairs: PairSet
    weights: Floats
    standardised: bool
    n_equal: int


def load_personalllm(
    source: Source,
    *,
    standardised: bool = False,
    score_column: str = "response_{answer}_{scorer}",
    model_column: str | None = None,
) -> tuple[ScoredAnswers, ValidationReport]:
    """The prompts, answers and scores of a file of PersonalLLM, and the report on rows that were left out.

    Args:
        source: `namkoong-lab/PersonalLLM` as CSV or Parquet (one file or several), or rows in memory, with the columns `prompt`,
            `response_1` to `response_8` and ten scores of each response.
        standardised: take (score - mean) / sd with the constants of this module; by default the columns are taken as they are.
        score_column: how the score columns are named, with {answer} (1 to 8) and {scorer}. The names of scorers are the
            published ones; that the two are joined like this is an assumption, and where it is wrong the error lists the columns.
        model_column: likewise for the names of the language models, with {answer}; by default they are not read.

    Raises:
        DataError: a column that is not there, or no good row.
    Cost: one pass; 640 bytes a prompt beside the texts.
    """
    for name, pattern, parts in (
        ("score_column", score_column, ("answer", "scorer")),
        ("model_column", model_column, ("answer",)),
    ):
        if pattern is not None and not all("{" + part + "}" in pattern for part in parts):
            wanted = " and ".join("{" + part + "}" for part in parts)
            raise DataError(f"{name} is {pattern!r}; expected the name of a column with {wanted} in it")
    numbers = range(1, N_ANSWERS + 1)
    texts = [f"response_{i}" for i in numbers]
    scored = [[score_column.replace("{answer}", str(i)).replace("{scorer}", name) for name in SCORERS] for i in numbers]
    models = [] if model_column is None else [model_column.replace("{answer}", str(i)) for i in numbers]

    def meaning(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...], list[list[float]], tuple[str, ...]]:
        answers = tuple(text(row, column) for column in texts)
        empty = [column for column, answer in zip(texts, answers, strict=True) if not answer.strip()]
        if empty or not text(row, "prompt").strip():
            raise DataError(f"{', '.join(empty) or 'prompt'} is empty; expected a text with something in it")
        scores = [[number(row, column) for column in columns] for columns in scored]
        return row["prompt"], answers, scores, tuple(text(row, column) for column in models)

    tally = Tally(source)
    kept: list[tuple[str, tuple[str, ...], list[list[float]], tuple[str, ...]]] = []
    lines: dict[tuple[str, tuple[str, ...]], int] = {}  # of the prompts and answers that were kept
    for record in records_of(source, ["prompt", *texts, *(column for columns in scored for column in columns), *models]):
        found = None if record.blank else said_by(record, meaning)
        problems = [found] if isinstance(found, Problem) else []
        if found is not None and not problems:
            first = lines.setdefault(found[:2], record.line)
            if len(lines) > len(kept):
                kept.append(found)
            else:
                message = f"the prompt and its answers are those of line {first}; keep one of them"
                problems = [Problem(Reason.DUPLICATE, message)]
        tally.add(record._replace(row={}), [], problems)
    report = tally.report()
    if not kept:
        raise DataError(f"no prompt with eight answers and their scores in {report.summary()}\nexpected at least one good row")
    prompts, answers, scores, by = zip(*kept, strict=True)
    table = np.asarray(scores, dtype=np.float64)
    if standardised:
        mean, sd = np.asarray([MEAN_SD[scorer] for scorer in SCORERS]).T
        table = (table - mean) / sd
    return ScoredAnswers(tuple(prompts), tuple(answers), table, standardised, tuple(by) if models else ()), report


def best_and_worst(
    train: ScoredAnswers,
    test: ScoredAnswers,
    *,
    alpha: float = 0.001,
    n_users: tuple[int, int] = (1000, 1000),
    shots: tuple[int, int] = (45, 9),
    n_test: int | None = None,
    seed: int = 0,
) -> MixedUsers:
    """Users who choose the best of eight answers over the worst: the PersonalLLM experiment of LoRe (arXiv 2504.14439).

    w ~ Dirichlet(alpha 1_10), reward = w . R, chosen the argmax and rejected the argmin over the eight answers, without noise.
    LoRe takes raw scores, alpha .001, .01 and .1, 1000 seen and 1000 unseen users with 45 and 9 training prompts, and all test
    prompts (its code: 47, 9, 500 unseen users, alpha .1 only).

    Args:
        train, test: prompts to learn from and to test on, both raw or both standardised; `load_personalllm`'s default is LoRe's.
        alpha: concentration; .001 is nearly one scorer for each user, large values make everybody alike.
        n_users: seen and unseen users.
        shots: training prompts of a seen and of an unseen user, drawn for each of them.
        n_test: the first so many test prompts are tested; None for all of them.
        seed: the same seed gives the same bits.

    Raises:
        DataError: a number outside its range, or scores of two kinds.
    Cost: memory O(texts + choices); 2000 users x 1000 test prompts take about 2 s and 0.5 GB.
    """
    rng = np.random.default_rng(seed)
    weights = _users(rng, train, test, alpha, n_users, max(shots), min(shots))
    tested = _test_rows(test, n_test)
    learned = _met(rng, len(train), np.repeat(shots, n_users))
    rows = [_Table(train, 0).extremes(weights, learned), _Table(test, len(train)).extremes(weights, [tested] * len(weights))]
    return _mixed(train, test, weights, n_users, rows)


def two_at_random(
    train: ScoredAnswers,
    test: ScoredAnswers,
    *,
    alpha: float = 0.01,
    n_users: tuple[int, int] = (1000, 1000),
    interactions: tuple[int, int] = (25, 49),
    n_test: int | None = None,
    seed: int = 42,
) -> MixedUsers:
    """Users who compare two random answers to each prompt, as PersonalLLM's own generator of preferences makes them.

    w ~ Dirichlet(alpha 1_10) on standardised scores; each user meets 25 to 49 prompts, with two different answers drawn at random
    of which the one with the higher w . R is chosen. Test prompts are compared in the same way. Two departures: the published
    code never draws the eighth answer (an off-by-one), which here it does, and its draws are not repeated, only its seed.

    Args:
        train, test, n_users, n_test, seed: as of `best_and_worst`, of scores that are standardised.
        alpha: concentration; .01 is published.
        interactions: fewest and most training prompts of a user, both drawn.

    Raises:
        DataError: a number outside its range, scores of two kinds, or raw ones, which that generator never sees.
    """
    if not train.standardised:
        raise DataError("the scores are raw; expected load_personalllm(..., standardised=True), as that generator uses them")
    rng = np.random.default_rng(seed)
    if interactions[0] > interactions[1]:
        raise DataError(f"interactions are {interactions}; expected the fewest first")
    weights = _users(rng, train, test, alpha, n_users, interactions[1], interactions[0])
    tested = _test_rows(test, n_test)
    counts = rng.integers(interactions[0], interactions[1] + 1, size=len(weights))
    learned = _met(rng, len(train), counts)
    rows = [_Table(train, 0).drawn(weights, learned, rng), _Table(test, len(train)).drawn(weights, [tested] * len(weights), rng)]
    return _mixed(train, test, weights, n_users, rows)


def _users(
    rng: np.random.Generator,
    train: ScoredAnswers,
    test: ScoredAnswers,
    alpha: float,
    n_users: tuple[int, int],
    most: int,
    fewest: int,
) -> Floats:
    if train.standardised != test.standardised:
        raise DataError(f"train is {train!r} and test is {test!r}; expected both raw or both standardised")
    if not (math.isfinite(alpha) and alpha > 0):
        raise DataError(f"alpha is {alpha}; expected a finite number above 0")
    if min(n_users) < 1:
        raise DataError(f"n_users are {n_users}; expected at least one seen and one unseen user")
    if not 1 <= fewest <= most <= len(train):
        raise DataError(f"a user meets {fewest} to {most} training prompts; expected numbers from 1 to {len(train)}, the prompts")
    weights: Floats = rng.dirichlet(np.full(len(SCORERS), alpha), size=sum(n_users))
    # A tiny alpha can underflow to 0/0; such a user is one scorer alone, which is the limit.
    broken = ~np.isfinite(weights).all(axis=1)
    weights[broken] = np.eye(len(SCORERS))[rng.integers(len(SCORERS), size=int(broken.sum()))]
    return weights


def _test_rows(test: ScoredAnswers, n_test: int | None) -> Ints:
    if n_test is not None and not 1 <= n_test <= len(test):
        raise DataError(f"n_test is {n_test}; expected 1 to {len(test)}, the test prompts, or None for all")
    return np.arange(len(test) if n_test is None else n_test)


def _met(rng: np.random.Generator, n_prompts: int, counts: Ints) -> list[Ints]:
    """So many different prompts for each user, at random, in the order in which they are met."""
    out: list[Ints] = []
    for start in range(0, len(counts), _BLOCK):  # all users at once would be a number for every user and prompt
        block = counts[start : start + _BLOCK]
        order = np.argsort(rng.random((len(block), n_prompts)), axis=1)
        out += [row[:count] for row, count in zip(order, block.tolist(), strict=True)]
    return out


class _Table:
    """Scores of the prompts from place `first` of the joint list on, and what users choose among their answers."""

    def __init__(self, data: ScoredAnswers, first: int):
        self.scores, self.first = data.scores, first

    def extremes(self, weights: Floats, prompts: Sequence[Ints]) -> "_Chosen":
        """The best against the worst answer to each prompt of each user."""
        found = []
        for user, rows, reward in self._rewards(weights, prompts):
            best, worst = reward.argmax(axis=1), reward.argmin(axis=1)
            found.append(self._chosen(user, rows, best, worst, reward))
        return _joined(found)

    def drawn(self, weights: Floats, prompts: Sequence[Ints], rng: np.random.Generator) -> "_Chosen":
        """The better against the worse of two random answers to each prompt of each user."""
        found = []
        for user, rows, reward in self._rewards(weights, prompts):
            one = rng.integers(N_ANSWERS, size=len(rows))
            other = (one + rng.integers(1, N_ANSWERS, size=len(rows))) % N_ANSWERS
            place = np.arange(len(rows))
            wins = reward[place, one] >= reward[place, other]
            found.append(self._chosen(user, rows, np.where(wins, one, other), np.where(wins, other, one), reward))
        return _joined(found)

    def _rewards(self, weights: Floats, prompts: Sequence[Ints]) -> Iterator[tuple[Ints, Ints, Floats]]:
        """(user, prompt, (n, 8) rewards) of blocks of users, each as flat as its users' prompts."""
        for start in range(0, len(weights), _BLOCK):
            mine = prompts[start : start + _BLOCK]
            rows = np.concatenate(mine)
            met, place = np.unique(rows, return_inverse=True)
            every = weights[start : start + _BLOCK] @ self.scores[met].reshape(-1, len(SCORERS)).T
            own = np.repeat(np.arange(len(mine)), [len(one) for one in mine])
            yield start + own, rows, every.reshape(len(mine), len(met), N_ANSWERS)[own, place]

    def _chosen(self, user: Ints, rows: Ints, best: Ints, worst: Ints, reward: Floats) -> "_Chosen":
        place = np.arange(len(rows))
        real = reward[place, best] > reward[place, worst]
        return _Chosen(user, self.first + rows, best, worst, real)


@dataclass(frozen=True, eq=False)
class _Chosen:
    user: Ints
    prompt: Ints  # place in the joint list of prompts
    best: Ints
    worst: Ints
    real: NDArray[np.bool_]  # whether the two rewards differ


def _joined(blocks: "list[_Chosen]") -> "_Chosen":
    columns = ([getattr(block, name) for block in blocks] for name in ("user", "prompt", "best", "worst", "real"))
    return _Chosen(*(np.concatenate(column) for column in columns))


def _mixed(
    train: ScoredAnswers, test: ScoredAnswers, weights: Floats, n_users: tuple[int, int], parts: "list[_Chosen]"
) -> MixedUsers:
    places: dict[Text, int] = {}
    of_answer = np.asarray(
        [
            [places.setdefault(Text(prompt, answer), len(places)) for answer in answers]
            for data in (train, test)
            for prompt, answers in zip(data.prompts, data.answers, strict=True)
        ],
        dtype=np.int64,
    )
    both = _joined(parts)
    sides = np.concatenate([np.full(len(part.user), i) for i, part in enumerate(parts)])
    chosen, rejected = of_answer[both.prompt, both.best], of_answer[both.prompt, both.worst]
    real = both.real & (chosen != rejected)
    n = int(real.sum())
    width = len(str(max(n_users) - 1))
    ids = [f"{kind}{u:0{width}d}" for kind, count in zip(("seen", "unseen"), n_users, strict=True) for u in range(count)]
    unseen = both.user[real] >= n_users[0]
    split = np.asarray(SIDES, dtype=np.object_)[2 * unseen + sides[real]]
    talks = np.asarray([f"prompt {i}" for i in range(len(train) + len(test))], dtype=np.object_)[both.prompt[real]]
    pairs = PairSet(
        tuple(places),
        chosen[real],
        rejected[real],
        tuple(ids),
        both.user[real],
        np.zeros(n, dtype=np.bool_),
        np.ones(n),
        np.full(n, np.nan),
        np.full(n, np.nan),
        talks,
        split,
    )
    return MixedUsers(pairs, weights, train.standardised, int((~real).sum()))
