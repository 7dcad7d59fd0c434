"""What is known of people beside their choices, for the one method that reads it (`palate.models.attribute_prior`).

| data | attributes of a user |
|---|---|
| attributes | the two poles that the user wishes for: all there is to know |
| two-groups | a region, which tells the group of four people in five |
| texts | a file that the caller names, of real single persons |

    DIR/data/<digest>.json     a table, for worker processes

The people of the PRISM subset share profiles, so nothing is known there of a single person, and nothing is said.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palate.data.attributes import TRAITS, wishes
from palate.data.planted import Planted
from palate.errors import DataError, ModelFileError
from palate.models.attribute_prior import AttributePrior
from palate.models.base import RewardModel
from palate.models.columns import Table

TRUE_REGION = 0.8  # of the people of a group, the share who live where it is at home


def reads(model: RewardModel) -> bool:
    """Whether a method reads what is known of people."""
    return isinstance(model, AttributePrior)


def wished() -> Table:
    """The poles that each of the 84 attribute users wishes for, by trait."""
    return {wish.name: {" or ".join(TRAITS[trait]): TRAITS[trait][pole] for trait, pole in wish} for wish in wishes()}


def regions(world: Planted, seed: int) -> Table:
    """A region for everybody in a world of two groups: their group's with probability `TRUE_REGION`, else the other's."""
    people = (*world.train.user_ids, *world.support.user_ids)
    group = np.concatenate([world.weights_seen[:, 0].numpy(), world.weights_unseen[:, 0].numpy()]) > 0
    north = group ^ (np.random.default_rng([seed, 2]).random(len(people)) >= TRUE_REGION)
    return {user: {"region": "north" if here else "south"} for user, here in zip(people, north.tolist(), strict=True)}


def of_file(path: Path, users: Sequence[str]) -> Table:
    """A JSON object of user ids, each with an object of attributes: numbers, or words.

    Raises:
        DataError: a file of another shape, attributes that are neither numbers nor words, or none of `users` in it.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); expected an object of users, each with an object of attributes"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(mine, dict) for mine in found.values()):
        raise DataError(f'{path} holds {str(found)!r:.60}; expected {{"user": {{"age": 31, "region": "north"}}, ...}}')
    if not set(found) & set(users):
        raise DataError(
            f"{path} has attributes of {len(found)} users and of none of the {len(users)} in the data; expected their ids"
        )
    return AttributePrior(found).attributes  # which refuses what it cannot read


def keep(table: Table, folder: Path) -> str:
    """Write a table into `folder`, unless it is there; its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(table, sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = folder / f"{digest}.json"
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return digest


def kept(folder: Path, digest: str) -> Table:
    """The table that `keep` wrote. Raises `ModelFileError` where it is missing or damaged."""
    path = folder / f"{digest}.json"
    try:
        table: Table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}); remove {folder}, and the bench makes it anew") from error
    return table
