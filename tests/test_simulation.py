"""Users who mix scorers: every choice against a flat loop, the published arithmetic, and memory that does not multiply."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.data.simulation import BLOCK, Simulation, dirichlet_users, simulate
from palate.errors import DataError

PROMPTS, ANSWERS, SCORERS, WIDTH = 30, 4, 3, 5


def world(seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings and scores whose scorers have very different units, as real reward models do."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((PROMPTS, ANSWERS, SCORERS)) * [1.0, 10.0, 0.1] + [5.0, -3.0, 0.0]
    return torch.from_numpy(rng.standard_normal((PROMPTS * ANSWERS, WIDTH)).astype(np.float32)), scores


def made(seed: int = 0, **options: Any) -> Simulation:
    table, scores = world(seed)
    return simulate(table, scores, seed=seed, **({"n_users": (7, 5), "n_test": 8, "shots": (9, 2), "alpha": 0.5} | options))


def parts(found: Simulation) -> list[tuple[EmbeddedPairs, np.ndarray]]:
    seen, unseen = found.weights_seen, found.weights_unseen
    return [(found.train, seen), (found.test_seen, seen), (found.support, unseen), (found.test_unseen, unseen)]


def rewards(found: Simulation, scores: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """Of every choice, by a loop: reward of the chosen, of the rejected, and of all answers to that prompt."""
    out = []
    for pairs, weights in parts(found):
        for chosen, rejected, user in zip(pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.user_index.tolist(), strict=True):
            assert chosen // ANSWERS == rejected // ANSWERS
            every = np.array([sum(w * s for w, s in zip(weights[user], one, strict=True)) for one in scores[chosen // ANSWERS]])
            out.append((every[chosen % ANSWERS], every[rejected % ANSWERS], every))
    return out


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_the_best_answer_is_chosen_over_the_worst_by_the_users_own_weights(seed: int, standardised: bool) -> None:
    found, scores = made(seed, standardised=standardised), world(seed)[1]
    if standardised:
        learned = scores[:-8].reshape(-1, SCORERS)
        scores = (scores - learned.mean(0)) / learned.std(0)
    for chosen, rejected, every in rewards(found, scores):
        assert chosen == pytest.approx(every.max(), abs=1e-9)
        assert rejected == pytest.approx(every.min(), abs=1e-9)
    assert found.standardised == standardised


def test_everybody_meets_their_own_training_prompts_and_all_test_prompts() -> None:
    found = made()
    assert [len(pairs) for pairs, _ in parts(found)] == [7 * 9, 7 * 8, 5 * 2, 5 * 8]
    assert found.train.user_ids == tuple(f"seen{u}" for u in range(7))
    for (pairs, _), tested in zip(parts(found), (False, True, False, True), strict=True):
        prompt = (pairs.chosen // ANSWERS).numpy()
        assert ((prompt >= PROMPTS - 8) == tested).all()
        for user in range(len(pairs.user_ids)):
            mine = prompt[pairs.user_index.numpy() == user]
            assert len(set(mine.tolist())) == len(mine)
            if tested:
                assert set(mine.tolist()) == set(range(PROMPTS - 8, PROMPTS))
    met = [set((found.train.chosen // ANSWERS)[found.train.user_index == u].tolist()) for u in range(7)]
    assert len({frozenset(one) for one in met}) > 1


def test_standardising_decides_whose_scores_matter() -> None:
    # Even weights: raw, the scorer with ten times the spread is all that counts; standardised, no more than the others.
    scores = world()[1]
    agree = {}
    for standardised in (False, True):
        found = made(alpha=1e6, standardised=standardised, n_test=20, shots=(9, 2))
        loud = scores.reshape(-1, SCORERS)[:, 1]
        agree[standardised] = float(np.mean(loud[found.test_seen.chosen] > loud[found.test_seen.rejected]))
        best = scores[-20:, :, 1].argmax(1)
        same = (found.test_seen.chosen[:20] % ANSWERS).numpy() == best
        assert (same.mean() > 0.9) == (not standardised)
    assert agree[False] > agree[True]


def test_two_random_answers_are_any_two_and_the_better_wins() -> None:
    found, scores = made(two_at_random=True, n_users=(60, 60)), world()[1]
    told = rewards(found, scores)
    assert all(chosen > rejected for chosen, rejected, _ in told)
    assert np.mean([chosen == every.max() and rejected == every.min() for chosen, rejected, every in told]) < 0.5
    place = torch.cat([torch.cat([pairs.chosen, pairs.rejected]) for pairs, _ in parts(found)]) % ANSWERS
    share = torch.bincount(place, minlength=ANSWERS) / len(place)
    assert float((share - 1 / ANSWERS).abs().max()) < 0.03  # the last answer is drawn as often as the others


def test_equal_rewards_are_a_tie_of_two_random_answers_and_no_best_answer() -> None:
    table, scores = world()
    scores[:] = 1.0
    options: dict[str, Any] = {"n_users": (3, 2), "n_test": 8, "shots": (9, 2)}
    assert bool(simulate(table, scores, two_at_random=True, **options).train.tie.all())
    assert not bool(simulate(table, scores, two_at_random=True, temperature=1.0, **options).train.tie.any())
    with pytest.raises(DataError, match=r"user 0 finds all answers to prompt \d+ equally good"):
        simulate(table, scores, **options)


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_people_err_as_often_as_the_temperature_says(temperature: float) -> None:
    found, scores = made(temperature=temperature, n_users=(300, 200), alpha=1.0), world()[1]
    told = rewards(found, scores)
    gain = np.array([abs(chosen - rejected) for chosen, rejected, _ in told])
    wrong = np.array([chosen < rejected for chosen, rejected, _ in told])
    chance = 1 / (1 + np.exp(gain / temperature))
    assert abs(wrong.sum() - chance.sum()) < 4 * np.sqrt((chance * (1 - chance)).sum())
    assert wrong.any()
    assert not any(chosen < rejected for chosen, rejected, _ in rewards(made(temperature=1e-9), scores))  # and no overflow


def test_the_same_seed_gives_the_same_bits_whatever_the_blocks() -> None:
    def prints(seed: int) -> list[str]:
        return [pairs.fingerprint() for pairs, _ in parts(made(seed=seed, n_users=(BLOCK + 3, 2 * BLOCK), temperature=1.0))]

    assert prints(1) == prints(1)
    assert prints(1) != prints(2)
    # A generator is taken as it stands: the first draw is of the weights.
    table, scores = world()
    found = simulate(table, scores, 0.5, np.random.default_rng(4), n_users=(7, 5), n_test=8, shots=(9, 2))
    np.testing.assert_array_equal(found.weights_seen, dirichlet_users(np.random.default_rng(4), 0.5, SCORERS, 12)[:7])


def test_memory_is_texts_and_choices_and_not_their_product() -> None:
    users, prompts, tested, width = 100, 120, 60, 1024
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.standard_normal((prompts * 8, width)).astype(np.float32))
    scores = rng.standard_normal((prompts, 8, 10))
    features = Dense(table)
    tracemalloc.start()
    found = simulate(features, scores, n_users=(users, users), n_test=tested, shots=(45, 9))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    choices = sum(len(pairs) for pairs, _ in parts(found))
    assert choices == users * (45 + 9 + 2 * tested)
    assert found.train.embeddings is found.test_unseen.embeddings is features  # torch's own memory is not traced: rows, no copies
    assert peak < 400 * choices + 8 * BLOCK * prompts * 8 * 3 < users * tested * width * 4  # bytes; the last is one of four sets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0; expected a finite number above 0"),
        ({"temperature": -1.0}, "temperature is -1.0; expected a finite number of at least 0"),
        ({"n_users": (0, 3)}, r"n_users are \(0, 3\); expected at least one seen"),
        ({"n_test": PROMPTS}, f"n_test is {PROMPTS}; expected a number from 1 to {PROMPTS - 1}"),
        ({"shots": (23, 2)}, r"shots are \(23, 2\); expected two numbers between 1 and the 22 training prompts"),
    ],
)
def test_impossible_simulations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(**options)


def test_scores_that_are_none() -> None:
    table, scores = world()
    with pytest.raises(DataError, match="119 embeddings for 30 prompts x 4 answers; expected 120"):
        simulate(table[:-1], scores)
    with pytest.raises(DataError, match=r"scores have shape \(30, 4\); expected \(prompts, answers, scorers\)"):
        simulate(table, scores[..., 0])
    broken = scores.copy()
    broken[3, 1, 2] = np.nan
    with pytest.raises(DataError, match="NaN"):
        simulate(table, broken)
    scores[..., 1] = 4.0
    with pytest.raises(DataError, match="scorer 1 gives every answer the same score"):
        simulate(table, scores, n_users=(3, 2), n_test=8, shots=(9, 2), standardised=True)
