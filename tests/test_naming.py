"""Names of base rewards: planted directions get their own name with its sign, noise gets none, persons get theirs."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import palate
from palate.adaptation import Profile
from palate.data.embeddings import Dense
from palate.data.pairs import Choice, PairSet, Text
from palate.data.synthetic import SyntheticData, synthetic
from palate.encoders.base import Encoder, State, digest
from palate.encoders.offline import MEANINGS, Style
from palate.encoders.saved import save_together
from palate.errors import DataError, MismatchError
from palate.models.base import RewardModel
from palate.naming import NO_DIFFERENCE, NO_NAME, WORDS, name_bases, name_profile
from palate.priors import Prior

AXES = list(MEANINGS)


@pytest.fixture(scope="module")
def world() -> SyntheticData:
    return synthetic(n_users=40, n_choices=20, n_prompts=30, n_responses=8, seed=3)


class Noise(Encoder):
    """Features that depend on the text and on nothing in it."""

    spec = "noise"

    def __init__(self, width: int, seed: int = 0):
        self.width, self.seed = width, seed

    def encode(self, texts: Sequence[Text]) -> Dense:
        keys = [digest({"text": [self.seed, text.prompt_text, text.response]})[:8] for text in texts]
        return Dense(torch.from_numpy(np.stack([np.random.default_rng(int(k, 16)).standard_normal(self.width) for k in keys])))

    def state(self) -> State:
        return {"encoder": self.spec, "width": self.width, "seed": self.seed}


def hierarchical(direction: torch.Tensor, bases: torch.Tensor, prior: Prior | None = None) -> RewardModel:
    k = bases.shape[1]
    prior = Prior.gaussian(torch.eye(k, dtype=bases.dtype)) if prior is None else prior
    numbers = {"direction": direction, "bases": bases, "share": prior.share, "means": prior.means, "factors": prior.factors}
    return palate.Hierarchical(k).like(numbers)


def along(*axes: tuple[str, float]) -> torch.Tensor:
    """(40,) a reward of the style features, with these weights."""
    out = torch.zeros(len(AXES))
    for name, weight in axes:
        out[AXES.index(name)] = weight
    return out


def test_every_statistic_has_two_words_of_its_own() -> None:
    assert set(WORDS) == set(MEANINGS)
    words = [word for both in WORDS.values() for word in both]
    assert len(set(words)) == 2 * len(MEANINGS)


def test_planted_bases_are_named_by_their_axes_with_their_signs(world: SyntheticData) -> None:
    columns = [along(("length", 1)), along(("length", -2)), along(("hedging", -1)), along(("emoji", 1), ("says we", -1))]
    model = hierarchical(along(("commas", 0.5)), torch.stack(columns, dim=1))
    found = name_bases(model, world.pairs, Style())
    assert [name.what for name in found.names] == ["the crowd", "base 1", "base 2", "base 3", "base 4"]
    assert [name.label for name in found.names[:4]] == ["more commas", "longer", "shorter", "less hedged"]
    for name, axis, sign in zip(found.names, ("commas", "length", "length", "hedging"), (1, 1, -1, -1), strict=False):
        first = name.axes[0]
        assert (first.name, first.certain) == (axis, True)
        assert first.correlation == pytest.approx(sign, abs=1e-4)
        assert first.low == pytest.approx(sign, abs=1e-4)
        assert name.explained == pytest.approx(1, abs=1e-4)
        assert name.explained_by[0] == axis
    both = found.names[4]
    deviations = within_prompt(world.pairs)[1]
    parts = deviations[AXES.index("emoji")], deviations[AXES.index("says we")]
    first_words = {"emoji": "more emoji", "says we": "says we less"}
    expected = [first_words[name] for size, name in sorted(zip(parts, first_words, strict=True), reverse=True) if size > 0.1]
    assert both.label.split("; ")[0].split(", ")[0] in expected
    assert all(-1 <= a.low <= a.correlation + 1e-9 and a.correlation - 1e-9 <= a.high <= 1 + 1e-9 for a in both.axes)


def within_prompt(pairs: PairSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Style of the texts in use, less the mean of their prompt; its deviations; the rows. Text by text, as a check."""
    used = sorted(set(pairs.chosen.tolist()) | set(pairs.rejected.tolist()))
    raw = Style().encode([pairs.texts[i] for i in used]).rows(torch.arange(len(used))).double().numpy()
    for prompt in {pairs.texts[i].prompt for i in used}:
        mine = [n for n, i in enumerate(used) if pairs.texts[i].prompt == prompt]
        raw[mine] -= raw[mine].mean(0)
    return raw, raw.std(0), np.asarray(used)


def test_correlations_are_those_of_numpy_within_prompts(world: SyntheticData) -> None:
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((40, 2))).float()
    found = name_bases(hierarchical(torch.zeros(40), base), world.pairs, Style())
    style, deviation, _ = within_prompt(world.pairs)
    rewards = style @ base.double().numpy()
    for k in range(2):
        for axis in found.names[1 + k].axes:
            a = AXES.index(axis.name)
            assert axis.correlation == pytest.approx(np.corrcoef(style[:, a], rewards[:, k])[0, 1], abs=1e-5)
    assert len(found.names[1].axes) == int((deviation > 1e-6).sum()) - 1
    assert "longer than the prompt" not in {axis.name for axis in found.names[1].axes}  # within a prompt it is the length
    assert found.n_texts == len(style)


def test_topics_do_not_count() -> None:
    """The reward knows the prompt's length and nothing else, and within a prompt all responses are alike to it."""
    long, short = "Please say it again. " * 20, "Say it."
    choices = [
        Choice(f"u{n % 7}", f"{'Tell me a very long story' if n % 2 else 'Hi'} {n}?", f"{long} {n} a", f"{short} {n} b")
        for n in range(60)
    ]
    pairs = PairSet.from_choices(choices)
    model = hierarchical(torch.zeros(40), (along(("length", 1)) - along(("longer than the prompt", 1)))[:, None])
    assert name_bases(model, pairs, Style()).names[1].label == NO_DIFFERENCE


def test_noise_gets_no_name_however_many_bases(world: SyntheticData) -> None:
    """One name among eleven directions is due to chance once in twenty models; two such models of six have probability .03."""
    named = 0
    for seed in range(6):
        encoder, rng = Noise(30, seed), np.random.default_rng(seed)
        bases = torch.from_numpy(rng.standard_normal((30, 10)))
        found = name_bases(hierarchical(torch.from_numpy(rng.standard_normal(30)), bases), world.pairs, encoder, seed=seed)
        strongest = max(abs(name.axes[0].correlation) for name in found.names)
        named += any(name.label != NO_NAME for name in found.names)
        assert 0.6 < strongest / found.threshold < 1.2  # the threshold is of the size of what chance does
        assert max(name.explained for name in found.names) < 0.08
    assert named <= 1


def test_one_base_among_noise_is_found(world: SyntheticData) -> None:
    style, noise = Style(), Noise(5)

    class Both(Encoder):
        spec = "both"

        def encode(self, texts: Sequence[Text]) -> Dense:
            rows = torch.arange(len(texts))
            return Dense(torch.cat([style.encode(texts).rows(rows), noise.encode(texts).rows(rows).float()], dim=1))

        def state(self) -> State:
            return {"encoder": self.spec}

    sizes = within_prompt(world.pairs)[1]
    bases = torch.zeros(45, 3)
    bases[40, 0], bases[AXES.index("warmth"), 1], bases[41, 2] = 1, -1, 1
    bases[42, 1] = float(sizes[AXES.index("warmth")])  # as much noise as signal
    found = name_bases(hierarchical(torch.zeros(45), bases), world.pairs, Both())
    assert [name.label.split(", ")[0] for name in found.names] == [NO_DIFFERENCE, NO_NAME, "cooler", NO_NAME]
    assert found.names[2].axes[0].name == "warmth"
    assert 0.4 < found.names[2].explained < 0.6


def test_shares_and_coordinates(world: SyntheticData) -> None:
    """Shares by hand: the prior's second moment times that of the pairs' slopes."""
    bases = torch.stack([along(("length", 1)), along(("hedging", 1))], dim=1)
    prior = Prior.gaussian(torch.diag(torch.tensor([0.5, 3.0])), torch.tensor([1.0, 0.0]))
    found = name_bases(hierarchical(torch.zeros(40), bases, prior), world.pairs, Style())
    data = Style().embed(world.pairs)
    moment = data.differences().project(bases).square().mean(0)
    want = torch.tensor([1.5, 3.0]) * moment
    assert [found.names[1].variance_share, found.names[2].variance_share] == pytest.approx((want / want.sum()).tolist(), rel=1e-4)
    assert "own coordinates" in found.coordinates
    mixed = Prior.gaussian(torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    assert "as they were fitted" in name_bases(hierarchical(torch.zeros(40), bases, mixed), world.pairs, Style()).coordinates


def test_extreme_pairs_are_the_largest_margins_and_each_pair_of_texts_comes_once(world: SyntheticData) -> None:
    base = along(("length", 1), ("warmth", 2))
    found = name_bases(hierarchical(torch.zeros(40), base[:, None]), world.pairs, Style()).names[1]
    data = Style().embed(world.pairs)
    margin = data.differences().project(base[:, None])[:, 0].numpy()
    seen = {(c, r): i for i, (c, r) in reversed(list(enumerate(zip(world.pairs.chosen, world.pairs.rejected, strict=True))))}
    order = sorted(seen.values(), key=lambda row: -margin[row])
    assert found.highest == tuple(order[:3])
    assert found.lowest == tuple(order[::-1][:3])


@pytest.mark.parametrize(
    "unfitted",
    [
        palate.Hierarchical(6, bend=0, types=(), kappa=1.0),
        palate.LoRe(3, steps=60),
        palate.PReF(3, strength=0.1, kappa=1.0),
        palate.MRM.faithful(epochs=2),
        palate.BradleyTerry(1e-4),
    ],
    ids=lambda model: type(model).__name__,
)
def test_every_method_can_be_named(unfitted: RewardModel, world: SyntheticData) -> None:
    model = palate.fit(Style().embed(world.pairs), unfitted)
    found = name_bases(model, world.pairs, Style())
    assert len(found.names) == 1 + model.n_weights
    assert all(name.label for name in found.names)
    assert all((name.variance_share is None) == (model.prior is None) for name in found.names[1:])
    if model.prior is not None:
        assert sum(name.variance_share or 0 for name in found.names) == pytest.approx(1)


def test_a_person_is_named_by_what_sets_them_apart(world: SyntheticData) -> None:
    """The generator's true weights over its own axes: who wants more warmth than the crowd is called warmer."""
    bases = torch.stack([along(("warmth", 1)), along(("length", 1))], dim=1)
    model = hierarchical(along(("hedging", 1)), bases)

    def person(mean: Sequence[float], variance: float) -> Profile:
        return Profile("ada | <b>", torch.tensor(mean), variance * torch.eye(2), 9, True, model.fingerprint())

    sure = name_profile(model, world.pairs, Style(), person([-2.0, 0.0], 1e-4))
    assert sure.names[0].label == "cooler"
    assert sure.names[0].what == "ada | <b>"
    assert "| ada \\| <b> | cooler |" in sure.markdown()
    vague = name_profile(model, world.pairs, Style(), person([-0.3, 0.0], 4.0))
    assert vague.names[0].label == NO_NAME  # the same direction, of which nothing is known
    assert vague.names[0].axes[0].low < 0 < vague.names[0].axes[0].high
    nobody = name_profile(model, world.pairs, Style(), person([0.0, 0.0], 1.0))
    assert nobody.names[0].label == NO_DIFFERENCE


def test_fitted_people_are_named_by_what_they_really_want(world: SyntheticData) -> None:
    """The signs of the certain axes of fitted people are those of their planted rewards, of which the model saw 20 choices."""
    data = Style().embed(world.pairs)
    model = palate.fit(data, palate.Hierarchical(40, bend=0, types=(), kappa=1.0))
    profiles = palate.adapt(model, data)
    style, _, rows = within_prompt(world.pairs)
    right = []
    for user in range(0, 40, 4):
        name = name_profile(model, world.pairs, Style(), profiles[world.pairs.user_ids[user]]).names[0]
        truth = (world.text_axes @ (world.weights[user] - world.weights.mean(0)))[rows]
        truth -= style_means(truth, world.pairs, rows)
        right += [float(style[:, AXES.index(a.name)] @ truth) * a.correlation > 0 for a in name.axes if a.certain]
    assert len(right) >= 10
    assert np.mean(right) > 0.9


def style_means(values: np.ndarray, pairs: PairSet, rows: np.ndarray) -> np.ndarray:
    """Mean of the values over the texts of the same prompt."""
    prompts = np.unique([pairs.texts[i].prompt_text for i in rows], return_inverse=True)[1]
    return np.asarray((np.bincount(prompts, values) / np.bincount(prompts))[prompts])


def test_texts_are_quoted_only_when_asked_and_cannot_break_the_page(world: SyntheticData) -> None:
    found = name_bases(hierarchical(torch.zeros(40), along(("length", 1))[:, None]), world.pairs, Style())
    plain, quoted = found.markdown(), found.markdown(world.pairs)
    responses = [text.response[:30] for text in world.pairs.texts]
    assert not any(response in plain for response in responses)
    assert quoted.startswith(plain)
    assert quoted.count("- pair ") == 6
    assert len(re.findall(r"^\|", plain, flags=re.MULTILINE)) == 4
    row = found.names[1].highest[0]
    longer = " ".join(world.pairs.texts[world.pairs.chosen[row]].response.split())[:40]
    assert f"- pair {row}: rewards “{longer}" in quoted


def test_bases_shows_the_names_at_a_terminal(palate_command: Callable[..., Any], tmp_path: Path) -> None:
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "model"
    palate_command("data", "synthetic", rows, "--users", 8, "--choices", 12)
    pairs, encoder = palate.load_pairs(rows), Style()
    model = palate.fit(encoder.embed(pairs), palate.PReF(2))
    save_together(model, encoder, folder)
    found = name_bases(model, pairs, encoder)
    code, out, err = palate_command("bases", folder, rows)
    assert code == 0, err
    shown = " ".join(re.sub("[┃│]", " ", out).split())
    for name in found.names:
        assert name.what in shown
        assert f"{name.axes[0].name} {name.axes[0].correlation:+.2f}" in shown
        assert name.label.split(",")[0].split(";")[0] in shown
    assert f"over {found.n_texts} responses to {found.n_prompts} prompts" in err
    assert palate_command("card", folder, "--sample", rows)[0] == 0
    assert found.markdown() in (folder / "README.md").read_text()
    code, quoted, err = palate_command("bases", folder, rows, "--quote-texts")
    assert code == 0, err
    assert quoted.startswith(out)
    added = quoted[len(out) :]
    for name in found.names:
        assert all(re.search(rf"│ +{row} +│", added) for row in (*name.highest, *name.lowest))
    best = found.names[0].highest[0]
    sides = (pairs.texts[side[best]].response.split()[0] for side in (pairs.chosen, pairs.rejected))
    assert re.search(rf"│ +{best} +│ {{}} .*│ {{}} ".format(*map(re.escape, sides)), added)  # the one it rewards comes first


def test_same_seed_same_names(world: SyntheticData) -> None:
    model = hierarchical(torch.zeros(40), torch.from_numpy(np.random.default_rng(1).standard_normal((40, 3))).float())
    first, again = (name_bases(model, world.pairs, Style(), seed=4) for _ in range(2))
    assert first == again
    assert name_bases(model, world.pairs, Style(), seed=5).threshold != first.threshold


def test_what_cannot_be_named_is_said(world: SyntheticData) -> None:
    model = hierarchical(torch.zeros(40), along(("length", 1))[:, None])
    with pytest.raises(DataError, match=r"4 responses to 2 prompts with several: 2 comparisons; expected at least 20"):
        name_bases(model, world.pairs[np.asarray([0, 30])], Style())
    with pytest.raises(DataError, match="0 choices; expected pairs"):
        name_bases(model, world.pairs[np.zeros(0, dtype=int)], Style())
    with pytest.raises(DataError, match="is not fitted"):
        name_bases(palate.Hierarchical(), world.pairs, Style())
    with pytest.raises(DataError, match="30 columns"):
        name_bases(model, world.pairs, Noise(30))
    model.encoder = Noise(40).fingerprint
    with pytest.raises(MismatchError, match="fitted on encoder"):
        name_bases(model, world.pairs, Style())
    model.encoder = None
    stranger = Profile("bo", torch.ones(1), None, 1, True, "another model")
    with pytest.raises(MismatchError, match="profiles of model another mode"):
        name_profile(model, world.pairs, Style(), stranger)
