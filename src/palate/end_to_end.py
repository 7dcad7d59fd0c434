"""`fit_through`: learn the features too, LoRA in the encoder's model or an MLP on its features, by a factored model's loss.

LoRe's examples with an MLP and with LoRA, and PReF's training, learn their base rewards through the encoder; so does this, for
every factored model and on one or several devices. What is learned is then frozen: the model itself is fitted on the final
features by the ordinary `fit`, so that its prior and its uncertainty are those of any other. Held-out training users, adapted as
new ones, say after which pass to stop, and whether the untuned encoder was as good: then it is what comes back.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palate import likelihood
from palate.adaptation import adapt, margin_moments
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs, PairSet
from palate.data.splits import holdout_users
from palate.devices import Team
from palate.encoders.base import BatchedEncoder, Encoder
from palate.encoders.tuned import Layers, LoRA, TunedEncoder
from palate.errors import DataError
from palate.models import crowd, meta, ways
from palate.models.base import RewardModel
from palate.models.objectives import gradient_weights
from palate.models.through import Joint, Visit
from palate.models.validation import halves
from palate.training import Progress, fit

CROWD_RIDGE = 1e-3  # of the crowd's reward from which training starts
DOUBT = 2.0  # standard errors that a gain must pass: the best of several passes looks better than it is


@dataclass(frozen=True)
class Passes:
    """How the encoder is trained: Adam over batches of users, each pass over all of them once.

    Args:
        epochs: most passes. rate: of the learned parts of the encoder. head_rate: of direction and bases.
        users: users a step, on all devices together, so that the steps do not depend on the number of devices.
        choices: most choices of a user at a visit, drawn anew each pass.
        parts: a step's users are taken in so many parts one after the other, for memory; robust objectives look at one part.
        patience: passes without a gain on held-out users before it stops.
        checkpointing: compute activations again on the way back instead of keeping them: less memory, a third more time.
        bf16: the encoder's products in bfloat16 while training.
    """

    epochs: int = 10
    rate: float = 2e-4
    head_rate: float = 0.02
    users: int = 16
    choices: int = 16
    parts: int = 1
    patience: int = 3
    checkpointing: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        whole = (self.epochs, self.users, self.choices, self.parts, self.patience)
        if min(whole) < 1 or not (0 < self.rate < math.inf and 0 < self.head_rate < math.inf):
            raise DataError(f"{self}; expected positive numbers throughout")


def fit_through(
    encoder: Encoder,
    pairs: PairSet,
    model: RewardModel | None = None,
    *,
    lora: LoRA | None = None,
    hidden: tuple[int, ...] = (),
    passes: Passes | None = None,
    hold_out: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Encoder, RewardModel]:
    """Learn the encoder's features with the loss of a factored model, then fit the model on them.

    Args:
        encoder: where the features come from; for LoRA one that holds a transformers model. It is not changed.
        pairs: training choices; never a test split.
        model: an unfitted `Hierarchical` (the default), `BradleyTerry`, `LoRe`, `PReF` or `MRM`; `models.through` has the losses.
        lora: adapters in the encoder's model, `LoRA()` where neither this nor `hidden` is given. None with `hidden` trains the
            MLP alone on frozen features, for any encoder.
        hidden: widths of hidden layers after the features.
        passes: rates, batches, memory.
        hold_out: share of the users who are not trained on: after every pass the model is fitted on the others and these are
            adapted from half of their choices and judged on the other half. They are in the final `fit`.
        seed: same seed, same bits on the same machine with the same number of threads.

    Returns:
        The encoder and the model fitted on its features. The encoder is a `TunedEncoder`, or `encoder` itself where no pass
        lowered the log loss of the held-out users by more than two standard errors of the paired difference.
        `model.record["tuning"]` has the curve and says which.

    Raises:
        DataError: a model without such a loss, an encoder that cannot be tuned, fewer than ten users, nobody held out with
            choices on both sides, or training that diverged.
        MissingExtraError: peft, or for several processes accelerate, is not installed.
    Cost: a pass is a forward and a backward pass of the encoder over the texts of at most `choices` choices a user, and then
        embeds all texts and fits the model once.
    """
    from palate.models.hierarchical import Hierarchical

    say = progress or (lambda share, what: None)
    model, passes = model or Hierarchical(), passes or Passes()
    lora = LoRA() if lora is None and not hidden else lora
    if len(pairs.user_ids) < 10:
        raise DataError(f"{len(pairs.user_ids)} users; expected at least 10, of whom some are held out to judge by")
    say(0.0, "the untuned encoder")
    frozen = encoder.embed(pairs)
    kept, held = holdout_users(frozen, hold_out, seed)
    judge = _Judge(model, kept, held, frozen, seed)
    tuning = _Tuning(encoder, pairs, frozen, kept, model, lora=lora, hidden=hidden, passes=passes, seed=seed)
    untuned = judge.losses(frozen)
    best, losses, chosen = tuning.snapshot(), untuned, 0
    curve: list[dict[str, Any]] = [{"epoch": 0, "log_loss": float(untuned.mean())}]
    for epoch, loss in tuning.run():
        say(0.9 * epoch / passes.epochs, f"tuning, pass {epoch}")
        found = judge.losses(tuning.encoder.embed(pairs))
        curve.append({"epoch": epoch, "training_loss": loss, "log_loss": float(found.mean())})
        if found.mean() < losses.mean():
            best, losses, chosen = tuning.snapshot(), found, epoch
        elif epoch - chosen >= passes.patience:
            break
    gain = (untuned - losses).double()
    error = float(gain.std() / len(gain) ** 0.5)
    accepted = chosen > 0 and float(gain.mean()) > DOUBT * error
    out: Encoder = encoder
    if accepted:
        out = tuning.at(best)
    say(0.95, "fitting on the final features")
    fitted = fit(out.embed(pairs), model, seed=seed)
    fitted.record["tuning"] = {
        **{"accepted": accepted, "epoch": chosen if accepted else 0, "gain": float(gain.mean()), "error": error, "curve": curve},
        **{
            "held_out": len(gain),
            "lora": None if lora is None else asdict(lora),
            "hidden": list(hidden),
            "passes": asdict(passes),
        },
    }
    say(1.0, "done")
    return out, fitted


class _Judge:
    """Held-out users as new ones: the model is fitted on the others, they are adapted on one half and asked about the other."""

    def __init__(self, model: RewardModel, kept: Any, held: Any, data: EmbeddedPairs, seed: int):
        self.model, self.kept, self.seed = model, kept, seed
        support, query = halves(data[held], seed)
        rows = torch.from_numpy(held)
        self.support, self.query = rows[support.cpu()], rows[query.cpu()]
        both = set(data[self.support].user_ids) & set(data[self.query].user_ids)
        if len(both) < 2:
            raise DataError(
                f"{len(both)} held-out users have choices on both sides of a split; expected at least 2: hold out more users, or "
                "fit on frozen features (palate.fit)"
            )

    def losses(self, data: EmbeddedPairs) -> Tensor:
        """(U,) mean log loss of every held-out user with a query."""
        fitted = fit(data[self.kept], self.model, seed=self.seed)
        asked = data[self.query]
        mean, variance = margin_moments(fitted, asked, adapt(fitted, data[self.support]))
        loss = likelihood.nll(fitted.stated(mean, variance), asked.tie)
        return crowd.user_means(loss[:, None], asked)[:, 0].cpu()


class _Tuning:
    """The training itself: one network of the encoder's learned parts and the joint loss, Adam, and passes over the users."""

    def __init__(
        self,
        encoder: Encoder,
        pairs: PairSet,
        frozen: EmbeddedPairs,
        kept: Any,
        model: RewardModel,
        *,
        lora: LoRA | None,
        hidden: tuple[int, ...],
        passes: Passes,
        seed: int,
    ):
        self.passes, self.seed, self.data = passes, seed, frozen[kept]
        self.team = Team()
        centre, scale = crowd.standard_scale(self.data)
        if not all(dense for _, dense in frozen.embeddings.column_blocks()):
            raise DataError(f"{encoder!r} has one column an item; expected dense features, which say something of new texts")
        layers = Layers(centre, scale * len(scale) ** 0.5, hidden, seed=seed) if hidden else None
        self.encoder = TunedEncoder(encoder, lora, layers, seed=seed)
        used = np.unique(np.concatenate([pairs.chosen, pairs.rejected])).tolist()  # in the order of `Encoder.embed`
        self.texts = [pairs.texts[i] for i in used]
        self.table = None if lora is not None else frozen.embeddings
        start = self.data if layers is None else self._through_layers(layers)
        self.scale = crowd.standard_scale(start)[1]
        self.joint = Joint(model, len(self.scale), len(self.data.user_ids), seed=seed).to(self.scale)
        nobody = torch.full((len(self.data.user_ids),), -1)
        design = crowd.Rescaled(start.differences(), self.scale)
        self.joint.begin_at(crowd.fit_crowd(start, design, nobody, ridges=(CROWD_RIDGE,)).direction)
        self.split = ways.fair(self.data, seed) if self.joint.splits else None
        if passes.checkpointing and self.encoder.model is not None:
            _checkpoint(self.encoder.model)

    @torch.no_grad()
    def _through_layers(self, layers: Layers) -> EmbeddedPairs:
        data, rows = self.data, torch.arange(len(self.data.embeddings))
        table = Dense(torch.cat([layers(data.embeddings.rows(part)) for part in torch.split(rows, 4096)]))
        return EmbeddedPairs(table, data.chosen, data.rejected, data.users, tie=data.tie.cpu(), weight=data.weight.cpu())

    # -- passes

    def run(self) -> Iterator[tuple[int, float]]:
        """(pass, mean loss of its users) after every pass; the encoder is then fixed until the next one begins."""
        own = list(self.encoder.learned.values())
        heads = list(self.joint.parameters())
        adam = torch.optim.Adam([{"params": own, "rate": self.passes.rate}, {"params": heads, "rate": self.passes.head_rate}])
        n_users, taken = len(self.data.user_ids), 0
        total = -(-n_users // self.passes.users) * self.passes.epochs
        for epoch in range(self.passes.epochs):
            self.encoder.train()
            losses = []
            for users in torch.split(meta.keyed_order(n_users, self.seed, epoch), self.passes.users):
                losses.append(self._step(users, epoch, taken))
                found = [p for p in [*own, *heads] if p.grad is not None]
                self.team.sum([p.grad for p in found if p.grad is not None])
                norm = nn.utils.clip_grad_norm_(found, 1.0)
                if not math.isfinite(float(norm)):
                    raise DataError(
                        f"training diverged in pass {epoch + 1}, step {taken + 1}; expected finite gradients: lower the rates"
                    )
                for group in adam.param_groups:
                    group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * taken / total))
                adam.step()
                adam.zero_grad()
                taken += 1
            self.encoder.train(False)
            together = torch.cat(losses)
            yield epoch + 1, float(together.mean()) if len(together) else math.nan

    def _step(self, users: Tensor, epoch: int, step: int) -> Tensor:
        """Gradients of one step, in parts; the losses of the users who were asked, on all devices."""
        told: list[Tensor] = []
        parts = [part for part in torch.tensor_split(users, self.passes.parts) if len(part)]
        for number, part in enumerate(parts):
            mine, real = self.team.share(part)
            with self._seeded(step * self.passes.parts + number):
                losses, asked, rows = self.joint(self._visit(mine, epoch))
            everybody, counted = self.team.gather(losses.detach()), self.team.gather(asked & real)
            if len(self.joint.table):
                self.joint.table[self.team.gather(mine)] = self.team.gather(rows)
            told.append(everybody[counted])
            pull = torch.zeros_like(everybody)
            if bool(counted.any()):
                pull[counted] = gradient_weights(self.joint.objective, everybody[counted]) * len(part) / len(users)
            weights = self.team.own(pull)
            loss = (weights * losses).sum() + self.joint.penalty() * len(part) / len(users) / self.team.size
            loss.backward()
        return torch.cat(told)

    def _visit(self, users: Tensor, epoch: int) -> Visit:
        data = self.data
        index, real = self._drawn(users, epoch)
        rows, where = torch.unique(torch.stack([data.chosen[index], data.rejected[index]]), return_inverse=True)
        features = self.features(rows) * self.scale
        if not bool(torch.isfinite(features).all()):
            raise DataError(f"training diverged in pass {epoch + 1}: features are not finite; lower the rates")
        support, query = (torch.ones_like(real),) * 2 if self.split is None else (m[index] for m in self.split(epoch))
        tie = data.tie[index] if bool(data.tie.any()) else None
        z = (features[where[0]] - features[where[1]]) * real[..., None]
        return Visit(z, users, data.weight[index].to(z) * real, tie, support, query)

    def _drawn(self, users: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """(B, n) choices of these users, at most `choices` each, drawn by user, seed and pass alone, and which are real."""
        index, real = self.data.grouped().padded(users)
        if index.shape[1] <= self.passes.choices:
            return index, real
        draws = [np.random.default_rng([self.seed, epoch, 2, user]).random(index.shape[1]) for user in users.tolist()]
        order = torch.argsort(torch.from_numpy(np.stack(draws)) + ~real, dim=1)[:, : self.passes.choices]
        return index.gather(1, order), real.gather(1, order)

    def features(self, rows: Tensor) -> Tensor:
        """(R, F) features of these rows of the table, with their gradient."""
        if self.table is not None and self.encoder.layers is not None:
            out: Tensor = self.encoder.layers(self.table.rows(rows))
            return out
        learned = next(iter(self.encoder.learned.values()))
        with torch.autocast(learned.device.type, torch.bfloat16, enabled=self.passes.bf16):
            return self.encoder.hidden([self.texts[i] for i in rows.tolist()]).to(self.scale)

    def _seeded(self, step: int) -> AbstractContextManager[Any]:
        """Dropout draws by seed, step and process, and leaves the caller's stream alone."""
        stack = ExitStack()
        if self.encoder.lora is not None and self.encoder.lora.dropout:
            stack.enter_context(torch.random.fork_rng())
            key = np.random.SeedSequence([self.seed, step, self.team.rank]).generate_state(1, np.uint64)[0]
            torch.random.manual_seed(int(key) >> 1)
        return stack

    # -- what is kept

    def snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.encoder.learned.items()}

    def at(self, snapshot: dict[str, Tensor]) -> TunedEncoder:
        with torch.no_grad():
            for name, parameter in self.encoder.learned.items():
                parameter.copy_(snapshot[name])
        self.encoder.train(False)
        if isinstance(self.encoder.base, BatchedEncoder):
            self.encoder.cache = self.encoder.base.cache
        return self.encoder


def _checkpoint(model: nn.Module) -> None:
    enable: Callable[..., None] | None = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        raise DataError(f"{type(model).__name__} cannot compute activations again; leave checkpointing out")
    enable(activation_checkpointing_kwargs={"use_reentrant": False})
