"""Where the fixed preset of PAL starts: the directions in which users pull away from the crowd, and prototypes around them."""

from collections.abc import Sequence

import torch
from scipy.linalg import helmert
from torch import Tensor

from palate.data.pairs import EmbeddedPairs
from palate.models.bilinear import Joint
from palate.models.ideal import Layers

SHARED = 4.0  # what all users have in common weighs so many times more in the choice of directions: it is seen more sharply
WIDER = 1.5  # are the prototypes than the users, so that these are inside


class Prompts:
    """The rows of e(prompt) of every choice, centred and scaled, each distinct one once."""

    def __init__(self, data: EmbeddedPairs, rows: Tensor, scale: Tensor):
        used, self.where = torch.unique(rows, return_inverse=True)
        self.table, self.scale = data.embeddings.take(used), scale
        mean, _ = self.table.column_moments(torch.ones(len(used), device=used.device))
        self.centre = torch.zeros_like(mean)
        for part, dense in self.table.column_blocks():
            if dense:
                self.centre[part] = mean[part]

    def project(self, directions: Tensor, pairs: Tensor) -> Tensor:
        raw = self.scale[:, None] * directions
        return (self.table.project(raw) - self.centre @ raw)[self.where[pairs]]

    def back(self, weights: Tensor, pairs: Tensor) -> Tensor:
        onto = weights.new_zeros(len(self.table), weights.shape[1]).index_add_(0, self.where[pairs], weights)
        return self.scale[:, None] * (self.table.back(onto) - self.centre[:, None] * onto.sum(0))

    def rows(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct prompts of some choices (n, D), and which of them each choice asks."""
        used, where = torch.unique(self.where[pairs], return_inverse=True)
        return (self.table.rows(used) - self.centre) * self.scale, where


def tucker(joint: Joint, prompts: Prompts | None, width: int, seed: int, rounds: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """How users pull away from the crowd: a Tucker decomposition of T_u = sum_j score_uj z_uj (1, x_uj)' / sum_j weight_uj.

    By orthogonal iteration (De Lathauwer, De Moor and Vandewalle 2000) on operators: T (U, D, 1 + D) is never formed. For the
    choice of directions `SHARED` times the users' mean is added to each.

    Returns:
        Directions of the features (D, d), of the prompts (D, g), with columns whose products with the prompts have mean square
        one, and the core (U, d, 1 + g). Without prompts g is 0 and the rest is the singular value decomposition of the score
        gradients.
    Cost: 6 rounds of two passes over the features and two over the prompts.
    """
    generator, user, n_users = torch.Generator().manual_seed(seed), joint.part.user_index, len(joint.part.user_ids)
    d, like = joint.design.shape[1], joint.scores
    total = like.new_zeros(n_users).index_add_(0, user, joint.part.weight)
    score = (joint.scores / total[user])[:, None]
    frame = torch.linalg.qr(torch.randn(d, min(width, d), generator=generator).to(like))[0]
    asked = torch.linalg.qr(torch.randn(d, min(width, d) if prompts is not None else 0, generator=generator).to(like))[0]
    one = like.new_ones(len(user), 1)
    for turn in range(rounds + 1):
        left, right = joint.project(frame), one
        if prompts is not None:
            right = prompts.project(asked, joint.rows)
            size_of = right.square().mean(0).sqrt().clamp(min=1e-12)
            asked, right = asked / size_of, torch.cat([one, right / size_of], dim=1)
        outer = (score * left)[:, :, None] * right[:, None, :]
        core = outer.new_zeros(n_users, *outer.shape[1:]).index_add_(0, user, outer)
        if turn == rounds:
            break
        pulls = core + SHARED * core.mean(0)
        frame = torch.linalg.qr(joint.back(score * torch.einsum("pdg,pg->pd", pulls[user], right)))[0]
        if prompts is not None:
            pulled = torch.einsum("pdg,pd->pg", pulls[user], left)[:, 1:]
            asked = torch.linalg.qr(prompts.back(score * pulled, joint.rows))[0]
    if frame.shape[1] < width:  # fewer features than dimensions
        frame = torch.cat([frame, frame.new_zeros(d, width - frame.shape[1])], dim=1)
        core = torch.cat([core, core.new_zeros(n_users, width - core.shape[1], core.shape[2])], dim=1)
    return frame, asked, core


def simplex_along(points: Tensor, k: int) -> Tensor:
    """(K, C): a simplex around 0 in the K - 1 leading directions of the rows (n, C), `WIDER` times as wide as they are."""
    _, values, axes = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    most = min(k - 1, len(values))
    # A mirrored simplex is another start, and the signs of `axes` hang on the last bit: each points to where it is largest.
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    corners = torch.from_numpy(helmert(k).T[:, :most].copy()).to(points)  # (K, K - 1), rows of one length
    out: Tensor = WIDER * (k / len(points)) ** 0.5 * corners @ (values[:most, None] * (signs * axes)[:most])
    return out


def straight(layers: Layers, linear: Tensor, bias: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """First layer and rest with which `layers` is exactly x . linear + bias (D, d), (1, d).

    With hidden layers that is because gelu(t) - gelu(-t) = t; units beyond 2 d begin along random mixtures and are not heard.
    """
    d = layers.width
    if not layers.hidden:
        return linear.clone(), bias.flatten().clone()
    rest = linear.new_zeros(layers.n_rest)
    mixed = torch.randn(d, layers.first - 2 * d, generator=generator).to(linear) / d**0.5
    entry = torch.cat([linear, -linear, linear @ mixed], dim=1)
    *middle, last = [pair for pair in Layers(layers.hidden, d).unpacked(rest)][1:]
    eye = torch.eye(d).to(linear)
    both = torch.cat([torch.cat([eye, -eye], dim=1), torch.cat([-eye, eye], dim=1)])
    for weight, _ in middle:
        assert weight is not None
        weight[0, : 2 * d, : 2 * d] = both
    assert last[0] is not None
    last[0][0, :d], last[0][0, d : 2 * d] = eye, -eye
    last[1][0] = bias
    return entry, rest


def joined(layers: Layers, rests: Sequence[Tensor]) -> Tensor:
    """The rests of single projectors as that of as many side by side."""
    views = [list(Layers(layers.hidden, layers.width).unpacked(rest)) for rest in rests]
    out = []
    for level in zip(*views, strict=True):
        for kind in range(2):
            parts = [pair[kind] for pair in level]
            out += [part.flatten() for part in parts if part is not None]
    return torch.cat(out)


def folded(layers: Layers, entry: Tensor, rest: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same projectors on raw features."""
    raw = scale[:, None] * entry.detach()
    out = rest.detach().clone()
    out[: raw.shape[1]] -= centre @ raw
    return raw, out


def size(value: Tensor) -> Tensor:
    """Root mean square of what is not zero."""
    kept = value[value != 0]
    return kept.square().mean().sqrt() if len(kept) else value.new_ones(())
