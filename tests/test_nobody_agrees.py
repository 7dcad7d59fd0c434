"""`Hierarchical` where the crowd's reward tells nobody's choices: it is left out, and a user is known by their own."""

import numpy as np
import pytest
import torch

from palate import BradleyTerry, Hierarchical, IndividualBT, adapt, evaluate, fit
from palate.carrying import carry
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.models.base import RewardModel
from palate.terminal import what_was_found

WIDTH, N_USERS, N_TEST = 16, 60, 60


def choices(rewards: torch.Tensor, n: int, seed: int, *, name: str = "u", even: bool = False) -> EmbeddedPairs:
    """`n` logistic choices of each user of rewards (U, D), of the features or, where `even`, of their squares."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2 * n * len(rewards), WIDTH, generator=generator)
    user = torch.arange(len(rewards)).repeat_interleave(n)
    left = torch.arange(0, 2 * len(user), 2)
    seen = table.square() if even else table
    margin = ((seen[left] - seen[left + 1]) * rewards[user]).sum(1)
    wins = torch.rand(len(user), generator=generator) < torch.sigmoid(margin)
    chosen, rejected = torch.where(wins, left, left + 1), torch.where(wins, left + 1, left)
    return EmbeddedPairs(Dense(table), chosen, rejected, [f"{name}{u:02d}" for u in user.tolist()])


def tastes(seed: int, n_users: int = N_USERS, *, common: float = 0.0) -> torch.Tensor:
    """(U, D) rewards that point anywhere, beside `common` of the first axis."""
    out = torch.randn(n_users, WIDTH, generator=torch.Generator().manual_seed(1000 + seed))
    out[:, 0] += common
    return out


def accuracy(model: RewardModel, seed: int, shots: int) -> float:
    """On 100 new users after so many choices."""
    rewards = tastes(seed + 500, 100)
    support, test = choices(rewards, shots, seed + 1, name="v"), choices(rewards, N_TEST, seed + 2, name="v")
    return float(np.mean(evaluate(model, support, test).columns["accuracy"]))


@pytest.mark.parametrize("shots", [3, 5])
def test_where_nobody_agrees_nobody_is_judged_by_the_crowd(shots: int) -> None:
    left_out, gained, behind = 0, [], []
    for seed in range(3):
        data = choices(tastes(seed), shots, seed)
        model = fit(data, Hierarchical(), seed=seed)
        gain = model.record["selection"]["ridge"]["gain"]
        left_out += not model.direction.any()
        assert gain["mean"] <= gain["error"] or model.direction.any()
        if gain["mean"] <= 0:
            assert not model.direction.any()
            assert "no reward in common" in what_was_found(model)
        gained.append(accuracy(model, seed, shots) - accuracy(fit(data, BradleyTerry()), seed, shots))
        behind.append(accuracy(fit(data, IndividualBT()), seed, shots) - accuracy(model, seed, shots))
    assert left_out >= 2
    assert np.mean(gained) > 0.05
    assert np.mean(behind) < 0.01


def test_where_the_crowd_is_in_doubt_held_out_users_say() -> None:
    doubtful = 0
    seen: list[float] = []
    for seed in (2, 3, 7):
        seen.clear()
        data = choices(tastes(seed, 40, common=1.3), 3, seed)
        model = fit(data, Hierarchical(types=(), bend=0), seed=seed, progress=lambda share, what: seen.append(share))
        assert seen == sorted(seen)
        told = model.record["selection"]["ridge"]
        assert ("errors" in told) == (0 < told["gain"]["mean"] <= told["gain"]["error"])
        if "errors" in told:
            assert bool(model.direction.any()) == (told["errors"]["crowd"] <= told["errors"]["nothing"])
            doubtful += 1
    assert doubtful > 1  # or nothing is shown


def test_a_crowd_that_agrees_stays() -> None:
    model = fit(choices(tastes(0, common=4.0), 10, 0), Hierarchical(), seed=0)
    told = model.record["selection"]["ridge"]["gain"]
    assert told["mean"] > 5 * told["error"] > 0
    assert model.direction.any()
    assert "in common" not in what_was_found(model)


@pytest.mark.parametrize("options", [{"n_bases": 0}, {"kappa": 0.0}, {"kappa": 1.0}])
def test_what_is_told_not_to_look_keeps_the_crowd(options: dict[str, float]) -> None:
    data = choices(tastes(0), 3, 0)
    assert not fit(data, Hierarchical(), seed=0).direction.any()
    model, crowd = fit(data, Hierarchical(**options), seed=0), fit(data, BradleyTerry(), seed=0)
    torch.testing.assert_close(model.direction, crowd.direction)


def test_an_agreement_that_no_straight_reward_shows_is_found_where_it_bends() -> None:
    rewards = torch.zeros(N_USERS, WIDTH)
    rewards[:, :2] = 1.5  # everybody wants the same two features far from their means, to either side
    model = fit(choices(rewards, 40, 0, even=True), Hierarchical(), seed=0)
    assert model.record["selection"]["ridge"]["gain"]["mean"] < 0.01
    assert model.record["selection"]["bend"]["chosen"]
    support, test = (choices(rewards, n, 1 + n, name="v", even=True) for n in (2, 40))
    assert np.mean(evaluate(model, support, test).columns["accuracy"]) > 0.6


def test_a_crowd_in_doubt_stays_where_nobody_can_be_asked() -> None:
    wholly = torch.zeros(20, WIDTH)
    wholly[:, :4] = 1.0
    doubtful = 0
    for seed in range(4):
        model = fit(choices(wholly, 1, seed), Hierarchical(), seed=seed)  # one choice each: nothing to adapt from and be asked of
        told = model.record["selection"]["ridge"]["gain"]
        assert bool(model.direction.any()) == (told["mean"] > 0)
        doubtful += 0 < told["mean"] <= told["error"]
    assert doubtful


def test_ties_of_many_features_agree_on_nothing_and_are_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    table, n = torch.randn(72, 160, generator=generator), 36
    tie = torch.ones(n, dtype=torch.bool)
    tie[0] = False
    data = EmbeddedPairs(Dense(table), torch.arange(n), torch.arange(n, 2 * n), [f"u{i // 3:02d}" for i in range(n)], tie=tie)
    model = fit(data, Hierarchical(bend=0), seed=0)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_a_profile_goes_on_when_a_crowd_is_found() -> None:
    few = choices(tastes(0)[:, :8].repeat(1, 2), 4, 0)
    old = fit(few, Hierarchical(bend=0), seed=0)
    new = fit(choices(tastes(1, common=4.0), 12, 1), Hierarchical(bend=0, kappa=1.0), seed=0)
    assert not old.direction.any()
    assert new.direction.any()
    profiles = adapt(old, few)
    carried, anew = carry(profiles, old, new), adapt(new, few)
    for user in ("u00", "u17", "u59"):
        rewards = [new(few.embeddings, held[user].mean) for held in (carried, anew)]
        apart = torch.stack([reward[few.chosen] - reward[few.rejected] for reward in rewards])
        assert torch.corrcoef(apart)[0, 1] > 0.9
