"""The one seam of the library: what a method has to say so that `fit`, `adapt`, scoring and evaluation need nothing else.

A `RewardModel` holds what users share. It turns embeddings into a few features once (`features`), and is then linear in a user's
K weights: reward = offset(features) + slopes(features) . w. A few published methods are not (`linear = False`: PAL, VPL): they
say how features and weights make a reward (`score`) and how choices become weights (`solved`). No model holds users: everybody
is adapted from their own choices.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from palate import likelihood
from palate.data.embeddings import Embeddings, as_embeddings
from palate.errors import DataError, MismatchError, ModelFileError
from palate.models import files, hub
from palate.priors import Prior
from palate.solvers import Batch, Sides, Solution


class Inference(Protocol):
    """How a user's choices become weights; `users` are the ids of the rows of the batch, for methods that start at random."""

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution: ...


@runtime_checkable
class Fittable(Protocol):
    """A model that `palate.fit` can learn. `fitted` returns a new model and, where the method keeps a table of the users it was
    fitted on, their weights (U, K) in the order of `data.user_ids`."""

    def fitted(self, data: Any, *, seed: int, progress: Any) -> "tuple[RewardModel, Tensor | None]": ...


class RewardModel(nn.Module):
    """Base of every method. Subclasses set their buffers in `__init__` from numbers or leave them empty until fitted.

    Attributes:
        linear: whether the reward is linear in the weights, so that a pair is its slopes and an offset (`design`).
        reads_prompts: whether the reward depends on e(prompt) beside e(prompt, response) (`under`).
        inference: how choices become weights.
        calibration: what stated log-odds are multiplied by (`stated`); 1 unless `fit` found another on held-out users.
        prior: population of users' weights, or None where the method has none.
        encoder: fingerprint of the encoder whose embeddings it was fitted on, None if unknown.
        record: how it came about (data fingerprint, seed, selection curve ...): JSON-able, saved with the model.
    """

    linear: ClassVar[bool] = True
    reads_prompts: bool = False
    inference: Inference
    calibration: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.encoder: str | None = None
        self.record: dict[str, Any] = {}
        self._printed: tuple[str, list[tuple[str, Tensor, int]], str] | None = None  # what was hashed last, and the hash

    # -- what a method must say

    @property
    def n_features(self) -> int:
        """D, the width of the embeddings that it reads; 0 before `fit`."""
        raise DataError(f"{type(self).__name__} does not say how many features it reads")

    @property
    def n_weights(self) -> int:
        """K, the number of weights of a user."""
        return len(self.crowd_weights)

    @property
    def crowd_weights(self) -> Tensor:
        """(K,) the weights of somebody of whom nothing is known: the crowd's reward."""
        raise DataError(f"{type(self).__name__} does not say what the crowd's weights are")

    @property
    def prior(self) -> Prior | None:
        """Population of the K weights; None where the method has none."""
        return None

    def options(self) -> dict[str, Any]:
        """The keyword arguments that construct an unfitted model like this one: JSON-able."""
        raise DataError(f"{type(self).__name__} does not say how it was constructed")

    def features(self, embeddings: Embeddings) -> Tensor:
        """(N, D) -> (N, F): everything that depends on the text. One pass over the table."""
        raise DataError(f"{type(self).__name__} has no features")

    def design(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, F) -> offset (N,) and slopes (N, K): the reward is offset + slopes . w."""
        raise DataError(f"{type(self).__name__} is not linear in its weights, so a pair has no slopes; expected a method that is")

    def under(self, features: Tensor, prompts: Tensor) -> Tensor:
        """(N, F) features of texts, (N, F) features of their prompts alone -> (N, F) what `score` reads, for a method that reads
        prompts."""
        raise DataError(f"{type(self).__name__} reads no prompts")

    def solved(self, sides: Sides, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        """The weights of a batch of users, for a method that is not linear in them (the others have `inference`)."""
        raise DataError(f"{type(self).__name__} does not say how choices become weights")

    @property
    def lacks(self) -> str | None:
        """What it reads beside choices and was not given, in words, which `adapt` warns of; None where it lacks nothing."""
        return None

    # -- what follows from it

    def expected(self, users: Sequence[str]) -> Tensor:
        """(U, K) the weights of users without choices: the crowd's, unless the model knows something else of them."""
        return self.crowd_weights.expand(len(users), -1)

    @property
    def crowd_covariance(self) -> Tensor | None:
        """(K, K) the prior's second moment about the crowd's weights, from which its mean may be away; None without a prior."""
        prior = self.prior  # made anew at every look
        if prior is None:
            return None
        away = prior.mean - self.crowd_weights
        return prior.covariance + torch.outer(away, away)

    def expected_covariance(self, users: Sequence[str]) -> Tensor | None:
        """(U, K, K) the same about `expected`, of users without choices."""
        found = self.crowd_covariance
        return None if found is None else found.expand(len(users), -1, -1)

    def score(self, features: Tensor, weights: Tensor) -> Tensor:
        """(N, F), (N, K) or (K,) -> (N,): the reward in natural log-odds (differences of it are margins). O(N K)."""
        offset, slopes = self.design(features)
        return offset + (slopes * weights).sum(-1)

    def stated(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The log-odds that say how probable a choice is whose margin has this posterior mean and variance, of any one shape.

        a mean / sqrt(1 + pi variance / 8), `likelihood.damped` times a = `calibration` (temperature scaling with 1 / a: Guo et
        al. 2017). It never changes the sign of a margin.
        """
        return self.calibration * likelihood.damped(mean, variance)

    def forward(self, embeddings: Tensor | Embeddings, weights: Tensor | None = None) -> Tensor:
        """The reward of every row of `embeddings` for one user's weights (K,), or the crowd's where None."""
        table = as_embeddings(embeddings)
        self.check(table)
        return self.score(self.features(table), self.crowd_weights if weights is None else weights)

    @property
    def is_fitted(self) -> bool:
        return self.n_features > 0

    def check(self, embeddings: Embeddings, encoder: str | None = None) -> None:
        """Raise unless this model is fitted and reads these embeddings.

        Raises:
            DataError: not fitted yet, or another number of columns.
            MismatchError: the embeddings come from another encoder than the one it was fitted on.
        """
        if not self.is_fitted:
            raise DataError(f"this {type(self).__name__} is not fitted; call palate.fit(data, model) and use what it returns")
        if embeddings.shape[1] != self.n_features:
            raise DataError(
                f"embeddings have {embeddings.shape[1]} columns; this {type(self).__name__} was fitted on {self.n_features}: "
                "use the encoder it was fitted with"
            )
        if encoder is not None and self.encoder is not None and encoder != self.encoder:
            raise MismatchError(
                f"embeddings of encoder {encoder[:12]} given to a model fitted on encoder {self.encoder[:12]}; "
                "embed the texts with the model's own encoder, or fit again"
            )

    @property
    def n_parameters(self) -> int:
        """Numbers learned and shared by all users (buffers and parameters, the encoder not counted)."""
        return sum(tensor.numel() for tensor in self.state_dict().values() if tensor.is_floating_point())

    def fingerprint(self) -> str:
        """SHA-256 over the class, the options, the encoder and every number. Profiles carry it and refuse another model.

        Every `adapt` asks for it, so the numbers are read again only after something wrote to them (torch counts the writes to a
        tensor).
        """
        head = type(self).__name__ + json.dumps(self.options(), sort_keys=True, default=str) + (self.encoder or "")
        held = [(name, t) for name, t in [*self.named_parameters(), *self.named_buffers()] if not t.is_inference()]
        now = [(name, t, t._version) for name, t in sorted(held, key=lambda pair: pair[0])]
        if self._printed is not None and len(held) == len(self.state_dict()):
            before, then, known = self._printed
            same = len(now) == len(then) and all(
                a == c and b is d and v == w for (a, b, v), (c, d, w) in zip(now, then, strict=True)
            )
            if before == head and same:
                return known
        digest = hashlib.sha256(head.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self._printed = head, now, digest.hexdigest()
        return self._printed[2]

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """An unfitted model with what `options` of another one returned, before or after JSON."""
        return cls(**options)

    def like(self, state: Mapping[str, Tensor], **options: Any) -> Self:
        """A new model of this class with these options and these numbers, whatever their shapes."""
        out = self.from_options({**self.options(), **options})
        for name, tensor in state.items():
            if name not in dict(out.named_buffers(recurse=False)):
                raise DataError(f"{type(self).__name__} has no number called {name!r}; it has {sorted(out.state_dict())}")
            setattr(out, name, tensor.contiguous())  # as a file gives them back: products in another order are other bits
        return out

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made where it does not exist.

        Atomic: a process that dies leaves the old model or the new one. Other files of the folder are kept. The record goes with
        the model (data fingerprint, seed, selection, versions); users do not, because a model holds none.

        Raises:
            DataError: the model is not fitted.
            ModelFileError: the folder belongs to something else, or is a file.
        """
        if not self.is_fitted:
            raise DataError(
                f"this {type(self).__name__} is not fitted, so there is nothing to save; call palate.fit(data, model) first"
            )
        head = {"class": type(self).__name__, "options": self.options(), "encoder": self.encoder, "record": self.record}
        files.write(folder, head, self.state_dict())

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | None = None) -> Self:
        """As `load_model`, and of this class: `Hierarchical.from_pretrained("org/name")`. Another one is a `ModelFileError`."""
        out = load_model(name, revision=revision, token=token)
        if not isinstance(out, cls):
            raise ModelFileError(f"{name} is a {type(out).__name__}; expected a {cls.__name__}; load it with palate.load_model")
        return out

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


def load_model(name: str | Path, *, revision: str | None = None, token: str | None = None) -> RewardModel:
    """The model that `save_pretrained` wrote into a folder, with the same fingerprint and the same margins, bit for bit.

    Where there is no folder of that name, ORG/NAME is a model on the Hugging Face Hub; its record then says which commit it was
    (`record["hub"]`). Nothing is executed, and only the library's own classes can be named in it.

    Args:
        name: a folder, or the id of a model that `palate.push_to_hub` wrote.
        revision: branch, tag or commit of an id.
        token: for a private model; by default HF_TOKEN, or what `hf auth login` stored.

    Raises:
        DataError: a revision of a folder.
        ModelFileError: which file is missing, corrupt, foreign, written by a newer version, or holds what its class cannot have;
            or why the Hub does not give it.
    """
    folder, origin = hub.located(name, revision=revision, token=token)
    config, tensors = files.read(folder)
    called, options = config["class"], config["options"]
    kind: type[RewardModel] = getattr(import_module(files.KINDS[called].module), called)
    try:
        out = kind.from_options(options)
        taken = json.loads(json.dumps(out.options()))
        if any(key not in taken or taken[key] != value for key, value in options.items()):
            raise DataError(f"it takes {taken}")
        out = out.like(tensors)
        _ = out.prior  # says whether its numbers are a population
    except (DataError, TypeError, KeyError) as error:
        raise ModelFileError(f"{folder} is no {called} with options {options} ({error}); save the model again") from error
    out.encoder, out.record = config["encoder"], config["record"] | ({} if origin is None else {"hub": origin})
    return out


class Newton:
    """MAP and Laplace covariance under the model's prior: deterministic, a handful of K x K steps (see `solvers.newton`)."""

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        from palate.solvers import posterior

        if prior is None:
            raise DataError("Newton needs a prior over the weights, and this model has none; expected a fitted model with one")
        return posterior(batch, prior, covariance=covariance)


class Simplex:
    """Maximum likelihood on the probability simplex: the exact convex solve; without covariance (see `solvers.simplex`)."""

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        from palate.solvers import simplex

        return simplex(batch)


class Steps:
    """A fixed number of Adam steps on softmax logits that start at N(0, 1): what the published few-shot code does.

    Each user's start is drawn from a generator seeded by `seed` and the user's id, so that a user's answer depends neither on who
    else is in the batch nor on the order.
    """

    def __init__(self, steps: int, rate: float, seed: int = 0):
        self.steps, self.rate, self.seed = steps, rate, seed

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        from palate.solvers import adam_on_logits

        k = batch.slopes.shape[2]
        start = torch.stack([normal_for(user, self.seed, k) for user in users]) if users else torch.zeros(0, k)
        return adam_on_logits(batch, start.to(batch.slopes), steps=self.steps, rate=self.rate)


class Fixed:
    """No weights to learn: everybody gets the crowd's reward."""

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        n, k = batch.slopes.shape[0], batch.slopes.shape[2]
        done = torch.ones(n, dtype=torch.bool, device=batch.slopes.device)
        return Solution(batch.slopes.new_zeros(n, k), batch.slopes.new_zeros(n, k, k), batch.slopes.new_zeros(n), done)


def normal_for(user: str, seed: int, size: int) -> Tensor:
    """`size` draws of N(0, 1) that depend on the seed and the user's id alone."""
    digest = hashlib.sha256(f"{seed}:{user}".encode("utf-8", "surrogatepass")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(size, generator=generator)
