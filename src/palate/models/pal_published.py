"""What the published code of PAL does on frozen features: one pass over single choices, then a short descent for a new user."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.models.base import normal_for
from palate.models.ideal import Adam, Asked, Layers, Leaf, cosine, normalised

Progress = Callable[[float, str], None]  # (share done, what)
MOST_SCALE = 100.0  # of the cosine
FIRST_SCALE = 1 / 0.07


class Rates(NamedTuple):
    """Adam's rates of the four groups of parameters, and the L2 penalty of the projectors."""

    projectors: float = 1e-4
    prototypes: float = 5e-3
    weights: float = 5e-3
    scale: float = 0.1
    decay: float = 0.01


def hinge(near: Tensor, far: Tensor, margin: float) -> Tensor:
    """(..., d) ways from the user's point to the chosen and to the rejected text -> (...): max(0, margin + |near| - |far|)."""
    return relu(margin + near.norm(dim=-1) - far.norm(dim=-1))


def published(
    data: EmbeddedPairs, layers: Layers, plan: Mapping[str, Any], seed: int, progress: Progress
) -> tuple[dict[str, Tensor], Tensor]:
    """The numbers of a `PAL.faithful` and the weights (U, K) of the users it was fitted on, as described there.

    What is random comes from `seed`, users' logits also from their ids. O(D first) a choice and step.
    """
    table, k, by_prompt, rates = data.embeddings, plan["k"], plan["by_prompt"], Rates(*plan["rates"])
    generator, width = torch.Generator().manual_seed(seed), table.shape[1]
    like = data.weight
    entry, rest = _linear(layers, width, generator)
    prompts = Layers(layers.hidden, layers.width, k)
    prompt_entry, prompt_rest = _linear(prompts, width, generator) if by_prompt else (torch.zeros(0, 0), torch.zeros(0))
    drawn = torch.zeros(0, 0) if by_prompt else torch.randn(k, width, generator=generator)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True)
    logits = torch.stack([normal_for(user, seed, k) for user in data.user_ids])
    log_scale = torch.tensor(FIRST_SCALE).log()
    given = (entry, rest, prompt_entry, prompt_rest, drawn, logits, log_scale)
    entry, rest, prompt_entry, prompt_rest, drawn, logits, log_scale = (t.to(like) for t in given)
    trained = (entry, rest, prompt_entry, prompt_rest) if by_prompt else (entry, rest)
    leaves = [Leaf(value, rates.projectors, rates.decay) for value in trained] + [Leaf(logits, rates.weights)]
    optimiser = Adam([*leaves, Leaf(log_scale, rates.scale) if by_prompt else Leaf(drawn, rates.prototypes)])
    strict = torch.nonzero(~data.tie)[:, 0]
    for epoch in range(plan["epochs"]):
        order = strict[torch.randperm(len(strict), generator=generator).to(strict.device)]
        for start in range(0, len(order), plan["batch"]):
            pairs = order[start : start + plan["batch"]]
            user = data.user_index[pairs]
            sides = table.rows(torch.cat([data.chosen[pairs], data.rejected[pairs]]))
            asked = table.rows(data.prompts[pairs]) if by_prompt and data.prompts is not None else None
            with torch.enable_grad():
                w = logits[user].softmax(1)
                if asked is None:
                    points = layers(torch.cat([sides, w @ drawn]) @ entry, rest)[:, 0]
                    near, far, own = points.chunk(3)
                    losses = hinge(near - own, far - own, plan["margin"])
                else:
                    texts = normalised(layers(sides @ entry, rest)[:, 0])
                    near, far = texts.chunk(2)
                    products, gram = cosine(near - far, prompts(asked @ prompt_entry, prompt_rest))
                    scale = log_scale.exp().clamp(max=MOST_SCALE)
                    margins = Asked(torch.zeros_like(products[:, 0]), scale * products, gram).margins(w)
                    losses = likelihood.nll(margins)  # the cross-entropy of the two sides
                loss = (losses * data.weight[pairs]).mean()
            optimiser.step(loss)
            if start % (64 * plan["batch"]) == 0:
                progress((epoch + start / len(order)) / plan["epochs"], "PAL")
    numbers = {"entry": entry, "rest": rest, "prompt_entry": prompt_entry, "prompt_rest": prompt_rest, "prototypes": drawn}
    out = {name: value.detach() for name, value in numbers.items()}
    out |= {"direction": like.new_zeros(width), "scale": log_scale.detach().exp().clamp(max=MOST_SCALE)}
    return out, logits.detach().softmax(1)


def _linear(layers: Layers, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """First layer and rest, weights and biases uniform within 1 / sqrt(inputs), as `torch.nn.Linear` starts."""

    def uniform(*size: int, inputs: int) -> Tensor:
        drawn: Tensor = (2 * torch.rand(*size, generator=generator) - 1) / inputs**0.5
        return drawn

    entry = uniform(width, layers.parts * layers.first, inputs=width)
    rest, inputs = torch.empty(layers.n_rest), width
    for weight, bias in layers.unpacked(rest):
        if weight is not None:
            inputs = weight.shape[1]
            weight.copy_(uniform(*weight.shape, inputs=inputs))
        bias.copy_(uniform(*bias.shape, inputs=inputs))
    return entry, rest


def few_shot(
    losses: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor,
    users: tuple[str, ...],
    k: int,
    rate: float,
    plan: Mapping[str, Any],
) -> Tensor:
    """(U, K) weights softmax(a) after `few_shot_epochs` of AdamW, without decay, on batches of each user's own choices.

    The start and the order of the choices are drawn from the seed and the user's id; users share nothing, so that a batch of
    users gives what a loop over them gives. A user whose choices of this epoch are used up waits for the others.

    Args:
        losses: (U, K) weights and (U, b) places -> (U, b) losses. weight: (U, n), 0 where there is no choice.
    """
    epochs, size, seed = plan["few_shot_epochs"], plan["batch"], plan["seed"]
    n_users, n = weight.shape
    counts = (weight > 0).sum(1)
    noise = weight.new_full((n_users, epochs, n), torch.inf)
    for row, (user, count) in enumerate(zip(users, counts.tolist(), strict=True)):
        if count:
            noise[row, :, weight[row] > 0] = normal_for(f"{user}:order", seed, epochs * count).view(epochs, count).to(weight)
    logits = torch.stack([normal_for(user, seed, k) for user in users]).to(weight) if users else weight.new_zeros(0, k)
    first, second, taken = torch.zeros_like(logits), torch.zeros_like(logits), weight.new_zeros(n_users, 1)
    for epoch in range(epochs):
        order = noise[:, epoch].argsort(dim=1, stable=True)
        for start in range(0, n, size):
            columns = order[:, start : start + size]
            mine = weight.gather(1, columns)
            with torch.enable_grad():
                a = logits.clone().requires_grad_()
                loss = losses(a.softmax(1), columns) * mine
                mean = loss.sum(1) / (mine > 0).sum(1).clamp(min=1)
                (gradient,) = torch.autograd.grad(mean.sum(), a)
            here = (mine > 0).any(1)[:, None]
            taken = taken + here.to(taken)
            first = torch.where(here, 0.9 * first + 0.1 * gradient, first)
            second = torch.where(here, 0.999 * second + 0.001 * gradient.square(), second)
            length = (second / (1 - 0.999 ** taken.clamp(min=1))).sqrt() + 1e-8
            logits = torch.where(here, logits - rate * first / (1 - 0.9 ** taken.clamp(min=1)) / length, logits)
    return logits.softmax(1)
