"""Refuses a split, or data, that a model could see through without learning anybody's taste.

Published figures have been produced by each of these: the same pair on both sides of a user's split, and a chosen side that is a
text where the rejected one is a Python list printed as text, which any encoder tells apart (LoRe on PRISM: .976).
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palate.data.pairs import EmbeddedPairs, PairSet
from palate.data.splits import SIDES, By, Ints, Pairs, Split, pair_labels, unit_labels
from palate.errors import DataError, LeakError

MAX_FORMAT_ACCURACY = 0.75  # honest data stay below .60; a side written by other code is at .9 and above
_PROBED = 20_000  # pairs: enough for an accuracy to within .004
_TOO_FEW = 50  # below that, .75 is within reach of chance
_FOLDS = 5

# Traces of the code that wrote a text, not of what it says. Length is none of them: people may well prefer it.
_FORMAT = {
    "starts with a bracket": re.compile(r"\A\s*[\[({]"),
    "ends with a bracket": re.compile(r"[\])}]\s*\Z"),
    "starts with a quote": re.compile(r"\A\s*['\"]"),
    "ends with a quote": re.compile(r"['\"]\s*\Z"),
    "holds ', ' between quotes": re.compile(r"', ['\"]|\", ['\"]"),
    "starts with white space": re.compile(r"\A\s"),
    "ends with white space": re.compile(r"\s\Z"),
    "holds a role marker": re.compile(
        r"(?:^|\n)\s*(?:Human|User|Assistant|AI|System|user|assistant|system)\s*:|<\|?\w+\|?>|\[/?INST\]|###\s*(?:Response|Instruction)|</s>"
    ),
    "holds a written-out escape": re.compile(r"\\[nrt\"']|\\u[0-9a-fA-F]{4}|&(?:amp|lt|gt|quot|#\d+);"),
    "holds a carriage return": re.compile(r"\r"),
}
_COUNTS = {"brackets": re.compile(r"[\[\](){}]"), "line breaks": re.compile(r"\n")}
_NAMES = (*_FORMAT, *_COUNTS)


@dataclass(frozen=True)
class LeakReport:
    """What passed: accuracies of telling chosen from rejected, cross-validated; None where there were too few pairs or no texts.

    `format_accuracy` uses traces of formatting only and had to be at most `MAX_FORMAT_ACCURACY`; `length_accuracy` guesses the
    longer or the shorter side, a legitimate preference that is reported and never refused. .5 is chance.
    """

    by: str
    format_accuracy: float | None
    length_accuracy: float | None
    n_probed: int


def _both(user: Ints, label: Ints, learnt: Ints, tested: Ints) -> list[tuple[int, int]]:
    """(row learnt from, row tested on) that agree in user and label, one for each tested row."""
    if not len(learnt) or not len(tested):
        return []
    key = user * (int(label.max()) + 1) + label
    keys, first = np.unique(key[learnt], return_index=True)
    place = np.minimum(np.searchsorted(keys, key[tested]), len(keys) - 1)
    same = keys[place] == key[tested]
    return list(zip(learnt[first[place[same]]].tolist(), tested[same].tolist(), strict=True))


def _refuse(found: list[tuple[int, int]], what: str, advice: str) -> None:
    if found:
        named = ", ".join(f"{a} and {b}" for a, b in found[:5])
        raise LeakError(f"{what}: rows {named} ({len(found)} tested rows in all); {advice}")


def _check_sides(pairs: Pairs, split: Split, by: By) -> None:
    user = np.asarray(pairs.user_index)
    rows = np.concatenate([getattr(split, side) for side in SIDES])
    if len(rows) and (rows.min() < 0 or rows.max() >= len(pairs)):
        raise DataError(f"the split points at rows {rows.min()}..{rows.max()} of {len(pairs)} pairs; it belongs to other data")
    twice = np.flatnonzero(np.bincount(rows, minlength=1) > 1)
    if len(twice):
        raise LeakError(f"rows {twice[:5].tolist()} ({len(twice)} in all) stand on two sides of the split; expected each on one")
    seen, unseen = (np.concatenate([getattr(split, a), getattr(split, b)]) for a, b in (SIDES[:2], SIDES[2:]))
    mixed = np.intersect1d(user[seen], user[unseen])
    if len(mixed):
        places = [np.flatnonzero(user[part] == mixed[0])[0] for part in (seen, unseen)]
        named = f"user {pairs.user_ids[mixed[0]]!r} in rows {seen[places[0]]} and {unseen[places[1]]}"
        raise LeakError(f"{len(mixed)} users are both seen and unseen: {named}; put all rows of a user on one side")
    learnt, tested = np.concatenate([split.train, split.support]), np.concatenate([split.test_seen, split.test_unseen])
    advice = "split by another unit, or draw the split with palate.data.splits.split"
    _refuse(_both(user, pair_labels(pairs), learnt, tested), "a user's pair (or its swap) is learnt from and tested on", advice)
    if by != "item":
        _refuse(_both(user, unit_labels(pairs, by), learnt, tested), f"a user's {by} is learnt from and tested on", advice)
        return
    chosen, rejected = np.asarray(pairs.chosen), np.asarray(pairs.rejected)
    p = len(pairs)
    found = _both(
        np.concatenate([user, user]),
        np.concatenate([chosen, rejected]),
        np.concatenate([learnt, learnt + p]),
        np.concatenate([tested, tested + p]),
    )
    _refuse([(a % p, b % p) for a, b in found], "a user's item is learnt from and tested on", advice)


def _format_features(text: str) -> list[float]:
    flags = [float(pattern.search(text) is not None) for pattern in _FORMAT.values()]
    return flags + [float(np.log1p(len(pattern.findall(text)))) for pattern in _COUNTS.values()]


def _probe(pairs: PairSet, rows: Ints, believe_format: bool) -> LeakReport:
    """Cross-validated by prompt, or by user where there are fewer prompts than folds."""
    prompts = pairs.prompt_index[rows]
    groups = prompts if len(np.unique(prompts)) >= _FOLDS else pairs.user_index[rows]
    if len(rows) < _TOO_FEW or len(np.unique(groups)) < _FOLDS:
        return LeakReport("", None, None, 0)
    from sklearn.linear_model import LogisticRegression  # here, because it takes a second to import
    from sklearn.model_selection import GroupKFold

    used, at = np.unique(np.concatenate([pairs.chosen[rows], pairs.rejected[rows]]), return_inverse=True)
    responses = [pairs.texts[i].response for i in used]
    features = np.array([_format_features(text) for text in responses])
    bucket = np.floor(np.log2([1 + len(text) for text in responses]))[:, None]
    n = len(rows)

    def accuracy(table: NDArray[np.float64]) -> float:
        # Without an intercept and with both signs of every pair, the side on which a text stands carries nothing.
        z = table[at[:n]] - table[at[n:]]
        z /= np.where((spread := np.sqrt((z**2).mean(0))) > 0, spread, 1)
        right = np.empty(n)
        for train, test in GroupKFold(_FOLDS).split(z, groups=groups):
            model = LogisticRegression(fit_intercept=False)
            model.fit(np.concatenate([z[train], -z[train]]), np.repeat([1, 0], len(train)))
            right[test] = (np.sign(model.decision_function(z[test])) + 1) / 2
        return float(right.mean())

    found = accuracy(features)
    if found > MAX_FORMAT_ACCURACY and not believe_format:
        gap = features[at[:n]] - features[at[n:]]
        worst = int(np.argmax(np.abs(np.sign(gap).mean(0))))
        more = np.sign(np.sign(gap[:, worst]).mean())
        examples = rows[np.sign(gap[:, worst]) == more][:5].tolist()
        has = "has more " if _NAMES[worst] in _COUNTS else ""
        side = "chosen" if more > 0 else "rejected"
        raise LeakError(
            f"formatting alone tells chosen from rejected in {found:.0%} of the pairs (believable: {MAX_FORMAT_ACCURACY:.0%}): "
            f"the {side} side more often {has}{_NAMES[worst]}, as in rows {examples}; "
            "write both sides with the same code; if people really prefer it so, say so (believe_format=True, --believe-format, "
            "or ,believe-format=yes behind rows=FILE of palate bench)"
        )
    return LeakReport("", found, accuracy(bucket), n)


def check_conversations(pairs: PairSet, split: Split) -> None:
    """Refuse a user's conversation on the side learnt from and on the side tested on, of the choices that name one.

    `check_leaks` by 'prompt' does not see it: each turn of a dialogue is a prompt of its own, and quotes the answers before it.

    Raises `LeakError`, which names rows. O(P log P).
    """
    named = np.array([name is not None for name in pairs.conversation], dtype=np.bool_)
    label = np.unique(pairs.conversation.astype(str), return_inverse=True)[1].astype(np.int64)
    sides = (split.train, split.support), (split.test_seen, split.test_unseen)
    learnt, tested = (rows[named[rows]] for rows in map(np.concatenate, sides))
    found = _both(np.asarray(pairs.user_index), label, learnt, tested)
    advice = "put conversations on one side whole, with a conversation_id in every row; or say by what else to split"
    _refuse(found, "a user's conversation is learnt from and tested on", advice)


def check_leaks(pairs: Pairs, split: Split, *, by: By, believe_format: bool = False) -> LeakReport:
    """What the checks measured, if they found no leak.

    Within a user: no pair, no swapped pair and no unit (`by`, as in `palate.data.splits.split`) on both the side learnt from and
    the side tested on; no user both seen and unseen; no row on two sides. Of the texts (a `PairSet` has them, `EmbeddedPairs` do
    not): no pair of one text with itself, and no formatting that tells chosen from rejected (a logistic regression on traces of
    formatting, on at most 20,000 strict pairs, cross-validated by prompt or by user); with `believe_format` that last one is
    measured and not refused, for people who do prefer lists, or short answers.

    Raises:
        LeakError: a check failed; the message names rows.
        DataError: the split is of other data, or the data do not know the unit.

    Costs a sort of the pairs and about a second for the probe.
    """
    _check_sides(pairs, split, by)
    if isinstance(pairs, EmbeddedPairs):
        return LeakReport(by, None, None, 0)
    rows = np.sort(np.concatenate([getattr(split, side) for side in SIDES]))
    responses = [text.response.strip() for text in pairs.texts]
    same = [int(row) for row in rows if responses[pairs.chosen[row]] == responses[pairs.rejected[row]]]
    if same:
        raise LeakError(
            f"rows {same[:5]} ({len(same)} in all) compare a text with itself; leave them out (palate validate finds them)"
        )
    strict = rows[~pairs.tie[rows]]
    if len(strict) > _PROBED:
        strict = np.sort(np.random.default_rng(0).choice(strict, _PROBED, replace=False))
    report = _probe(pairs, strict, believe_format)
    return LeakReport(by, report.format_accuracy, report.length_accuracy, report.n_probed)
