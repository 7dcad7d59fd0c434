"""The factored models' losses as functions of features that are still being learned: what `fit_through` descends.

Every method is a crowd's reward and K base rewards that a user weighs; here the features under them carry a gradient. A step sees
some users and some choices of each, so what a user weighs is found anew from those choices, or remembered in a table.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from palate import likelihood
from palate.errors import DataError
from palate.models import meta
from palate.models.base import RewardModel
from palate.models.factored import BradleyTerry, LoRe
from palate.models.hierarchical import Hierarchical
from palate.models.meta import ExactSolve, GradientSteps, Inner
from palate.models.mrm import MRM
from palate.models.objectives import Mean, Objective
from palate.models.pref import PReF
from palate.solvers import Batch, newton

MARGIN_VARIANCE = 4.0  # of the base rewards at the start, in squared log-odds, as `Hierarchical` supposes
RIDGE = 3e-4  # on direction and bases, features scaled to rows of norm about one
TABLE = GradientSteps(0.5, 5, second_order=False)  # how far a remembered user moves at a visit
MOST_BASES = 8  # where the method leaves the number open, or says only how many are too many


class Visit(NamedTuple):
    """B users with n choices each; a place without a choice has weight 0."""

    differences: Tensor  # (B, n, F), features of the chosen text minus those of the rejected one
    users: Tensor  # (B,) rows of the table
    weight: Tensor  # (B, n)
    tie: Tensor | None  # (B, n)
    support: Tensor  # (B, n) bool: choices to adapt from, where the method asks for others afterwards
    query: Tensor  # (B, n) bool


class Joint(nn.Module):
    """What a method learns on top of F features, and the loss of each user of a visit.

        margin_ij = z_ij . mu + (z_ij . V) w_i,    L_i = mean_j nll(margin_ij),    plus RIDGE / 2 (|mu|^2 + |V|^2)

    | method             | mu      | w_i |
    |--------------------|---------|-----|
    | BradleyTerry       | learned | none |
    | LoRe               | none    | softmax of a row of a table (its equation 10), which a visit moves by `TABLE` |
    | PReF, Hierarchical | learned | argmin over w of sum_j nll(margin_ij) + abs(w)^2 / 2, re-solved at every visit |
    | MRM                | learned, none on the simplex | the inner loop on the support, L_i on the query |

    PReF's L_i holds its penalty on w_i too: then the re-solved weights are where it is least, and the gradient by the features is
    the partial one there (envelope theorem). LoRe's row is a constant to the gradient; MRM's inner loop is differentiated.

    Attributes:
        objective: from the users' losses to one number; only MRM has one that is not the mean.
        table: (U, K) logits of LoRe's users, no parameter; empty for the other methods.
        splits: whether support and query differ.
    """

    table: Tensor

    def __init__(self, model: RewardModel, width: int, n_users: int, *, seed: int):
        super().__init__()
        self.simplex, inner, shared, k = False, None, True, 0
        self.objective: Objective = Mean()
        if isinstance(model, LoRe):
            self.simplex, shared, k = True, False, model.n_bases if isinstance(model.n_bases, int) else MOST_BASES
        elif isinstance(model, PReF):
            k = model.n_bases if isinstance(model.n_bases, int) else MOST_BASES
        elif isinstance(model, Hierarchical):
            k = min(model.n_bases, MOST_BASES)
        elif isinstance(model, MRM):
            self.simplex = bool(model.simplex)
            inner = model.inner or (GradientSteps(0.5, 5) if self.simplex else ExactSolve())
            shared, k = not self.simplex, MOST_BASES if model.n_bases is None else model.n_bases
            self.objective = model.objective
        elif not isinstance(model, BradleyTerry):
            raise DataError(
                f"{type(model).__name__} has no loss that reaches the encoder; expected BradleyTerry, Hierarchical, LoRe, PReF "
                "or MRM, or fit it on frozen features (palate.fit)"
            )
        self.inner: Inner | None = inner if k else None
        self.splits = self.inner is not None
        generator = torch.Generator().manual_seed(seed)
        bases = torch.randn(width, k, generator=generator) * (MARGIN_VARIANCE / 2 / max(1, k)) ** 0.5
        self.direction = nn.Parameter(torch.zeros(width)) if shared else None
        self.bases = nn.Parameter(bases)
        self.start = nn.Parameter(torch.zeros(k)) if self.splits else None
        table = torch.randn(n_users, k, generator=generator) if isinstance(model, LoRe) else torch.zeros(0, k)
        self.register_buffer("table", table)

    def begin_at(self, direction: Tensor) -> None:
        """The crowd's reward (F,) of the features as they are, among mixtures each base around it."""
        with torch.no_grad():
            if self.direction is not None:
                self.direction.copy_(direction)
            else:
                self.bases.add_(direction[:, None])

    def forward(self, visit: Visit) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B,) of the users, whether each was asked anything, and the rows (B, K) of the table after the visit."""
        z, weight = visit.differences, visit.weight
        offset = z.new_zeros(z.shape[:2]) if self.direction is None else z @ self.direction
        batch, rows = Batch(z @ self.bases, offset, weight, visit.tie), self.table.new_zeros(len(z), 0)
        margin, price = offset, offset.new_zeros(len(z))
        if self.inner is not None and self.start is not None:
            weight = weight * visit.query
            numbers = {"start": self.start, "spread": torch.ones_like(self.start)}
            support = batch._replace(weight=batch.weight * visit.support)
            margin = batch.margins(meta.adapted(self.inner, support, numbers, simplex=self.simplex))
        elif self.bases.shape[1]:
            known = batch._replace(slopes=batch.slopes.detach(), offset=batch.offset.detach())
            with torch.no_grad():
                if len(self.table):
                    rows = TABLE.moved(known, self.table[visit.users].to(z), torch.ones_like(z[0, 0, :0]), simplex=True)
                    own = rows.softmax(1)
                else:
                    own = newton(known, tolerance=1e-3)[0]
                    price = own.square().sum(1) / 2
            margin = batch.margins(own)
        total = weight.sum(1)
        losses = ((likelihood.nll(margin, visit.tie) * weight).sum(1) + price) / total.clamp(min=1e-12)
        return losses, total > 0, rows

    def penalty(self) -> Tensor:
        """RIDGE / 2 (|mu|^2 + |V|^2)."""
        squares = self.bases.square().sum()
        return RIDGE / 2 * (squares if self.direction is None else squares + self.direction.square().sum())
