"""Best of n: of several answers, give the one with the highest personal reward. No language model is changed or trained."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palate.adaptation import Profile
from palate.data.embeddings import Dense
from palate.data.pairs import Prompt
from palate.errors import DataError
from palate.models.base import RewardModel
from palate.scoring import Scorer


class Best(NamedTuple):
    """The chosen candidate, its place among the candidates, and every candidate's reward (n,) in natural log-odds."""

    text: str
    place: int
    rewards: Tensor


def best_of_n(scorer: Scorer, prompt: Prompt, candidates: Sequence[str], profile: Profile | None = None) -> Best:
    """The candidate with the highest reward for the user of `profile`, or for the crowd where it is None.

    argmax_y r_u(prompt, y), the choice that PReF evaluates (arXiv 2503.06358, section 5). Of equal rewards the first is chosen.

    Raises:
        DataError: no candidates, or something that is not a text.
        MismatchError: a profile of another model.
    Cost: one encoding of the candidates.
    """
    rewards = scorer.score(prompt, candidates, profile)
    place = int(rewards.argmax())
    return Best(candidates[place], place, rewards)


@torch.no_grad()
def choices(model: RewardModel, table: Tensor, weights: Tensor) -> Tensor:
    """(U, S, M): the place of the best of n candidates for M prompts under weights (U, S, K), S stages of `questions.ask`.

    Args:
        table: (M, n, D) embeddings of the candidates.
        weights: (U, S, K).

    Raises:
        DataError: shapes that disagree, or a model that is not fitted.
    Cost: one projection of the candidates and one product (U S, K) x (K, M n); the rewards take U S M n numbers.
    """
    if table.ndim != 3 or weights.ndim != 3 or weights.shape[2] != model.n_weights or not table.shape[1]:
        raise DataError(
            f"candidates have shape {tuple(table.shape)} and weights {tuple(weights.shape)}; "
            f"expected (prompts, candidates, features) and (users, stages, {model.n_weights})"
        )
    rows = Dense(table.flatten(0, 1))
    model.check(rows)
    offset, slopes = model.design(model.features(rows))
    rewards = offset + weights.to(slopes) @ slopes.T  # (U, S, M n)
    best: Tensor = rewards.reshape(*weights.shape[:2], *table.shape[:2]).argmax(3)
    return best


def win_rate(chosen: Tensor, rewards: Tensor, base: int | Tensor = 0) -> Tensor:
    """(U, S): how often the chosen candidates beat a fixed base response by the true reward, equal rewards counting half.

    Args:
        chosen: (U, S, M) places of the chosen candidates.
        rewards: (U, M, n) true rewards of the candidates.
        base: place of the base response, one for all prompts or (M,).

    Raises:
        DataError: shapes that disagree, or a base that is not among the candidates.
    """
    users, n_prompts, n = rewards.shape
    if chosen.ndim != 3 or chosen.shape[0] != users or chosen.shape[2] != n_prompts:
        raise DataError(f"choices have shape {tuple(chosen.shape)}; expected ({users}, stages, {n_prompts}) as the rewards have")
    place = torch.as_tensor(base, device=rewards.device).expand(n_prompts)
    if bool(((place < 0) | (place >= n)).any()):
        raise DataError(f"base is {base}; expected places from 0 to {n - 1} of the {n} candidates")
    ours = rewards[:, None].expand(-1, chosen.shape[1], -1, -1).gather(3, chosen[..., None])[..., 0]
    theirs = rewards.gather(2, place[None, :, None].expand(users, -1, 1))[:, None, :, 0]
    return ((ours > theirs).to(rewards) + 0.5 * (ours == theirs).to(rewards)).mean(2)
