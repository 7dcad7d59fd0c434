"""Who is unseen, and which of a person's choices are held back: without a split that a model could see through.

All draws are keyed: a random number for every unit of every user comes from the seed, the user's id and the unit's place in the
user's own rows, so a user's halves do not depend on who else is in the data, on hash seeds, or on the order of other people's
rows. No Python loop runs over users or pairs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from palate.data.pairs import EmbeddedPairs, PairSet
from palate.errors import DataError

By = Literal["conversation", "prompt", "item", "pair", "unit"]
Pairs = PairSet | EmbeddedPairs
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SIDES = ("train", "test_seen", "support", "test_unseen")
_UNITS, _SUPPORT, _TEST, _SHOTS = range(4)  # streams: what a draw is for, so that no two purposes share numbers


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a data set, sorted, by what they may be used for; no row is in two of them.

    `train` and `test_seen` are the two sides of the seen users, `support` and `test_unseen` those of the unseen ones. `dropped`
    counts the rows in none of the four by reason, `dropped_users` the users without any row left.
    """

    train: Ints
    test_seen: Ints
    support: Ints
    test_unseen: Ints
    by: str
    seed: int | None
    dropped: Mapping[str, int]
    dropped_users: Mapping[str, int]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(getattr(self, name))}" for name in SIDES)
        return f"Split(by {self.by}, seed {self.seed}: {sizes}, dropped {sum(self.dropped.values())})"


def _numpy(values: Any) -> NDArray[Any]:
    return np.asarray(values.cpu().numpy() if hasattr(values, "cpu") else values)


def _sides(pairs: Pairs) -> tuple[Ints, Ints, Ints]:
    """(user, chosen, rejected) of every pair as integers."""
    return _numpy(pairs.user_index), _numpy(pairs.chosen), _numpy(pairs.rejected)


def pair_labels(pairs: Pairs) -> Ints:
    """(P,) numbers, equal where the two texts are the same in either order."""
    _, chosen, rejected = _sides(pairs)
    low, high = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    if not len(low):
        return np.zeros(0, dtype=np.int64)
    return np.unique(low * (int(high.max()) + 1) + high, return_inverse=True)[1].astype(np.int64)


def unit_labels(pairs: Pairs, by: By) -> Ints:
    """(P,) numbers, equal where two pairs are of one unit. Raises `DataError` where the data do not know their `by`."""
    if by == "pair":
        return pair_labels(pairs)
    if isinstance(pairs, PairSet) and by == "prompt":
        return pairs.prompt_index
    if isinstance(pairs, PairSet) and by == "conversation":
        missing = np.flatnonzero([label is None for label in pairs.conversation])
        if len(missing):
            where = f"rows {missing[:5].tolist()} ({len(missing)} of {len(pairs)})"
            raise DataError(f"by is 'conversation', but {where} have no conversation_id; add it, or split by 'prompt'")
        return np.unique(pairs.conversation.astype(str), return_inverse=True)[1].astype(np.int64)
    if isinstance(pairs, EmbeddedPairs) and by == "unit":
        return _numpy(pairs.unit).astype(np.int64)
    if isinstance(pairs, EmbeddedPairs) and by == "prompt" and pairs.prompts is not None:
        return _numpy(pairs.prompts).astype(np.int64)
    known = "'prompt', 'conversation', 'item' or 'pair'" if isinstance(pairs, PairSet) else "'unit', 'item', 'pair' (or 'prompt')"
    lacks = "without prompts does not have" if by == "prompt" else "does not have"
    raise DataError(f"by is {by!r}, which a {type(pairs).__name__} {lacks}; expected {known}")


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection that passes tests of randomness on a counter."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _draws(pairs: Pairs, user: Ints, rank: Ints, seed: int, stream: int) -> NDArray[np.uint64]:
    """A uniform 64-bit number for every (user, rank): a function of the seed, the user's id, the rank and the stream only."""
    start = f"{seed}/{stream}/".encode()
    digests = b"".join(hashlib.sha256(start + name.encode("utf-8", "surrogatepass")).digest()[:8] for name in pairs.user_ids)
    of_user = np.frombuffer(digests, dtype="<u8").astype(np.uint64)
    return _mixed(of_user[user] + (rank.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _places(group: Ints, order_by: NDArray[Any]) -> tuple[Ints, Ints]:
    """Each element's place within its group when sorted by `order_by` (stably), and the size of its group."""
    order = np.lexsort((order_by, group))
    counts = np.bincount(group)
    starts = np.cumsum(counts) - counts
    places = np.empty(len(group), dtype=np.int64)
    places[order] = np.arange(len(group)) - starts[group[order]]
    return places, counts[group]


def _in_support(group: Ints, draws: NDArray[np.uint64], test: float) -> Bools:
    """Whether each element is on the support side: a random `floor((1 - test) n)` of the n of each group."""
    places, size = _places(group, draws)
    return np.asarray(places < size - np.ceil(test * size - 1e-9))


def _units(user: Ints, label: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """The distinct (user, label): index of each element, the user, the label and the rank (by first appearance in the user)."""
    width = int(label.max()) + 1
    keys, first, index = np.unique(user * width + label, return_index=True, return_inverse=True)
    owner = keys // width
    return index.astype(np.int64), owner, keys % width, _places(owner, first)[0]


def _joined_units(user: Ints, unit: Ints, pair: Ints) -> Ints:
    """One number for units of a user that share a pair: halves that both hold the pair would leak it."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    unit_of, pair_of = _units(user, unit)[0], _units(user, pair)[0]
    n = int(unit_of.max()) + 1
    links = coo_array(
        (np.ones(len(user), dtype=np.int8), (unit_of, n + pair_of)), shape=(size := n + int(pair_of.max()) + 1, size)
    )
    return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64)[unit_of]


def _support_side(pairs: Pairs, by: By, test: float, seed: int) -> tuple[Bools, Bools]:
    """((P,) on the support side, (P,) lost because its two items fell on different sides)."""
    user, chosen, rejected = _sides(pairs)
    if by != "item":
        label = _joined_units(user, unit_labels(pairs, by), pair_labels(pairs))
        index, owner, _, rank = _units(user, label)
        return _in_support(owner, _draws(pairs, owner, rank, seed, _UNITS), test)[index], np.zeros(len(user), dtype=np.bool_)
    tie = _numpy(pairs.tie)
    index, owner, _, rank = _units(np.concatenate([user, user]), np.concatenate([chosen, rejected]))
    as_chosen, as_rejected = index[: len(user)], index[len(user) :]
    ever_chosen, ever_rejected = np.zeros(len(owner), dtype=np.bool_), np.zeros(len(owner), dtype=np.bool_)
    ever_chosen[as_chosen[~tie]] = True
    ever_rejected[as_rejected[~tie]] = True
    # Halving what a user only ever chose apart from what they only ever rejected leaves both kinds in both halves.
    stratum = np.where(ever_chosen & ~ever_rejected, 0, np.where(ever_rejected & ~ever_chosen, 1, 2))
    side = _in_support(owner * 3 + stratum, _draws(pairs, owner, rank, seed, _UNITS), test)
    return side[as_chosen], side[as_chosen] != side[as_rejected]


def _check(pairs: Pairs, by: str, fractions: Mapping[str, float], counts: Mapping[str, int | None]) -> None:
    if by not in ("conversation", "prompt", "item", "pair", "unit"):
        raise DataError(f"by is {by!r}; expected 'conversation', 'prompt', 'item', 'pair' or 'unit'")
    for name, value in fractions.items():
        if not (0 <= value < 1 and (value > 0 or name == "unseen")):
            raise DataError(f"{name} is {value}; expected a fraction below 1, {'0 or more' if name == 'unseen' else 'above 0'}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise DataError(f"{name} is {count}; expected 1 or more" + (", or None for all" if name.startswith("max") else ""))
    if not len(pairs):
        raise DataError("there are no pairs to split; expected at least one user with two units")


def split(
    pairs: Pairs,
    *,
    by: By,
    unseen: float = 0.5,
    test: float = 0.5,
    max_support: int | None = None,
    max_test: int | None = None,
    min_support: int = 1,
    min_test: int = 1,
    seed: int = 0,
) -> Split:
    """Seen and unseen users, and two sides of every user's choices that share no unit.

    Args:
        by: the unit that is never on both sides of a user. 'prompt', 'conversation' (`PairSet`) or 'unit' (`EmbeddedPairs`): a
            user's units are split, units that share a pair staying together. 'pair': the pairs are, a pair and its swap together.
            'item': the user's texts are split, those only ever chosen, only ever rejected, and both, each by themselves; pairs
            whose texts fall on different sides are dropped.
        unseen: share of the users who are unseen, rounded.
        test: share of a user's units that is tested on, rounded up; the support gets the rest.
        max_support, max_test: at most so many pairs a user on that side, drawn at random.
        min_support: users with fewer pairs on the support side are dropped.
        min_test: users with fewer pairs that are no ties on the test side are dropped (ties say nothing about accuracy).
        seed: of all draws.

    Raises:
        DataError: arguments out of range, units the data do not know, or no user with two sides.

    Ties stay where they fall, on both sides. O(P log P): 100,000 users with 10 pairs take 3 s on one core.
    """
    fractions, counts = {"unseen": unseen, "test": test}, {"max_support": max_support, "max_test": max_test}
    _check(pairs, by, fractions, {**counts, "min_support": min_support, "min_test": min_test})
    user, _, _ = _sides(pairs)
    n_users = len(pairs.user_ids)
    supports, crossing = _support_side(pairs, by, test, seed)
    own_rank = _places(user, np.arange(len(user)))[0]
    kept = ~crossing
    for side, cap, stream in ((supports, max_support, _SUPPORT), (~supports, max_test, _TEST)):
        rows = np.flatnonzero(side & ~crossing)
        if cap is not None and len(rows):
            places, _ = _places(user[rows], _draws(pairs, user[rows], own_rank[rows], seed, stream))
            kept[rows[places >= cap]] = False
    n_support = np.bincount(user[kept & supports], minlength=n_users)
    n_test = np.bincount(user[kept & ~supports & ~_numpy(pairs.tie)], minlength=n_users)
    too_little_support, too_little_test = n_support < min_support, n_test < min_test
    eligible = np.flatnonzero(~too_little_support & ~too_little_test)
    if not len(eligible):
        reason = f"all {n_users} users have fewer than {min_support} pairs of support or {min_test} strict ones to test on"
        raise DataError(f"splitting by {by!r} leaves nobody: {reason}; split by another unit, or lower min_support and min_test")
    shuffled = np.random.default_rng([seed, 1]).permutation(eligible)
    cohort = np.zeros(n_users, dtype=np.int64)  # 0 left out, 1 seen, 2 unseen
    n_unseen = round(unseen * len(shuffled))
    cohort[shuffled[n_unseen:]], cohort[shuffled[:n_unseen]] = 1, 2
    used = kept & (cohort[user] > 0)
    of_dropped = cohort[user] == 0
    train, test_seen, support, test_unseen = (
        np.flatnonzero(used & (cohort[user] == c) & (supports == s)) for c in (1, 2) for s in (True, False)
    )
    dropped = {
        "of users with too few pairs": int(of_dropped.sum()),
        "items on different sides": int((crossing & ~of_dropped).sum()),
        "beyond max_support or max_test": int((~kept & ~crossing & ~of_dropped).sum()),
    }
    dropped_users = {
        "too few pairs of support": int(too_little_support.sum()),
        "too few strict pairs to test on": int((too_little_test & ~too_little_support).sum()),
    }
    return Split(train, test_seen, support, test_unseen, by, seed, dropped, dropped_users)


def given_split(pairs: PairSet) -> Split:
    """The split that the rows' own `split` column says, as it is; rows without one are dropped and counted.

    Raises `DataError` where no row has one, or where a label is none of `train`, `test_seen`, `support`, `test_unseen`.
    """
    labels = pairs.split
    none = np.array([label is None for label in labels], dtype=np.bool_)
    unknown = np.flatnonzero([label is not None and label not in SIDES for label in labels])
    if len(unknown):
        found = f"rows {unknown[:5].tolist()} ({len(unknown)} in all) have split {labels[unknown[0]]!r}"
        raise DataError(f"{found}; expected one of {', '.join(SIDES)}, or nothing")
    if none.all():
        raise DataError("no row has a split; expected a column `split`, or use split(pairs, by=...)")
    train, test_seen, support, test_unseen = (np.flatnonzero(labels == name) for name in SIDES)
    left = len(pairs.user_ids) - len(np.unique(pairs.user_index[~none]))
    dropped, left_out = {"no split given": int(none.sum())}, {"no split given": left}
    return Split(train, test_seen, support, test_unseen, "given", None, dropped, left_out)


def holdout_users(data: Pairs, fraction: float, seed: int = 0) -> tuple[Ints, Ints]:
    """(rows of the users that stay, rows of those held out): `fraction` of the users, rounded, at least one on either side.

    Raises `DataError` for a fraction outside (0, 1) or fewer than two users. O(P).
    """
    n_users = len(data.user_ids)
    if not 0 < fraction < 1:
        raise DataError(f"fraction is {fraction}; expected above 0 and below 1")
    if n_users < 2:
        raise DataError(f"there are {n_users} users; expected at least 2, one to keep and one to hold out")
    n_held = min(max(round(fraction * n_users), 1), n_users - 1)
    held = np.zeros(n_users, dtype=np.bool_)
    held[np.random.default_rng([seed, 2]).permutation(n_users)[:n_held]] = True
    mask = held[_numpy(data.user_index)]
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def nested_shots(data: Pairs, shots: int, seed: int = 0) -> Ints:
    """Rows (sorted) of the first `shots` pairs of each user in one random order: fewer shots are always a part of more.

    Users with fewer pairs keep all of theirs. Raises `DataError` for negative `shots`. O(P log P), 0.5 s for a million pairs.
    """
    if shots < 0:
        raise DataError(f"shots is {shots}; expected 0 or more")
    user = _numpy(data.user_index)
    if not len(user) or not shots:
        return np.zeros(0, dtype=np.int64)
    own_rank = _places(user, np.arange(len(user)))[0]
    places, _ = _places(user, _draws(data, user, own_rank, seed, _SHOTS))
    return np.flatnonzero(places < shots)
