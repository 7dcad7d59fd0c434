"""PAL: users are mixtures of a few prototypes, and a text is the better the nearer it is to a user's point (arXiv 2406.08469).

PAL-A keeps one set of ideal points, PAL-B lets them depend on the prompt. `PAL.faithful` is the published code on frozen
features; `PAL()` is the same idea around the crowd's reward, with what there is to choose chosen on held-out users.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import Embeddings, as_embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import ideal, pal_published
from palate.models.base import RewardModel
from palate.models.ideal import Asked, Layers
from palate.models.pal_fixed import Estimation, Plan, Progress
from palate.models.pal_published import Rates
from palate.solvers import Sides, Solution


class PAL(RewardModel):
    """Ideal points that users mix on the simplex (Chen, Chen, Rege and Vinayak, PAL, arXiv 2406.08469).

    PAL-A (`by_prompt=False`), with a projector f, prototypes p_k and a user's weights w >= 0, sum_k w_k = 1:

        r(e) = mu . e - |f(e) - sum_k w_k p_k|^2

    PAL-B (`by_prompt=True`), whose point depends on the prompt x (e(x, y) is what the encoder makes of both texts, and takes the
    place of the paper's e(y)):

        r(e) = mu . e + s cos(f(e(x, y)), sum_k w_k g_k(e(x)))

    This constructor is the fixed preset. mu is the ridge Bradley-Terry reward of the crowd, which the published models have to
    spend their projector on; the likelihood is Bradley-Terry for both (margins are log-odds); the distance is squared, so that a
    margin of PAL-A is linear in w and a user's problem convex. Features are scaled (`crowd.standard_scale`). f and g_k start
    along the directions in which users pull away from the crowd (`pal_start.tucker`), not at random, and are trained by AdamW on
    mini-batches of users whose weights are solved anew at each step. Everybody, seen or not, is adapted in one way: the mode of
    w under Dirichlet(1 + strength c), c the mean of the seen users (`ideal.weights_at_mode`). Without choices that is c, the
    crowd; `strength` counts choices. K, the strength and when to stop are those with the lowest log loss of held-out seen users
    after 1, 2, 5 and half of their choices; unless that beats mu by two standard errors, there are no prototypes: the model is
    Bradley-Terry.

    Args:
        n_prototypes: K, or several to choose from.
        by_prompt: PAL-B, which needs rows of e(prompt) (`encoder.embed(pairs, prompts=True)`).
        width: d, of the space in which distances or angles are taken.
        hidden: widths of hidden layers with GELU, each at least 2 d; () for linear projectors.
        strength: of the prior, in choices; None chooses among `pal_fixed.STRENGTHS`.

    Raises:
        DataError: a number outside its range; in `fit` and `adapt`, PAL-B on data without prompts.
    Cost: up to 216 steps for each K and fold; 640 users x 20 choices at D = 384 take five seconds on one thread. Adapting
    1,000 users x 9 choices takes .05 s (PAL-A, K = 5) to .8 s (PAL-B, K = 10).
    """

    linear: ClassVar[bool] = False
    direction: Tensor
    entry: Tensor
    rest: Tensor
    prompt_entry: Tensor
    prompt_rest: Tensor
    prototypes: Tensor
    mean_weights: Tensor
    scale: Tensor
    concentration: Tensor

    def __init__(
        self,
        n_prototypes: int | tuple[int, ...] = (2, 5, 10),
        *,
        by_prompt: bool = False,
        width: int = 16,
        hidden: tuple[int, ...] = (),
        strength: float | None = None,
    ):
        super().__init__()
        candidates = (n_prototypes,) if isinstance(n_prototypes, int) else tuple(n_prototypes)
        if not candidates or min(candidates) < 1:
            raise DataError(f"n_prototypes is {n_prototypes}; expected a positive number, or several to choose from")
        if width < 1:
            raise DataError(f"width is {width}; expected a positive number of dimensions")
        if strength is not None and not 0 < strength < float("inf"):
            raise DataError(f"strength is {strength}; expected a number of choices above 0, or None to choose it")
        if any(size < 2 * width for size in hidden):
            raise DataError(f"hidden is {tuple(hidden)}; expected layers of at least twice the width, {2 * width}")
        self.n_prototypes, self.reads_prompts, self.width = n_prototypes, by_prompt, width
        self.hidden, self.strength = tuple(hidden), strength
        self._faithful: dict[str, Any] | None = None
        for name in ("direction", "rest", "prompt_rest", "mean_weights"):
            self.register_buffer(name, torch.zeros(0))
        for name in ("entry", "prompt_entry", "prototypes"):
            self.register_buffer(name, torch.zeros(0, 0))
        for name in ("scale", "concentration"):
            self.register_buffer(name, torch.ones(()))

    @classmethod
    def faithful(
        cls,
        n_prototypes: int = 2,
        *,
        by_prompt: bool = False,
        hidden: tuple[int, ...] = (512,),
        width: int = 512,
        rates: Rates = Rates(),  # noqa: B008, an immutable tuple of numbers
        margin: float = 1.0,
        batch: int = 4,
        epochs: int = 1,
        few_shot_epochs: int = 20,
        seed: int = 0,
    ) -> Self:
        """The published code as far as frozen features allow (`PAL`, 2024), with the projector of LoRe's table 4.

        PAL-A: r = -|f(e) - f(softmax(a) P)|, not squared, P (K, D) among the features, rows drawn from N(0, I) and divided by
        their length (the code's variant "f(Pw)"); hinge loss max(0, margin - (r_chosen - r_rejected)). PAL-B: r = s cos, s =
        min(exp(t), 100), t from log(1 / .07), cross-entropy of the two sides, which is Bradley-Terry. Raw features, no crowd.
        Projectors start as `torch.nn.Linear` does; users' logits a from N(0, 1). Adam with four groups of `rates` (projectors,
        with an L2 penalty; P; users' logits; t) on batches of `batch` strict choices in random order, `epochs` times over; no
        tokens, so no weighting of positions. Seen users keep softmax(a) of the joint table.
        A new user: logits from N(0, 1) that depend on `seed` and the id alone, `few_shot_epochs` of AdamW without decay at the
        users' rate on batches of their own choices (the code mixes users in a batch, which Adam's momentum lets touch one
        another). Somebody without strict choices gets the mean of the table.

        Args:
            n_prototypes: K; 1 or 2 in the repository, by cross-validation in {2, 5, ..., 50} in LoRe's paper.
            hidden: (512,) is LoRe's "2-layer" projector, (512, 512) the repository's "mlp2"; GELU, dropout 0, no residual.

        Not applicable here: fine-tuning of the language model (its rate is 9.65e-6), token weights, the bound on prototypes
        (computed there, never added), and the best checkpoint by validation loss (chosen there on test users): the last is kept.

        Raises:
            DataError: a number outside its range.
        Cost: a step a batch; on one thread about 4 ms for PAL-A and K + 1 times the projector for PAL-B at D of a few hundred.
        """
        counts = {"n_prototypes": n_prototypes, "width": width, "batch": batch, "epochs": epochs}
        for name, value in {**counts, "few_shot_epochs": few_shot_epochs, **{f"hidden {h}": h for h in hidden}}.items():
            if not isinstance(value, int) or value < 1:
                raise DataError(f"{name} is {value}; expected a whole number of at least 1")
        if not margin > 0 or min(rates[:4]) <= 0 or rates.decay < 0:
            raise DataError(f"margin is {margin} and rates {tuple(rates)}; expected a margin and rates above 0, decay at least 0")
        out = cls(n_prototypes, by_prompt=by_prompt, width=width)
        out.hidden = tuple(hidden)
        out._faithful = {"rates": list(rates), "margin": margin, "batch": batch, "epochs": epochs}
        out._faithful |= {"few_shot_epochs": few_shot_epochs, "seed": seed}
        return out

    def options(self) -> dict[str, Any]:
        n_prototypes = self.n_prototypes if isinstance(self.n_prototypes, int) else list(self.n_prototypes)
        own = {"by_prompt": self.reads_prompts, "width": self.width, "hidden": list(self.hidden), "strength": self.strength}
        return {"n_prototypes": n_prototypes, **own, "faithful": self._faithful}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        given = {name: value for name, value in options.items() if name not in ("n_prototypes", "faithful", "strength")}
        given["hidden"], k = tuple(options["hidden"]), options["n_prototypes"]
        if options["faithful"] is not None:
            return cls.faithful(k, **given, **options["faithful"] | {"rates": Rates(*options["faithful"]["rates"])})
        return cls(k if isinstance(k, int) else tuple(k), **given, strength=options["strength"])

    @property
    def n_features(self) -> int:
        return len(self.direction)

    @property
    def crowd_weights(self) -> Tensor:
        """(K,) the mean of the seen users, which is where the prior has its mode."""
        return self.mean_weights

    def _layers(self, parts: int = 1) -> Layers:
        return Layers(self.hidden, self.width, parts)

    def features(self, embeddings: Embeddings) -> Tensor:
        """(N, F). The crowd's reward first; then, for PAL-A, |f|^2 and f . p_k (the faithful preset: f itself); for PAL-B f
        divided by its length and every g_k, of which a text uses the one and a prompt the others (`under`)."""
        k, first = self.n_weights, self.entry.shape[1]
        read = [self.direction[:, None], self.entry, *([self.prompt_entry] if self.prompt_entry.numel() else [])]
        out = embeddings.project(torch.cat(read, dim=1)).to(self.direction)  # what follows is of the model's numbers alone
        if k == 0:
            return out[:, :1]
        point = self._layers()(out[:, 1 : 1 + first], self.rest)[:, 0]
        if self.reads_prompts:
            points = self._layers(k)(out[:, 1 + first :], self.prompt_rest)
            return torch.cat([out[:, :1], ideal.normalised(point), points.flatten(1)], dim=1)
        if self._faithful is not None:
            return torch.cat([out[:, :1], point], dim=1)
        return torch.cat([out[:, :1], point.square().sum(1, keepdim=True), point @ self.prototypes.T], dim=1)

    def under(self, features: Tensor, prompts: Tensor) -> Tensor:
        """PAL-B: (N, 1 + K + K K), the crowd's reward, f . g_k and the Gram matrix of the g_k."""
        k, d = self.n_weights, self.width
        if k == 0:
            return features
        products, gram = ideal.cosine(features[:, 1 : 1 + d], prompts[:, 1 + d :].reshape(-1, k, d))
        return torch.cat([features[:, :1], products, gram.flatten(1)], dim=1)

    def forward(self, embeddings: Tensor | Embeddings, weights: Tensor | None = None) -> Tensor:
        if self.reads_prompts and self.n_weights:
            self.check(as_embeddings(embeddings))
            raise DataError("a reward of PAL-B depends on the prompt beside the text; use palate.margins, or a Scorer")
        return super().forward(embeddings, weights)

    def score(self, features: Tensor, weights: Tensor) -> Tensor:
        k = self.n_weights
        if k == 0:
            return features[:, 0]
        if self.reads_prompts:
            gram = features[:, 1 + k :].reshape(-1, k, k)
            return Asked(features[:, 0], self.scale * features[:, 1 : 1 + k], gram).margins(weights)
        if self._faithful is not None:
            away = features[:, 1:] - self._points(weights.reshape(-1, k))
            return features[:, 0] - away.square().sum(1).sqrt()
        length = (weights @ self.prototypes).square().sum(-1)
        return features[:, 0] - features[:, 1] + 2 * (features[:, 2:] * weights).sum(1) - length

    def _points(self, weights: Tensor) -> Tensor:
        """(B, K) -> (B, d) f(w P)."""
        return self._layers()(weights @ (self.prototypes @ self.entry), self.rest)[:, 0]

    def solved(self, sides: Sides, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        if self._faithful is not None:
            return self._few_shot(sides, users)
        return ideal.weights_at_mode(self._asked(sides), sides.weight, sides.tie, self.mean_weights, self.concentration)

    def _asked(self, sides: Sides) -> Asked:
        """The choices as functions of the weights; both texts of a choice answer one prompt, and so share its Gram matrix."""
        k, away = self.n_weights, sides.chosen - sides.rejected
        if self.reads_prompts:
            gram = sides.chosen[..., 1 + k :].reshape(*away.shape[:-1], k, k)
            return Asked(away[..., 0], self.scale * away[..., 1 : 1 + k], gram)
        return Asked(away[..., 0] - away[..., 1], 2 * away[..., 2:], None)

    def _few_shot(self, sides: Sides, users: tuple[str, ...]) -> Solution:
        assert self._faithful is not None
        plan, asked = self._faithful, self._asked(sides) if self.reads_prompts else None
        rate, hinge = plan["rates"][2], plan["margin"]

        def losses(w: Tensor, columns: Tensor) -> Tensor:
            """(U, K) weights, (U, b) places of choices -> (U, b)."""
            row = torch.arange(len(w), device=w.device)[:, None]
            if asked is None:
                point = self._points(w)[:, None]
                near, far = (side[row, columns, 1:] - point for side in (sides.chosen, sides.rejected))
                return pal_published.hinge(near, far, hinge)
            return likelihood.nll(asked.mapped(lambda part: part[row, columns]).margins(w[:, None]))

        weight = sides.weight if sides.tie is None else sides.weight * ~sides.tie
        found = pal_published.few_shot(losses, weight, users, self.n_weights, rate, plan)
        weights = torch.where((weight > 0).any(1)[:, None], found, self.mean_weights)
        return Solution(weights, None, None, torch.zeros(len(users), dtype=torch.bool, device=weights.device))

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["PAL", Tensor | None]:
        if self.reads_prompts and data.prompts is None:
            raise DataError(
                f"PAL-B reads prompts, and these {len(data)} choices have no rows of e(prompt); embed them with "
                "encoder.embed(pairs, prompts=True), give EmbeddedPairs(..., prompts=rows), or use PAL-A (by_prompt=False)"
            )
        if self._faithful is not None and isinstance(self.n_prototypes, int):
            plan = self._faithful | {"k": self.n_prototypes, "by_prompt": self.reads_prompts}
            numbers, table = pal_published.published(data, self._layers(), plan, seed, progress)
            return self.like(numbers | {"mean_weights": table.mean(0)}), table
        sizes = (self.n_prototypes,) if isinstance(self.n_prototypes, int) else tuple(sorted(set(self.n_prototypes)))
        plan_of = Plan(sizes, self.reads_prompts, self._layers(), self.strength)
        numbers, record = Estimation(data, plan_of, seed, progress).run()
        out = self.like(numbers)
        out.record["selection"] = record
        return out, None
