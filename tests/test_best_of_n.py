"""Best of n: the choice, and the win rate counted one prompt at a time."""

import numpy as np
import pytest
import torch

import palate
from palate.alignment.best_of_n import best_of_n, choices, win_rate
from palate.errors import DataError
from palate.models.pref import PReF


def model() -> palate.RewardModel:
    rng = np.random.default_rng(0)
    numbers = {
        "direction": rng.standard_normal(4),
        "bases": rng.standard_normal((4, 2)),
        "mean": np.zeros(2),
        "factor": np.eye(2),
    }
    return PReF().like({name: torch.from_numpy(value).float() for name, value in numbers.items()})


def test_the_best_candidate_is_the_one_that_rank_puts_first() -> None:
    pytest.importorskip("regex")
    pairs = palate.synthetic(n_users=6, n_choices=8, n_prompts=6, seed=2).pairs
    encoder = palate.load_encoder("style")
    data = encoder.embed(pairs)
    fitted = palate.fit(data, PReF(2, strength=0.2, kappa=1.0))
    scorer, profiles = palate.Scorer(encoder, fitted), palate.adapt(fitted, data)
    candidates = ["Seven minutes.", "Great question! Let me walk you through it, step by step!", "It depends, perhaps."]
    for profile in (None, *(profiles[user] for user in pairs.user_ids[:3])):
        found = best_of_n(scorer, "How do I boil an egg?", candidates, profile)
        first = scorer.rank("How do I boil an egg?", candidates, profile)[0]
        assert (found.place, found.text) == (first["corpus_id"], first["text"])
        assert float(found.rewards.max()) == pytest.approx(first["score"])
    with pytest.raises(DataError, match="0 responses to score"):
        best_of_n(scorer, "How?", [])


def test_choices_of_a_batch_are_those_of_each_user_stage_and_prompt() -> None:
    fitted, rng = model(), np.random.default_rng(1)
    table = torch.from_numpy(rng.standard_normal((5, 6, 4))).float()
    weights = torch.from_numpy(rng.standard_normal((3, 2, 2))).float()
    found = choices(fitted, table, weights)
    assert found.shape == (3, 2, 5)
    for u in range(3):
        for s in range(2):
            for m in range(5):
                assert int(found[u, s, m]) == int(fitted(table[m], weights[u, s]).argmax())


def test_win_rate_is_counted_prompt_by_prompt_with_ties_half() -> None:
    rng = np.random.default_rng(2)
    rewards = torch.from_numpy(rng.integers(0, 3, (2, 7, 4)).astype(np.float64))  # few values, so that ties happen
    chosen, base = torch.from_numpy(rng.integers(0, 4, (2, 3, 7))), torch.from_numpy(rng.integers(0, 4, 7))
    found = win_rate(chosen, rewards, base)
    ties = 0
    for u in range(2):
        for s in range(3):
            won = 0.0
            for m in range(7):
                ours, theirs = float(rewards[u, m, chosen[u, s, m]]), float(rewards[u, m, base[m]])
                won += 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
                ties += ours == theirs
            assert float(found[u, s]) == pytest.approx(won / 7)
    assert ties > 3
    torch.testing.assert_close(win_rate(torch.full((2, 1, 7), 3), rewards, 3), torch.full((2, 1), 0.5, dtype=torch.float64))


def test_choosing_by_the_truth_never_loses() -> None:
    rewards = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 30, 5)))
    rate = win_rate(rewards.argmax(2)[:, None], rewards)[:, 0]
    expected = 1 - 0.5 * (rewards.argmax(2) == 0).double().mean(1)  # half where the base response is the best itself
    torch.testing.assert_close(rate, expected)


def test_shapes_that_disagree_are_said() -> None:
    rewards = torch.zeros(2, 7, 4)
    with pytest.raises(DataError, match=r"choices have shape \(2, 3, 6\); expected \(2, stages, 7\)"):
        win_rate(torch.zeros(2, 3, 6, dtype=torch.int64), rewards)
    with pytest.raises(DataError, match="base is 4; expected places from 0 to 3"):
        win_rate(torch.zeros(2, 3, 7, dtype=torch.int64), rewards, 4)
    with pytest.raises(DataError, match=r"candidates have shape \(5, 4\)"):
        choices(model(), torch.zeros(5, 4), torch.zeros(1, 1, 2))
    with pytest.raises(DataError, match="embeddings have 3 columns"):
        choices(model(), torch.zeros(5, 2, 3), torch.zeros(1, 1, 2))
