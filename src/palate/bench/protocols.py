"""The data sets of the benchmark and how each is prepared: who takes part, how people's choices are halved, what is made up.

| name | users | halves of a user | at most | encoder, unless told |
|---|---|---|---|---|
| polis | 20 votes, 4 of either kind | statements | 40 + 40 pairs | items |
| convarg | 20 strict choices | pairs, ties left out | 60 + 100 pairs | minilm |
| prism | 4 prompts | dialogues, else prompts, ties left out | | minilm+style |
| rows | 3 choices to learn from | as `palate compare` | by item 40 + 40 pairs | minilm+style |
| attributes | 84, of whom 24 unseen | 40 answers learnt from, 200 pairs tested on | | vectors |
| personalllm | 200 + 200 Dirichlet mixtures of ten scorers | 45 or 9 prompts, 200 tested on | | vectors |
| two-groups, one-crowd | 200 + 200 | 30 + 50 pairs | | vectors |

Half of the users of the first four are unseen. The others are drawn anew for every seed. Rows with a `split` column are split as
it says, whatever the recipe, and alike under every seed. `palate.bench.known` says what is known of users beside choices.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from palate.bench import known
from palate.data.attributes import attributes, judged
from palate.data.leaks import check_conversations, check_leaks
from palate.data.pairs import EmbeddedPairs, PairSet
from palate.data.planted import Planted, one_crowd, simplex_types, two_groups
from palate.data.readers import load_valid_pairs
from palate.data.splits import SIDES, By, Split, given_split, unit_labels
from palate.encoders import Encoder
from palate.encoders.base import usual_unit
from palate.errors import DataError
from palate.evaluation.comparison import drawn, is_given
from palate.models.columns import Table

ANSWERS = 40  # of an unseen attribute user: what the published experiments ask for at most


class Draw(NamedTuple):
    """What one seed of a data set is: choices, every one of which is on a side of the split."""

    data: EmbeddedPairs
    parts: Split


class Source(Protocol):
    """A data set: `draw` may be asked for seeds in any order, and the same seed is the same draw, bit for bit.

    Attributes:
        label: under which its rows are filed.
        origin: a digest of what is drawn from: two sources of one label that differ in it are different data.
    """

    @property
    def label(self) -> str: ...

    @property
    def origin(self) -> str: ...

    def draw(self, seed: int, *, prompts: bool = False) -> Draw:
        """`prompts`: with e(prompt), where there are texts. Raises what `palate.split` and `check_leaks` raise."""
        ...

    def attributes(self, seed: int) -> Table | None:
        """What is known of the users of that draw beside their choices; None for nothing."""
        ...


# -- choices in text


@dataclass(frozen=True)
class Recipe:
    """How data are prepared whose rows have no `split` column: whose choices count, what a user's two sides must not share (or a
    function that tells it from the choices), and how many pairs."""

    keep: Callable[[PairSet], PairSet]
    by: By | Callable[[PairSet], By]
    max_support: int | None
    max_test: int | None
    encoder: str  # unless told
    min_support: int = 1

    def unit(self, pairs: PairSet) -> By:
        """What the two sides of a user must not share in these choices."""
        return self.by if isinstance(self.by, str) else self.by(pairs)


def of_busy_users(pairs: PairSet, least: int, label: NDArray[np.int64] | None = None) -> PairSet:
    """The choices of users with at least `least` of them, or, with a `label` (P,) each, with so many distinct labels."""
    user = pairs.user_index
    if label is not None:
        user = np.unique(np.stack([user, label]), axis=1)[0]
    return pairs[(np.bincount(user, minlength=len(pairs.user_ids)) >= least)[pairs.user_index]]


def _strict(pairs: PairSet, least: int) -> PairSet:
    return of_busy_users(pairs[~pairs.tie], least)


def _strict_by_prompt(pairs: PairSet, least: int) -> PairSet:
    strict = pairs[~pairs.tie]
    return of_busy_users(strict, least, strict.prompt_index)


def _dialogue(pairs: PairSet) -> By:
    """A turn's prompt quotes the answers that were chosen before it, so turns of one dialogue must not be on two sides."""
    return "prompt" if any(name is None for name in pairs.conversation) else "conversation"


def _of_any_rows(by: By | None, pairs: PairSet) -> Recipe:
    """What `palate compare` does with choices of which nothing more is known."""
    most = 40 if (by or usual_unit(pairs)) == "item" else None
    return Recipe(lambda pairs: pairs, by or usual_unit, most, most, "minilm+style", min_support=3)


RECIPES: Mapping[str, Recipe] = {
    "polis": Recipe(lambda pairs: pairs, "item", 40, 40, "items"),
    "convarg": Recipe(partial(_strict, least=20), "pair", 60, 100, "minilm"),
    "prism": Recipe(partial(_strict_by_prompt, least=4), _dialogue, None, None, "minilm+style"),
}


class Texts:
    """Choices in text, prepared by a recipe, or as their own `split` column says, and embedded once.

    `believe_format` as in `check_leaks`. Raises `DataError` for a split column that cannot be used, and where there are too few
    users.
    """

    def __init__(
        self,
        name: str,
        pairs: PairSet,
        recipe: Recipe,
        encoder: Encoder,
        people: Table | None = None,
        *,
        believe_format: bool = False,
    ):
        self.name, self.recipe, self.encoder, self.given = name, recipe, encoder, is_given(pairs)
        self.believe_format = believe_format
        self.pairs = pairs if self.given else recipe.keep(pairs)
        if not len(self.pairs):
            raise DataError(f"{name}: none of the users has enough choices for the benchmark; docs/bench.md says what it takes")
        if len((self._on_sides() if self.given else self.pairs).user_ids) < 2:
            raise self._alone()
        self.by = recipe.unit(self.pairs)
        self.people = people
        self._embedded: dict[bool, EmbeddedPairs] = {}

    @property
    def label(self) -> str:
        return f"{self.name}, {self.encoder.spec}"

    @cached_property
    def origin(self) -> str:
        recipe = (self.by, self.recipe.max_support, self.recipe.max_test)
        told = f"{self.pairs.fingerprint()} {recipe} {self.encoder.fingerprint}"
        # The fingerprint of choices has neither their split nor their conversations.
        told += f" {self.pairs.split.tolist()}" if self.given else ""
        told += f" {self.pairs.conversation.tolist()}" if self.by == "conversation" else ""
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def draw(self, seed: int, *, prompts: bool = False) -> Draw:
        recipe = self.recipe
        # A split that is given has said who is tested, and on how much.
        most, tests, least = (None, None, 1) if self.given else (recipe.max_support, recipe.max_test, recipe.min_support)
        parts = drawn(self.pairs, by=self.by, max_support=most, max_test=tests, min_support=least, seed=seed)
        if not self.given and not len(parts.test_unseen):
            raise self._alone(f" with enough choices on both sides, split by {self.by}")
        check_leaks(self.pairs, parts, by=self.by, believe_format=self.believe_format)
        if callable(recipe.by):  # nobody said by what: dialogues stay whole, also those of some of the choices only
            check_conversations(self.pairs, parts)
        if prompts not in self._embedded:
            # With items the unit that fits hold out is the pair, as in `palate.compare`.
            unit = unit_labels(self.pairs, "pair" if self.by == "item" else self.by)
            self._embedded[prompts] = self.encoder.embed(self.pairs, unit=unit, prompts=prompts)
        return only(self._embedded[prompts], parts)

    def _on_sides(self) -> PairSet:
        """The choices that the split column puts on a side."""
        parts = given_split(self.pairs)
        if not len(parts.train) or not len(parts.test_seen) + len(parts.test_unseen):
            sizes = ", ".join(f"{side} {len(getattr(parts, side))}" for side in SIDES)
            raise DataError(f"{self.name}: the split column has {sizes}; expected train, and test_seen or test_unseen")
        return self.pairs[np.concatenate([getattr(parts, side) for side in SIDES])]

    def _alone(self, how: str = "") -> DataError:
        return DataError(f"{self.name}: 1 user{how}; at least 2 are needed so that one is unseen")

    def attributes(self, seed: int) -> Table | None:
        return self.people


def only(data: EmbeddedPairs, parts: Split) -> Draw:
    """The choices that are on a side, in their order, and the split of these."""
    rows = np.sort(np.concatenate([getattr(parts, side) for side in SIDES]))
    sides = {side: np.searchsorted(rows, getattr(parts, side)) for side in SIDES}
    return Draw(data[torch.from_numpy(rows)], replace(parts, **sides))


# -- planted worlds


@dataclass(frozen=True)
class World:
    """A population that is drawn anew for every seed; there are no texts, so a method that reads prompts fails on it."""

    label: str
    make: Callable[[int], tuple[EmbeddedPairs, Split]]
    people: Callable[[int], Table | None] = lambda seed: None

    @property
    def origin(self) -> str:
        """The label: what is drawn is in the digest of the draw."""
        return self.label

    def draw(self, seed: int, *, prompts: bool = False) -> Draw:
        return Draw(*self.make(seed))

    def attributes(self, seed: int) -> Table | None:
        return self.people(seed)


def one_table(world: Planted, n_answers: int) -> tuple[EmbeddedPairs, Split]:
    """The four sets of a planted world as one data set, and the split that tells them apart; a prompt is `n_answers` rows."""
    sets = (world.train, world.test_seen, world.support, world.test_unseen)
    stops = np.cumsum([0] + [len(part) for part in sets])
    rows = [np.arange(a, b) for a, b in pairwise(stops)]
    chosen, rejected = (torch.cat([getattr(part, name) for part in sets]) for name in ("chosen", "rejected"))
    unit = chosen // n_answers  # the prompt: the sets number their own units each from 0
    users = np.concatenate([part.users for part in sets])
    data = EmbeddedPairs(world.train.embeddings, chosen, rejected, users, unit=unit)
    return data, Split(rows[0], rows[1], rows[2], rows[3], "unit", None, {}, {})


def personalllm(alpha: float, seed: int) -> Planted:
    """The simulation that the project reports: `planted.simplex_types` with 200 test prompts."""
    return simplex_types(alpha, seed, n_test_prompts=200)


def attribute_choices(seed: int) -> tuple[EmbeddedPairs, Split]:
    """The 84 attribute users: answers of the 60 seen ones to the common training pairs, `ANSWERS` of every unseen one to pairs of
    a pool of their own, and everybody's to 200 test pairs. All answers are the judge's, in both orders; two different ones are a
    tie, as published, which is learnt from and not tested on.
    """
    world = attributes(seed)
    rng = np.random.default_rng([seed, 84])
    seen, unseen = ([wish.name for wish in wishes] for wishes in (world.seen, world.unseen))
    asked = np.argsort(rng.random((len(unseen), len(world.pool))), axis=1)[:, :ANSWERS]
    of_pool = np.take_along_axis(world.margins(world.pool).double().numpy(), asked, axis=1)
    pool, test = world.pool.numpy(), world.test.numpy()
    everything = np.tile(np.arange(len(test)), (len(seen), 1)), np.tile(np.arange(len(test)), (len(unseen), 1))
    tested = [world.margins(world.test, weights).double().numpy() for weights in (world.weights_seen, world.weights_unseen)]
    sets = [
        (seen, test[everything[0]], judged(tested[0], rng)),
        (unseen, pool[asked], judged(of_pool, rng)),
        (unseen, test[everything[1]], judged(tested[1], rng)),
    ]
    chosen, rejected, users, tie = ([column] for column in _columns(world.train))
    for names, sides, answer in sets:
        left, right = sides[..., 0].ravel(), sides[..., 1].ravel()
        lost = answer.ravel() == 0
        chosen.append(np.where(lost, right, left))
        rejected.append(np.where(lost, left, right))
        users.append(np.repeat(np.asarray(names, dtype=object), sides.shape[1]))
        tie.append(answer.ravel() == 0.5)
    rows = [np.arange(a, b) for a, b in pairwise(np.cumsum([0] + [len(part) for part in chosen]))]
    both = np.concatenate(chosen), np.concatenate(rejected)
    # Two rows of the table are a question, and no text is in two of them.
    unit = np.minimum(*both) // 2
    data = EmbeddedPairs(world.embeddings, *both, np.concatenate(users), tie=np.concatenate(tie), unit=unit)
    return data, Split(rows[0], rows[1], rows[2], rows[3], "unit", None, {}, {})


def _columns(pairs: EmbeddedPairs) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.object_], NDArray[np.bool_]]:
    return pairs.chosen.numpy(), pairs.rejected.numpy(), pairs.users, pairs.tie.numpy()


WORLDS: Mapping[str, World] = {
    "attributes": World("attributes", attribute_choices, lambda seed: known.wished()),
    "two-groups": World(
        "two groups", lambda seed: one_table(two_groups(seed), 2), lambda seed: known.regions(two_groups(seed), seed)
    ),
    "one-crowd": World("one crowd", lambda seed: one_table(one_crowd(seed), 2)),
}
_KNOWN = ", ".join([*(f"{name}=PATH" for name in (*RECIPES, "rows")), *WORLDS, "personalllm:alpha=A"])
_UNITS: tuple[By, ...] = ("conversation", "prompt", "item", "pair")


def source(text: str, encoder: Callable[[str], Encoder], say: Callable[[str], None] | None = None) -> Source:
    """The data set that a text names: `polis=FOLDER`, `prism=ROWS,encoder=minilm+style`, `attributes`, `personalllm:alpha=.01`.

    `rows=FILE` is any file of choices, such as `palate data prepare` writes. Behind it `,name=LABEL` replaces its own, and
    `,by=UNIT` says what a user's two sides must not share (else `usual_unit`); `,believe-format=yes` takes it for taste, not for
    a leak, if formatting alone tells the choices. Behind any path `,attributes=FILE` names what is
    known of the people (`known.of_file`). `encoder` makes the encoder that a spec names; `say` is told how many rows are bad,
    where some are. Reading a file takes seconds; nothing is embedded before the first draw.

    Raises:
        DataError: a name that is not known, a file without choices or with those of one user, a split column that cannot be
            used, or attributes of nobody in it.
        OSError: a file cannot be read.
    """
    name, given, rest = text.partition("=")
    if text in WORLDS:
        return WORLDS[text]
    if name == "personalllm:alpha":
        alpha = _number(rest, text)
        return World(f"personalllm, alpha {alpha:g}", lambda seed: one_table(personalllm(alpha, seed), 8))
    path, *behind = re.split(",(encoder|attributes|by|name|believe-format)=", rest)
    told = dict(zip(behind[::2], behind[1::2], strict=True))
    any_rows = name == "rows"
    wrong = not given or not path or not all(told.values()) or 2 * len(told) < len(behind)
    wrong = wrong or told.get("believe-format", "yes") != "yes"
    if wrong or name not in (*RECIPES, "rows") or (not any_rows and told.keys() & {"by", "name", "believe-format"}):
        raise DataError(
            f"--data is {text!r}; expected one of {_KNOWN}, PATH with ,encoder=SPEC and ,attributes=FILE behind it as you wish, "
            "and with ,by=UNIT, ,name=LABEL and ,believe-format=yes behind that of rows"
        )
    by = next((unit for unit in _UNITS if unit == told.get("by")), None)
    if "by" in told and by is None:
        raise DataError(f"--data is {text!r}, with by {told['by']!r}; expected one of {', '.join(_UNITS)}")
    pairs, report = load_valid_pairs(Path(path))
    if say is not None and report.n_bad:
        say(f"{report.summary(most=0)}; these are left out, and palate validate shows them")
    recipe = _of_any_rows(by, pairs) if any_rows else RECIPES[name]
    people = known.of_file(Path(told["attributes"]), pairs.user_ids) if "attributes" in told else None
    label = told.get("name", Path(path).resolve().name) if any_rows else name
    made = encoder(told.get("encoder", recipe.encoder))
    return Texts(label, pairs, recipe, made, people, believe_format="believe-format" in told)


def _number(given: str, text: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"--data is {text!r}; expected a number above 0 for alpha, such as personalllm:alpha=.001")
    return value
