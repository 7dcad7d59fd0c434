"""The fixed preset of PAL: where it starts, how it is trained, and what held-out users say about how far to go.

Projectors start along the directions in which users pull away from the crowd, and are trained on mini-batches of users whose
weights are solved anew at each step, as those of a new user will be.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.models import crowd
from palate.models.bilinear import Joint
from palate.models.ideal import Adam, Asked, Layers, Leaf, cosine, normalised, weights_at_mode
from palate.models.pal_start import Prompts, folded, joined, simplex_along, size, straight, tucker
from palate.models.validation import halves, position
from palate.solvers import batches, chunks

Progress = Callable[[float, str], None]  # (share done, what)

STRENGTHS = (0.5, 2.0, 8.0, 32.0, 128.0)  # of the prior, in choices
STEPS = (8, 24, 72, 216)  # after which held-out users are asked
SHOTS = (1, 2, 5, None)  # choices after which they are judged
USERS = 32  # in a mini-batch
SURE = 2.0  # standard errors by which the best of many has to beat the crowd
RATE = 0.03  # of AdamW, times the size of what it trains
DECAY = 0.3  # of the same, times the rate
BLOCK = 2**12  # choices whose rows are in memory at once
TRAINED_AT = 4.0  # strength of the prior while training, where it is to be chosen


class Plan(NamedTuple):
    """What is asked for: sizes to choose K from, which PAL, its projector, the strength where it is given."""

    sizes: tuple[int, ...]
    by_prompt: bool
    layers: Layers
    strength: float | None

    @property
    def strengths(self) -> tuple[float, ...]:
        return STRENGTHS if self.strength is None else (self.strength,)


class Texts:
    """The scaled rows of both texts of some choices, each distinct one once."""

    def __init__(self, table: Embeddings, centre: Tensor, scale: Tensor):
        self.table, self.centre, self.scale = table, centre, scale

    def rows(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        used, where = torch.unique(torch.cat([chosen, rejected]), return_inverse=True)
        return (self.table.rows(used) - self.centre) * self.scale, where


class Learner:
    """PAL around a given crowd, on the choices of some users: its numbers, and AdamW steps on them.

    It starts along `tucker`'s directions, with margins at a prototype that are as wide as the crowd's, and at least one.
    """

    def __init__(self, data: EmbeddedPairs, plan: Plan, k: int, joint: Joint, texts: Texts, prompts: Prompts | None, seed: int):
        self.plan, self.k, self.texts, self.prompts = plan, k, texts, prompts
        self.part, self.offset, self.pairs = joint.part, joint.offset, joint.rows
        self.tied, self.layers = bool(self.part.tie.any()), plan.layers
        self.points = Layers(plan.layers.hidden, plan.layers.width, k)
        self.generator = torch.Generator().manual_seed(seed)
        users = len(self.part.user_ids)
        self.centre = self.offset.new_full((k,), 1 / k)
        self.weights = self.centre.expand(users, k).clone()
        self.strength = TRAINED_AT if plan.strength is None else plan.strength
        self.numbers = self._start(joint, seed)
        self.optimiser = Adam(
            [Leaf(value, RATE * float(unit), decay=RATE * DECAY * (value.ndim > 0)) for value, unit in self.numbers.values()]
        )
        self._queue = torch.zeros(0, dtype=torch.int64)

    def __getitem__(self, name: str) -> Tensor:
        return self.numbers[name][0]

    def _start(self, joint: Joint, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Every number with its unit, by which its rate is measured."""
        width = self.layers.width
        frame, asked, core = tucker(joint, self.prompts, width, seed)
        spread = simplex_along(core.flatten(1), self.k).view(self.k, *core.shape[1:])  # (K, d, 1 + g)
        entry, rest = straight(self.layers, frame, torch.zeros_like(frame[:1]), self.generator)
        left = joint.project(frame)
        wide = self.offset.square().mean().sqrt().clamp(min=1)
        if self.prompts is not None:
            spread = core.mean(0) + spread
            starts = [straight(self.layers, asked @ part[:, 1:].T, part[:, 0][None], self.generator) for part in spread]
            prompt_entry = torch.cat([first for first, _ in starts], dim=1)
            prompt_rest = joined(self.layers, [after for _, after in starts])
            numbers = {"entry": entry, "rest": rest, "prompt_entry": prompt_entry, "prompt_rest": prompt_rest}
            out = {name: (value, size(value)) for name, value in numbers.items()}
            if not self.layers.hidden:
                out["rest"] = rest, left.square().mean().sqrt()
            out["log_scale"] = frame.new_zeros(()), frame.new_ones(())
            self.numbers = out
            corners = torch.eye(self.k).to(entry)[:, None]
            at_corners = whole(self.asked, len(self.part)).margins(corners) - self.offset
            log_scale = (wide / at_corners.std(1).mean().clamp(min=1e-6)).log()
            return out | {"log_scale": (log_scale, torch.ones_like(log_scale))}
        # The quadratic part starts small: whether it is there is for the choices to say.
        quadratic = torch.cat([self._embedded(entry, rest, pairs) for pairs in torch.split(torch.arange(len(self.part)), BLOCK)])
        gain = (0.2 / quadratic.std().clamp(min=1e-12)).sqrt()
        entry, rest = straight(self.layers, frame * gain, torch.zeros_like(frame[:1]), self.generator)
        prototypes = spread[..., 0]
        reach = 2 * gain * (left @ prototypes.T).std(0).mean()
        prototypes = prototypes * wide / reach.clamp(min=1e-12)
        out = {"entry": (entry, size(entry)), "rest": (rest, size(rest)), "prototypes": (prototypes, size(prototypes))}
        if not self.layers.hidden:
            out["rest"] = rest, gain * left.square().mean().sqrt()
        return out

    def _embedded(self, entry: Tensor, rest: Tensor, pairs: Tensor) -> Tensor:
        rows, where = self.texts.rows(self.part.chosen[pairs], self.part.rejected[pairs])
        near, far = self.layers(rows @ entry, rest)[:, 0].square().sum(1)[where].chunk(2)
        return near - far

    def asked(self, pairs: Tensor) -> Asked:
        """The choices `pairs` of this learner's part (n,) as functions of weights."""
        return asked_of(self, self.part, self.pairs, self.offset, pairs)

    def step(self) -> None:
        """One AdamW step on the mean loss of some users' choices at their own weights, which are solved first."""
        if len(self._queue) == 0:
            n_users = len(self.part.user_ids)
            self._queue = torch.randperm(n_users, generator=self.generator).to(self.pairs.device)
            # A user's worth of every prototype, so that none is ever beyond reach.
            self.centre = (self.weights.sum(0) + 1 / self.k) / (n_users + 1)
        users, self._queue = self._queue[:USERS], self._queue[USERS:]
        index, real = self.part.grouped().padded(users)
        weight, tie = self.part.weight[index] * real, self.part.tie[index] if self.tied else None
        flat = index[real]
        with torch.enable_grad():
            found = self.asked(flat)
            place = torch.zeros_like(index)
            place[real] = torch.arange(len(flat), device=index.device)
            asked = found.mapped(lambda part: part[place])
            held = asked.mapped(Tensor.detach)
            own = weights_at_mode(
                held, weight, tie, self.centre, self.strength, start=self.weights[users], max_steps=2, tolerance=1e-3
            ).mean
            loss = (likelihood.nll(asked.margins(own[:, None]), tie) * weight).sum() / weight.sum()
        self.weights[users] = own
        self.optimiser.step(loss)

    def solved(self, strength: float) -> Tensor:
        """(U, K) weights of its own users, as a new user's would be solved."""
        asked, grouped = whole(self.asked, len(self.part)), self.part.grouped()
        out = torch.zeros_like(self.weights)
        for users in batches(grouped.counts, self.k * (1 if self.prompts is None else 1 + self.k)):
            index, real = grouped.padded(users)
            tie = self.part.tie[index] if self.tied else None
            gram = None if asked.gram is None else asked.gram[index]
            mine = Asked(asked.offset[index], asked.slopes[index], gram)
            out[users] = weights_at_mode(mine, self.part.weight[index] * real, tie, self.centre, strength).mean
        return out

    def state(self, direction: Tensor, strength: float) -> dict[str, Tensor]:
        """The numbers of the model, on raw features: scales and centres are folded into the first layers."""
        scale, empty = self.texts.scale, direction.new_zeros(0)
        entry, rest = folded(self.layers, self["entry"], self["rest"], self.texts.centre, scale)
        out = {"direction": direction, "entry": entry, "rest": rest}
        out |= {"prompt_entry": empty.view(0, 0), "prompt_rest": empty, "prototypes": empty.view(0, 0)}
        if self.prompts is not None:
            found = folded(self.points, self["prompt_entry"], self["prompt_rest"], self.prompts.centre, scale)
            out |= {"prompt_entry": found[0], "prompt_rest": found[1], "scale": self["log_scale"].detach().exp()}
        else:
            out |= {"prototypes": self["prototypes"].detach(), "scale": direction.new_ones(())}
        return out | {"mean_weights": self.centre, "concentration": direction.new_tensor(strength)}


def asked_of(learner: Learner, part: EmbeddedPairs, pairs: Tensor, offset: Tensor, some: Tensor) -> Asked:
    """The choices `some` of `part`, which are the choices `pairs` of all data, as functions of the learner's weights."""
    rows, where = learner.texts.rows(part.chosen[some], part.rejected[some])
    point = learner.layers(rows @ learner["entry"], learner["rest"])[:, 0]
    if learner.prompts is None:
        products = 2 * point @ learner["prototypes"].T
        (near, far), (own, other) = products[where].chunk(2), point.square().sum(1)[where].chunk(2)
        return Asked(offset[some] - own + other, near - far, None)
    near, far = normalised(point)[where].chunk(2)
    prompts, which = learner.prompts.rows(pairs[some])
    points = learner.points(prompts @ learner["prompt_entry"], learner["prompt_rest"])[which]
    products, gram = cosine(near - far, points)
    return Asked(offset[some], learner["log_scale"].exp() * products, gram)


def whole(asked: Callable[[Tensor], Asked], n: int) -> Asked:
    """`asked` of all n choices, in blocks."""
    with torch.no_grad():
        parts = [asked(some) for some in torch.split(torch.arange(n), BLOCK)]
    gram = None if parts[0].gram is None else torch.cat([part.gram for part in parts if part.gram is not None])
    return Asked(torch.cat([part.offset for part in parts]), torch.cat([part.slopes for part in parts]), gram)


class Estimation:
    """The crowd, then K, the prior's strength and when to stop on held-out users, then everybody."""

    def __init__(self, data: EmbeddedPairs, plan: Plan, seed: int, progress: Progress):
        self.data, self.plan, self.seed, self.progress = data, plan, seed, progress
        self.centre, self.scale = crowd.standard_scale(data)
        self.design = crowd.Rescaled(data.differences(), self.scale)
        self.fold = crowd.user_folds(len(data.user_ids), seed)
        self.texts = Texts(data.embeddings, self.centre, self.scale)
        self.prompts = Prompts(data, data.prompts, self.scale) if plan.by_prompt and data.prompts is not None else None
        self.record: dict[str, Any] = {}

    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The numbers of the model and the record of what was chosen."""
        found = crowd.fit_crowd(self.data, self.design, self.fold)
        self.record["ridge"] = {"grid": list(crowd.RIDGES), "log_loss": found.curve, "chosen": found.ridge}
        self.offsets = self.design.project(found.directions)
        direction = self.scale * found.direction
        k, steps, strength = self.plan.sizes[0], STEPS[1], self.plan.strengths[len(self.plan.strengths) // 2]
        if int(self.fold.max()) >= 0:
            k, steps, strength = self._choose()
        self.record |= {"n_prototypes": k, "steps": steps, "strength": strength}
        if k == 0 or len(self.data.user_ids) < 2:
            like, empty = direction.new_zeros(0), direction.new_zeros(0, 0)
            numbers = {"direction": direction, "entry": direction.new_zeros(len(direction), 0), "rest": like}
            numbers |= {"prompt_entry": empty, "prompt_rest": like, "prototypes": empty, "mean_weights": like}
            return numbers, self.record
        everybody = torch.arange(len(self.data), device=self.scale.device)
        learner = self._learner(k, everybody, self.offsets[:, -1])
        for _ in range(steps):
            learner.step()
        learner.centre = learner.solved(strength).mean(0)
        self.progress(1.0, "PAL")
        return learner.state(direction, strength), self.record

    def _learner(self, k: int, rows: Tensor, offset: Tensor) -> Learner:
        joint = Joint(self.data, self.design, offset, rows)
        return Learner(self.data, self.plan, k, joint, self.texts, self.prompts, self.seed)

    def _choose(self) -> tuple[int, int, float]:
        """K, steps and strength with the lowest mean log loss of held-out users; K = 0 where that does not surely beat the crowd.

        Surely: by more than `SURE` standard errors of the paired difference between users.
        """
        data, folds = self.data, range(int(self.fold.max()) + 1)
        support, query = halves(data, self.seed)
        place = position(data, support, self.seed)
        held = self.fold.to(data.user_index.device)[data.user_index]
        trials = [Trial(data, torch.nonzero(held == f)[:, 0], self.offsets[:, f], (support, query, place)) for f in folds]
        alone = torch.full((len(data.user_ids),), torch.nan)
        for trial in trials:
            trial.put(trial.offset[None], alone[None])
        losses: dict[tuple[int, int, float], Tensor] = {}
        for nth, k in enumerate(self.plan.sizes):
            learners = [self._learner(k, torch.nonzero(held != f)[:, 0], self.offsets[:, f]) for f in folds]
            lowest = float("inf")
            for before, steps in pairwise((0, *STEPS)):
                tables = [losses.setdefault((k, steps, s), torch.full_like(alone, torch.nan)) for s in self.plan.strengths]
                for learner, trial in zip(learners, trials, strict=True):
                    for _ in range(steps - before):
                        learner.step()
                    trial.judge(learner, self.plan.strengths, tables)
                now = min(float(table.nanmean()) for table in tables)
                if now > lowest:  # more steps fit their own users and nobody else
                    break
                lowest = now
            self.progress(0.1 + 0.7 * (nth + 1) / len(self.plan.sizes), f"PAL, {k} prototypes")
        curve = [
            {"n_prototypes": k, "steps": n, "strength": s, "log_loss": float(v.nanmean())} for (k, n, s), v in losses.items()
        ]
        self.record |= {"curve": curve, "crowd": float(alone.nanmean())}
        best = min(losses, key=lambda key: float(losses[key].nanmean()))
        away = (losses[best] - alone)[~torch.isnan(losses[best] - alone)].double()
        sure = len(away) > 1 and float(away.mean()) < -SURE * float(away.std()) / len(away) ** 0.5
        return best if sure else (0, *best[1:])


class Trial:
    """Held-out users as new ones: solved from some of their choices, judged on others."""

    def __init__(self, data: EmbeddedPairs, rows: Tensor, offset: Tensor, masks: tuple[Tensor, Tensor, Tensor]):
        support, query, place = masks
        self.rows, self.part, self.offset = rows, data[rows], offset[rows]
        self.users = torch.unique(data.user_index[rows]).cpu()
        self.tie = self.part.tie if bool(self.part.tie.any()) else None
        self.query = query[rows] * self.part.weight
        known = [support[rows] & (place[rows] < (len(data) if n is None else n)) for n in SHOTS]
        self.known = torch.stack([mask * self.part.weight for mask in known])  # (S, P)

    def judge(self, learner: Learner, strengths: Sequence[float], into: Sequence[Tensor]) -> None:
        """Put each held-out user's mean log loss over queries and `SHOTS` into (U,), for every strength; NaN without a query."""
        grouped, k = self.part.grouped(), len(learner.centre)
        asked = whole(lambda some: asked_of(learner, self.part, self.rows, self.offset, some), len(self.part))
        own = asked.slopes.new_zeros(len(strengths), len(SHOTS), len(self.part.user_ids), k)
        for users in chunks(len(SHOTS) * grouped.counts, k if asked.gram is None else k * k):
            index, real = grouped.padded(users)
            tie = None if self.tie is None else self.tie[index].repeat(len(SHOTS), 1)
            padded = asked.mapped(lambda part, index=index: part[index].repeat(len(SHOTS), *(1,) * part.ndim))  # type: ignore[misc]
            weight = (self.known[:, index] * real).flatten(0, 1)
            for strength, weights in zip(strengths, own, strict=True):
                w = weights_at_mode(padded, weight, tie, learner.centre, strength, max_steps=20, tolerance=1e-3).mean
                weights[:, users] = w.view(len(SHOTS), len(users), -1)
        for weights, table in zip(own, into, strict=True):
            self.put(asked.margins(weights[:, self.part.user_index]), table[None])

    def put(self, margins: Tensor, into: Tensor) -> None:
        """Each user's mean log loss on queries of margins (S, P), over S, into (1, U)."""
        loss = likelihood.nll(margins, self.tie).mean(0) * self.query
        total = loss.new_zeros(len(self.users)).index_add_(0, self.part.user_index, loss)
        count = loss.new_zeros(len(self.users)).index_add_(0, self.part.user_index, self.query)
        into[0, self.users] = (total / count).to(into)
