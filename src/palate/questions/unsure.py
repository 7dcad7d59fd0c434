"""What "I can't say" means: a tie, or nothing. The answers decide, by how well what was said before a choice predicts it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palate import likelihood
from palate.errors import DataError
from palate.models.base import RewardModel
from palate.questions.belief import Belief, Pool
from palate.solvers import Batch


@torch.no_grad()
def evidence_of_unsure(
    model: RewardModel,
    pool: Pool,
    rows: Tensor,
    answers: Tensor,
    *,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 1.0),
) -> dict[float, float]:
    """Mean log-likelihood of the next choice, in nats, when every "I can't say" before it counts as a tie of each of `weights`.

    Every choice is predicted, with its uncertainty (`RewardModel.stated`), from what the user said before it (prequential; Dawid
    1984, J. R. Stat. Soc. A 147: 278-292). Not by leaving choices out: what was asked later was chosen because of them. People
    who cannot say because the two are close make a positive weight win, people who cannot read one of them make 0 win: then
    nothing was said, and a tie would be a claim.

    Args:
        model: a fitted model that is linear in its weights.
        pool: the pairs.
        rows: (U, t) the pairs that were asked, in their order.
        answers: (U, t) 1, 0, 1/2, or NaN for "I can't say".
        weights: ties to try, each of at least 0.

    Raises:
        DataError: shapes that disagree, or nothing to tell: no choice after an "I can't say".
    Cost: t batched solves for each weight.
    """
    unsure, strict = torch.isnan(answers), (answers == 0) | (answers == 1)
    if rows.shape != answers.shape or rows.ndim != 2 or pool.n_weights != model.n_weights:
        raise DataError(
            f"rows {tuple(rows.shape)}, answers {tuple(answers.shape)} and {pool.n_weights} weights; "
            f"expected (users, t) twice and {model.n_weights}"
        )
    if not all(0 <= weight < float("inf") for weight in weights):
        raise DataError(f"weights are {list(weights)}; expected finite numbers of at least 0")
    later = strict & (unsure.cumsum(1) > 0)  # choices on which the weight can have any influence
    if not bool(later.any()):
        raise DataError(
            f'{int(unsure.sum())} of {answers.numel()} answers are "I can\'t say", and 0 choices follow one; '
            "expected at least one: there is nothing to tell the weight from"
        )
    users = tuple(str(u) for u in range(len(rows)))
    nothing = Belief.before(model, pool, users)
    total = dict.fromkeys((float(weight) for weight in weights), 0.0)
    for weight in total:
        said = said_of(pool, rows, answers, weight)
        for t in torch.nonzero(later.any(0))[:, 0].tolist():
            before, now = _part(said, slice(t)), _part(said, slice(t, t + 1))
            belief = nothing.after(model, before, users)
            margin = now.margins(belief.mean)
            if belief.covariance is not None:
                margin = model.stated(margin, belief.spread(Pool(now.slopes, now.offset)))
            total[weight] -= float(likelihood.nll(margin)[:, 0][later[:, t]].double().sum())
    return {weight: value / int(later.sum()) for weight, value in total.items()}


def said_of(pool: Pool, rows: Tensor, answers: Tensor, unsure: float) -> Batch:
    """The answers (U, t) to the pairs `rows` (U, t) as a batch; "I can't say" is a tie of weight `unsure`."""
    asked, nothing = pool.at(rows), torch.isnan(answers)
    sign = torch.where(answers < 0.5, -1.0, 1.0).to(pool.slopes)
    tie = nothing | (answers == 0.5)
    weight = torch.where(nothing, unsure, 1.0).to(pool.slopes)
    return Batch(asked.slopes * sign[..., None], asked.offset * sign, weight, tie if bool(tie.any()) else None)


def _part(said: Batch, cut: slice) -> Batch:
    tie = None if said.tie is None else said.tie[:, cut]
    return Batch(said.slopes[:, cut], said.offset[:, cut], said.weight[:, cut], tie)
