"""Which texts go through a model together: by length, and by the start that they share.

A plan depends on the tokens alone and is fixed before the first forward pass. Padding is what a batch wastes, and the start that
all candidates of a prompt share is what a decoder would compute again for each of them.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from palate.encoders.formatting import shared

LEAST_SHARED = 16  # tokens below which a second forward pass costs more than it saves
LIVE = (
    4  # tokens of keys and values kept for a token that is computed: a bound on memory, reached by short answers to long prompts
)


class Group(NamedTuple):
    """Rows whose first `prefix` tokens are the same."""

    rows: list[int]
    prefix: int


def by_length(ids: Sequence[Sequence[int]], rows: Sequence[int], budget: int) -> list[list[int]]:
    """`rows` in batches of like length, of at most `budget` padded tokens each (one text may be longer). O(N log N)."""
    order = sorted(rows, key=lambda i: len(ids[i]))
    batches, start = [], 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(ids[order[stop]]) <= budget:
            stop += 1
        batches.append(order[start:stop])
        start = stop
    return batches


def by_prefix(ids: Sequence[Sequence[int]], prompts: Sequence[Hashable], budget: int) -> tuple[list[list[Group]], list[int]]:
    """Batches of groups of one prompt each, and the rows that share too little and are left over.

    The shared start is compared token by token and not as text, since tokens at a border depend on what follows. At least one
    token of every row is left outside it. Within a batch at most `budget` padded tokens are computed, and keys and values of at
    most `LIVE` times as many are kept. O(total tokens).
    """
    members: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    groups, left = [], []
    for rows in members.values():
        prefix = min(min(shared(ids[rows[0]], ids[i]) for i in rows), min(len(ids[i]) for i in rows) - 1)
        if len(rows) < 2 or prefix < LEAST_SHARED:
            left += rows
            continue
        rows = sorted(rows, key=lambda i: len(ids[i]))
        start = 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or _too_much(ids, [Group(rows[start : stop + 1], prefix)], budget):
                groups.append(Group(rows[start:stop], prefix))
                start = stop
    groups.sort(key=lambda group: (group.prefix, len(ids[group.rows[-1]])))
    batches: list[list[Group]] = []
    for group in groups:
        if batches and not _too_much(ids, [*batches[-1], group], budget):
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches, sorted(left)


def _too_much(ids: Sequence[Sequence[int]], groups: list[Group], budget: int) -> bool:
    prefix = max(group.prefix for group in groups)
    suffix = max(len(ids[i]) - group.prefix for group in groups for i in group.rows)
    n = sum(len(group.rows) for group in groups)
    return len(groups) * prefix + n * suffix > budget or n * (prefix + suffix) > LIVE * budget
