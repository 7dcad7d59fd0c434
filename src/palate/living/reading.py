"""How feedback is read: what an ordinary response is worth (`Level`), how much each kind counts (`Trust`), and what position
does (`Exposure`). Small frozen values, saved together as one JSON file beside the model they belong to (`Reading`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from palate.data.embeddings import Embeddings, as_embeddings
from palate.errors import DataError, MismatchError, ModelFileError
from palate.living.exposure import Exposure
from palate.living.terms import Floats
from palate.models.base import RewardModel

Number = Annotated[float, Field(allow_inf_nan=False)]
Multiplier = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)]

NAME = "reading.json"
MAX_STEPS = 10  # of a rating scale; a finer one, or one without steps, is read in so many
FROZEN = ConfigDict(strict=True, extra="forbid", frozen=True)


class Level(BaseModel):
    """The reward of an ordinary response, offset + slopes . w: what a thumb or a rating without rivals is read against.

    Attributes:
        offset, slopes: mean of a reference sample's `model.design`, (), (K,).
        crowd: (K,) the crowd's weights, at which it is judged how far somebody had looked before a pick.
        steps: log-odds of passing each step of a rating scale for an ordinary response; empty: every rating equally likely.
        model: fingerprint of the model that the numbers belong to.
        n_texts: size of the sample.
    """

    model_config = FROZEN

    offset: Number
    slopes: Numbers
    crowd: Numbers
    model: str
    n_texts: int = Field(ge=1)
    steps: Numbers = ()

    @classmethod
    @torch.no_grad()
    def of(cls, model: RewardModel, embeddings: Tensor | Embeddings, encoder: str | None = None) -> Self:
        """The level of a sample of ordinary responses, (N, D): a few hundred of the responses that people are shown.

        Raises `DataError` for an empty sample, numbers that are not finite, and a model that is not linear in its weights.
        """
        table = as_embeddings(embeddings)
        model.check(table, encoder)
        if not len(table):
            raise DataError("0 texts to take the level from; expected a sample of the responses that people are shown")
        offset, slopes = model.design(model.features(table))
        middle, mean = float(offset.double().mean()), slopes.double().mean(0).tolist()
        if not all(math.isfinite(value) for value in (middle, *mean)):
            raise DataError(f"the level of {len(table)} texts is not finite; expected finite embeddings")
        crowd = tuple(model.crowd_weights.double().tolist())
        return cls(offset=middle, slopes=tuple(mean), crowd=crowd, model=model.fingerprint(), n_texts=len(table))

    def rated(self, places: Sequence[int], n_steps: int) -> Self:
        """The level for a scale whose use is known: how many of the ratings of ordinary responses stand at each place.

        The log-odds of passing step k is log((passed + 1/2) / (stopped + 1/2)), a continuation ratio (Tutz 1991).

        Args:
            places: of every rating, how many steps above the lowest it stands: 0 to `n_steps`.
        """
        wrong = [place for place in places if not 0 <= place <= n_steps]
        if wrong or not 1 <= n_steps <= MAX_STEPS or not places:
            raise DataError(
                f"{len(places)} ratings on {n_steps} steps, {len(wrong)} of them outside; expected ratings of 0 to n_steps, "
                f"and 1 to {MAX_STEPS} steps"
            )
        at = np.bincount(np.asarray(places), minlength=n_steps + 1)
        passed = np.cumsum(at[::-1])[::-1][1:]
        return self.model_copy(update={"steps": tuple(np.log((passed + 0.5) / (at[:-1] + 0.5)).tolist())})

    def passing(self, n_steps: int) -> Floats:
        """(n_steps,) log-odds of passing each step for an ordinary response; by default such that all ratings are as likely."""
        return np.array(self.steps) if len(self.steps) == n_steps else np.log(np.arange(n_steps, 0, -1, dtype=np.float64))


class Trust(BaseModel):
    """How much one event of each kind counts, as a multiple of its log-likelihood: a choice between two is 1.

    A choice, a pick and a ranking are what their likelihood says. The others are read into what people do for other reasons too,
    and count less until `weighing.learn_trust` says otherwise: a scale has a zero of the person's own (1/2); whether to give a
    thumb at all is the person's choice (1/2); a copy may be the first that would do (1/2); asking again may be curiosity (1/4),
    more so than keeping what then comes (1/2). An edit is work, done to get what is preferred (1).
    """

    model_config = FROZEN

    choice: Multiplier = 1.0
    pick: Multiplier = 1.0
    ranking: Multiplier = 1.0
    rating: Multiplier = 0.5
    thumb: Multiplier = 0.5
    edit: Multiplier = 1.0
    copied: Multiplier = 0.5
    regenerate: Multiplier = 0.25
    kept: Multiplier = 0.5


class Reading(BaseModel):
    """All that is needed to turn feedback into evidence, beside the model."""

    model_config = FROZEN

    level: Level
    exposure: Exposure = Exposure()
    trust: Trust = Trust()

    def save(self, folder: str | Path) -> None:
        """Write `reading.json` into the folder of the model, whole or not at all."""
        path = Path(folder) / NAME
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, folder: str | Path, model: RewardModel | None = None) -> Self:
        """What `save` wrote. Raises `ModelFileError` for anything else, and `MismatchError` where it is not of this `model`."""
        path = Path(folder) / NAME
        try:
            out = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ModelFileError(f"{path} is no reading of feedback ({error}); write it with Reading.save") from error
        if model is not None and out.level.model != model.fingerprint():
            raise MismatchError(
                f"{path} belongs to model {out.level.model[:12]}, not to {model.fingerprint()[:12]}; make it again with Level.of"
            )
        return out
