"""What an `Explainer` keeps of a sample of responses: sums over them, over permutations and over resamples. No text, no person.

With s_na statistic a of the `style` encoder for response n and r_n = offset_n + slopes_n . w the reward, both less their mean
over the responses to the same prompt and s_a of length 1, all that `palate.naming` says of a direction of the weights is made of
s^T s, s^T slopes, slopes^T slopes, and the same with responses dealt anew within prompts or drawn again.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
from sklearn.model_selection import GroupKFold

from palate.data.pairs import PairSet
from palate.encoders import Encoder
from palate.errors import DataError, MismatchError, ModelFileError
from palate.living.terms import Floats, Ints
from palate.models import files
from palate.models.base import RewardModel
from palate.naming import CLUSTERS, PERMUTATIONS, RESAMPLES, Responses, responses_of

NAME = "explainer.safetensors"


@dataclass(frozen=True, eq=False)
class Sums:
    """A statistics, K weights, B resamples, R permutations, F folds of the prompts.

    Attributes:
        gram, cross, own: (A, A), (A, K), (K, K) inner products of the statistics and the slopes.
        offset: (A,) of the statistics with the part of the reward that is everybody's.
        raw: (K, K) of the slopes before they were centred.
        dealt: (R, A, K) `cross` with rewards dealt anew within prompts.
        size, crosses, owns: (B, A), (B, A, K), (B, K, K) over resampled prompts; draws: (B, K) from N(0, 1), for what is unknown
            of a person.
        fold_gram, fold_cross, fold_own: over the prompts of each fold.
        axes: names of the statistics. n_texts, n_prompts: of the sample. model: fingerprint.
    """

    gram: Floats
    cross: Floats
    own: Floats
    offset: Floats
    raw: Floats
    dealt: Floats
    size: Floats
    crosses: Floats
    owns: Floats
    draws: Floats
    fold_gram: Floats
    fold_cross: Floats
    fold_own: Floats
    axes: tuple[str, ...]
    n_texts: int
    n_prompts: int
    model: str

    @classmethod
    def of(cls, model: RewardModel, encoder: Encoder, pairs: PairSet, seed: int) -> Self:
        """Permuted and resampled exactly as by `name_profile`. Raises as that, and `DataError` for a model without weights."""
        if not model.n_weights:
            raise DataError(f"this {type(model).__name__} has no weights: everybody is the crowd, and nobody can be explained")
        sample, offset, slopes = responses_of(model, pairs, encoder)
        centred, style, n_prompts = sample.centred(slopes), sample.style, int(sample.prompt[-1]) + 1
        chance, resampling = np.random.default_rng(seed).spawn(2)
        deals = (np.lexsort((chance.random(len(style)), sample.prompt)) for _ in range(PERMUTATIONS))
        cluster = sample.prompt if n_prompts >= CLUSTERS else np.arange(len(style))
        folds = [(style[test], centred[test]) for _, test in GroupKFold(5).split(style, groups=cluster)]
        size, crosses, owns, draws = _resampled(sample, centred, n_prompts, resampling)
        return cls(
            gram=style.T @ style,
            cross=style.T @ centred,
            own=centred.T @ centred,
            offset=style.T @ sample.centred(offset[:, None])[:, 0],
            raw=slopes.T @ slopes,
            dealt=np.stack([style.T @ centred[dealt] for dealt in deals]),
            size=size,
            crosses=crosses,
            owns=owns,
            draws=draws,
            fold_gram=np.stack([s.T @ s for s, _ in folds]),
            fold_cross=np.stack([s.T @ c for s, c in folds]),
            fold_own=np.stack([c.T @ c for _, c in folds]),
            axes=sample.axes,
            n_texts=len(style),
            n_prompts=n_prompts,
            model=model.fingerprint(),
        )

    def save(self, folder: str | Path) -> None:
        """Write `explainer.safetensors`, whole or not at all."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Floats}
        counts = {"axes": self.axes, "n_texts": self.n_texts, "n_prompts": self.n_prompts, "model": self.model}
        meta = {"format": "palate-explainer", "version": "1", "about": json.dumps(counts)}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        files.write_tensors(Path(folder) / NAME, tensors, meta)

    @classmethod
    def load(cls, folder: str | Path, model: RewardModel) -> Self:
        """What `save` wrote. Raises `ModelFileError` for anything else, and `MismatchError` where it is not of this `model`."""
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / NAME
        try:
            with safe_open(str(path), framework="numpy") as opened:
                meta = opened.metadata() or {}
                if (meta.get("format"), meta.get("version")) != ("palate-explainer", "1"):
                    raise ModelFileError(f"{path} is {meta.get('format', 'a foreign file')}; expected palate-explainer version 1")
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            about = json.loads(meta["about"])
            out = cls(**arrays, **(about | {"axes": tuple(about["axes"])}))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{path} cannot be read as an explainer ({error}); write it with Explainer.save") from error
        if out.model != model.fingerprint():
            raise MismatchError(
                f"{path} belongs to model {out.model[:12]}, not to {model.fingerprint()[:12]}; make it again with Explainer(...)"
            )
        return out


def _resampled(sample: Responses, centred: Floats, n_prompts: int, rng: np.random.Generator) -> list[Floats]:
    """`size`, `crosses`, `owns` and `draws`: whole prompts drawn again, single responses where there are few prompts."""
    whole = n_prompts >= CLUSTERS
    n = n_prompts if whole else len(sample.texts)
    square, parts = np.square(sample.style), []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        weight = times[sample.prompt] if whole else times
        weighted = weight[:, None] * centred
        parts.append((weight @ square, sample.style.T @ weighted, centred.T @ weighted, rng.standard_normal(centred.shape[1])))
    return [np.stack(column) for column in zip(*parts, strict=True)]


def pursuit(gram: Floats, cross: Floats, most: int) -> tuple[Ints, Floats]:
    """Orthogonal matching pursuit from inner products: the rows that predict best together, and their coefficients.

    The next row is the one that the rest goes with most, and all coefficients are fitted again (Pati et al. 1993). At most `most`
    rows; fewer where they leave no rest.
    """
    chosen: list[int] = []
    coefficient: Floats = np.zeros(0)
    rest = cross.copy()
    while len(chosen) < min(most, len(cross)):
        rest[chosen] = 0
        best = int(np.abs(rest).argmax())
        if abs(rest[best]) <= 1e-9 * np.abs(cross).max():
            break
        chosen.append(best)
        mine = gram[:, chosen]
        coefficient = np.asarray(np.linalg.solve(mine[chosen], cross[chosen]), dtype=np.float64)
        rest = cross - mine @ coefficient
    return np.asarray(chosen, dtype=np.int64), coefficient
