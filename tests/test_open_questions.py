"""The open questions: formulas against independent ones and against simulation, their figures, and that their scripts run."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from palate.data.synthetic import synthetic


@pytest.fixture(scope="module")
def scripts(root: Path) -> Iterator[SimpleNamespace]:
    """The scripts, which are run from the repository and not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        from benchmarks import complexity, convergence, drawing, noise, pictures, transfer

        parts = (complexity, convergence, drawing, noise, pictures, transfer)
        yield SimpleNamespace(**{part.__name__.rpartition(".")[2]: part for part in parts})


# -- label noise


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.45])
def test_what_a_flipped_choice_is_worth(scripts: SimpleNamespace, p: float) -> None:
    """Against the Fisher information by its definition, the variance of the score, by finite differences and Monte Carlo."""
    margin = 1.5 * np.random.default_rng(0).standard_normal(200_000)

    def probability(m: np.ndarray, rate: float) -> np.ndarray:
        return (1 - rate) / (1 + np.exp(-m)) + rate / (1 + np.exp(m))

    def information(rate: float) -> float:
        chosen = probability(margin, rate)
        scores = [
            (np.log(f(margin + 1e-5)) - np.log(f(margin - 1e-5))) / 2e-5
            for f in (lambda m: probability(m, rate), lambda m: 1 - probability(m, rate))
        ]
        return float((chosen * scores[0] ** 2 + (1 - chosen) * scores[1] ** 2).mean())

    assert scripts.noise.worth(p, 1.5) == pytest.approx(information(p) / information(0.0), rel=0.01)


def test_limits_of_the_worth(scripts: SimpleNamespace) -> None:
    assert scripts.noise.worth(0.0, 3.0) == pytest.approx(1.0, abs=1e-9)
    assert scripts.noise.worth(0.5, 3.0) == pytest.approx(0.0, abs=1e-9)
    assert scripts.noise.worth(0.2, 1e-3) == pytest.approx(0.36, abs=1e-4)  # (1 - 2p)^2 where margins are small
    assert scripts.noise.worth(0.2, 10.0) < scripts.noise.worth(0.2, 0.5)  # sure choices lose most


def test_forced_priors_differ_in_one_thing(scripts: SimpleNamespace) -> None:
    arms = scripts.noise.prior_arms()
    told = {name: model.options() for name, model in arms.items()}
    first = told.pop("as it is")
    for name, options in told.items():
        changed = {key for key in options if options[key] != first.get(key)}
        assert changed in ({"kappa"}, {"n_bases"}, {"types", "blend"}), name
    assert len({json.dumps(options) for options in told.values()}) == len(told)


# -- sample complexity


def test_information_and_accuracy_by_monte_carlo(scripts: SimpleNamespace) -> None:
    """A user u = (1.2, .9, 0, 0) met by a million choices, and a reward at a cosine of .6 to it."""
    c = scripts.complexity
    rng = np.random.default_rng(1)
    z = math.sqrt(2) * rng.standard_normal((1_000_000, 4))
    u = np.array([1.2, 0.9, 0.0, 0.0])
    p = 1 / (1 + np.exp(-(z @ u)))
    square = float(u @ u)
    for axis in (0, 1, 3):
        simulated = float((p * (1 - p) * z[:, axis] ** 2).mean())
        assert c.information(square, u[axis] ** 2 / square) == pytest.approx(simulated, rel=0.01)
    across = np.array([-0.9, 1.2, 0.0, 0.0]) / 1.5
    guess = 0.6 * u / 1.5 + 0.8 * across
    right = (rng.random(len(z)) < p) == (z @ guess > 0)
    assert c.accuracy(0.6, square) == pytest.approx(float(right.mean()), abs=2e-3)
    assert c.accuracy(0.0, square) == pytest.approx(0.5, abs=1e-9)
    assert c.accuracy(1.0, square) == pytest.approx(float(np.maximum(p, 1 - p).mean()), abs=2e-3)


def test_risk_is_the_trace(scripts: SimpleNamespace) -> None:
    c = scripts.complexity
    posterior = np.linalg.inv(np.eye(5) / 0.3 + 7 * 0.25 * np.eye(5))
    assert c.risk(7, 5, 0.3, 0.25) == pytest.approx(float(np.trace(posterior @ (2 * np.eye(5)))))
    assert c.risk(0, 5, 0.3, 0.25) == pytest.approx(2 * 5 * 0.3)  # nothing known: the spread of the margins
    n = c.crossing(64, 0.3)
    assert c.risk(n, 64, (c.CROWD + c.PERSONAL) / 64, 0.3) == pytest.approx(2 * c.PERSONAL)


def test_the_fixed_point_is_what_happens(scripts: SimpleNamespace) -> None:
    """With 16 weights the posterior mode misses what the fixed point says, and the plain trace says less."""
    c = scripts.complexity
    choices, k = (5, 20, 80), 16
    simulated = np.mean([c.new_users(seed, k, 1 / k, 1.0, choices, 300) for seed in (0, 1)], axis=0)
    for n, value in zip(choices, simulated.tolist(), strict=True):
        fixed = c.evolved(n, k, 1 / k, 1.0)
        assert fixed == pytest.approx(value, rel=0.05)
        assert c.risk(n, k, 1 / k, c.information(2.0, 0.5 / k)) < fixed
    assert c.evolved(0, k, 1 / k, 1.0) == pytest.approx(2.0, rel=1e-6)


def test_lost_directions_are_those_of_principal_components(scripts: SimpleNamespace) -> None:
    """Noisy weights drawn as the formula says, their leading eigenvectors by NumPy."""
    c = scripts.complexity
    dim, k, users, n, info = 20, 2, 2000, 10, 0.3
    rng = np.random.default_rng(5)
    lost = []
    for _ in range(20):
        weights = np.zeros((users, dim))
        weights[:, :k] = rng.standard_normal((users, k)) * (c.PERSONAL / k) ** 0.5
        seen = weights + rng.standard_normal(weights.shape) / (n * info) ** 0.5
        leading = np.linalg.eigh(seen.T @ seen)[1][:, -k:]
        lost.append(1 - float((leading[:k] ** 2).sum()) / k)
    assert c.lost_directions(users, n, dim, k, info) == pytest.approx(np.mean(lost), rel=0.12)
    assert c.lost_directions(3, 1, dim, k, info) == 1 - k / dim  # never worse than a random plane


def test_a_crowd_whose_people_differ_is_fitted_too_short(scripts: SimpleNamespace) -> None:
    """The length that minimises the log loss of one reward for all, on a million choices of users who differ by N(0, 2)."""
    rng = np.random.default_rng(2)
    crowd, own = math.sqrt(2) * rng.standard_normal((2, 1_000_000))
    p = 1 / (1 + np.exp(-(crowd + own)))

    def loss(length: float) -> float:
        return float((p * np.logaddexp(0, -length * crowd) + (1 - p) * np.logaddexp(0, length * crowd)).mean())

    best = minimize_scalar(loss, bounds=(0.3, 1.2), method="bounded")
    assert scripts.complexity.shortened() == pytest.approx(float(best.x), abs=0.02)


def test_more_users_leave_less_lost(scripts: SimpleNamespace) -> None:
    c = scripts.complexity
    few, many = (c.learned(0, users, 20, 10, 2, new=50) for users in (20, 300))
    assert many.lost < 0.2 < few.lost + 0.2
    assert many.lost < few.lost
    assert many.accuracy > few.accuracy
    assert many.excess < few.excess
    assert many.crowd == pytest.approx(c.shortened(), abs=0.08)


# -- convergence


def test_newton_squares_its_error_and_adam_does_not(scripts: SimpleNamespace) -> None:
    steps = (1, 2, 3, 4, 6, 20, 500)
    found = scripts.convergence.gaps(0, steps, 30)
    newton = found["Newton"]
    assert newton[1] < 1e-2 * newton[0]
    assert newton[2] < 1e-3 * newton[1]
    assert newton[4] < 1e-10
    assert abs(found["simplex, interior point"][5]) < 1e-6
    adam = found["simplex, Adam .1"]
    assert adam[0] > adam[4] > adam[5] > adam[6] > -1e-9


def test_evidence_climbs(scripts: SimpleNamespace) -> None:
    climb = scripts.convergence.evidence(0, 12, 80)
    assert climb[0] < -1
    assert all(after > before - 1e-3 for before, after in pairwise(climb))
    assert abs(climb[-1]) < 0.3  # near the evidence of the prior that drew them


# -- transfer


def rows_of(path: Path, topics: int, choices: int) -> Path:
    """Choices in which the longer answer is mostly chosen, on debates with two sides each."""
    made = synthetic(24, choices, seed=3).pairs
    lines = []
    for row in range(len(made)):
        chosen, rejected = made.texts[made.chosen[row]], made.texts[made.rejected[row]]
        prompt = f"topic {row % topics} — side {row % 2}, {row // 2 % 6}"
        user = str(made.user_ids[made.user_index[row]])
        lines.append(json.dumps({"user_id": user, "prompt": prompt, "chosen": chosen.response, "rejected": rejected.response}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rows")
    return rows_of(folder / "convarg.jsonl", 5, 30), rows_of(folder / "prism.jsonl", 7, 14)


def test_topics_and_users_do_not_meet(scripts: SimpleNamespace, two_sets: tuple[Path, Path], tmp_path: Path) -> None:
    t = scripts.transfer
    sets = {"convarg": t.read("convarg", two_sets[0], "style", tmp_path, None)}
    sets["prism"] = t.read("prism", two_sets[1], "style", tmp_path, None)
    assert set(sets["convarg"].topic) == {f"topic {k}" for k in range(5)}
    *across, topics = t.arms(sets, 0)
    for arm in [*across, topics]:
        assert set(arm.support.user_ids) >= set(arm.test.user_ids)
        assert not set(arm.learned_from[t.HERE].user_ids) & set(arm.test.user_ids)
    here, there = (topics.learned_from[name] for name in (t.HERE, t.THERE))
    assert len(here) == len(there)

    def of(data: object) -> set[str]:
        one = sets["convarg"]
        key = {(c, r): topic for c, r, topic in zip(one.pairs.chosen, one.pairs.rejected, one.topic, strict=True)}
        return {key[c, r] for c, r in zip(data.chosen.tolist(), data.rejected.tolist(), strict=True)}  # type: ignore[attr-defined]

    assert of(here) == of(topics.test) == of(topics.support)
    assert not of(there) & of(topics.test)
    assert across[0].learned_from[t.THERE] is not across[1].learned_from[t.THERE]


@pytest.mark.slow
def test_the_transfer_command(
    scripts: SimpleNamespace, two_sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--convarg", str(two_sets[0]), "--prism", str(two_sets[1]), "--tiny", "--methods", "bt", "--out", str(tmp_path)]
    scripts.transfer.main([*given, "--seeds", "1"])
    once = capsys.readouterr().out
    assert once.count("| bt |") == 3
    rows = (tmp_path / "rows" / "transfer.seed0.jsonl").read_bytes()
    scripts.transfer.main([*given, "--seeds", "2"])  # goes on
    assert "Seeds 0, 1." in capsys.readouterr().out
    assert (tmp_path / "rows" / "transfer.seed0.jsonl").read_bytes() == rows
    readable(tmp_path / "transfer.svg", 3)


# -- figures and commands


def readable(path: Path, panels: int) -> None:
    """SVG of a few kilobytes with so many axes and a description."""
    tree = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    ids = [part.get("id") or "" for part in tree.iter()]
    assert sum(name.startswith("axes_") for name in ids) == panels
    assert (tree.findtext("{http://www.w3.org/2000/svg}desc") or "").endswith(".")
    assert path.stat().st_size < 60_000


def test_a_figure_is_the_same_bytes(scripts: SimpleNamespace, tmp_path: Path) -> None:
    d = scripts.drawing
    lines = [
        d.Line("a & b", [1, 10, 100], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8]),
        d.Line("", [1, 100], [1, 2], theory=True),
    ]
    panels = [d.Panel("left", "choices", "accuracy", lines, log="x"), d.Panel("right", "", "y", lines[:1], ticks=("p", "q"))]
    for name in ("one", "two"):
        d.draw(tmp_path / name / "figure.svg", panels, "What & how.")
    first = (tmp_path / "one" / "figure.svg").read_bytes()
    assert first == (tmp_path / "two" / "figure.svg").read_bytes()
    readable(tmp_path / "one" / "figure.svg", 2)
    assert b"a &amp; b" in first
    with pytest.raises(ValueError, match="dimension"):
        d.draw(tmp_path / "three.svg", [d.Panel("", "", "", [d.Line("", [1, 2], [1])])], "Nothing.")


@pytest.mark.slow
def test_the_noise_command(scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one crowd, where flips harm and nobody is to be told apart; a second question is answered from the same cells."""
    given = ["--data", "one-crowd", "--seeds", "1", "--tiny", "--out", str(tmp_path)]
    scripts.noise.main(["--what", "noise", *given])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| bt |")]
    clean, noisy = (float(cell.split()[0]) for cell in table[0].strip("| ").split("|")[1:])
    assert 0.5 < noisy < clean + 0.01
    cells = sorted(path.name for path in (tmp_path / "cells").iterdir())
    scripts.noise.main(["--what", "shots", *given])
    assert "| individual |" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == cells  # nothing was run again
    readable(tmp_path / "noise.svg", 2)
    readable(tmp_path / "shots.svg", 1)


@pytest.mark.slow
def test_the_commands_of_sample_complexity(scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for script in (scripts.complexity, scripts.convergence):
        script.main(["--tiny", "--seeds", "1", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "Own choices equal the crowd" in told
    assert "Largest fall from one round to the next" in told
    for name, panels in {"complexity-users": 2, "complexity-bases": 3, "convergence": 3}.items():
        readable(tmp_path / f"{name}.svg", panels)


@pytest.mark.parametrize("page", ["open-questions.md", "sample-complexity.md"])
def test_pages_have_their_figures(root: Path, page: str) -> None:
    """Every figure of a page is there, and small, and has words under it."""
    paragraphs = (root / "docs" / page).read_text(encoding="utf-8").split("\n\n")
    at = [number for number, text in enumerate(paragraphs) if text.startswith("![")]
    assert at
    for number in at:
        path = root / "docs" / paragraphs[number].partition("](")[2].rstrip(")")
        ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert path.stat().st_size < 60_000
        assert paragraphs[number + 1].endswith(".")
        assert "@@" not in paragraphs[number + 1]


def test_pictures_are_of_the_tables(scripts: SimpleNamespace, tmp_path: Path) -> None:
    """A page by hand, and one number of each kind of the real one."""
    p = scripts.pictures
    rows = ("| K | a | b |", "|---|---:|---:|", "| 2 | **.5** [.4, .6] | +.010 [273] |", "| 4 | 1 | -.25, x |")
    page = "\n".join(["# T", "", "## One", "", *rows, "", "words", "", "## Two", "", "none", ""])
    found = p.tables(page)
    assert found["Two"] == []
    lines = p.series(found["One"][0], ("a", "b"))
    assert [line.y for line in lines] == [[0.5, 1.0], [0.01, -0.25]]
    assert p.labels(found["One"][0], "K") == ["2", "4"]
    with pytest.raises(ValueError, match="no number"):
        p.number("none")
    real = p.tables(p.PAGE.read_text(encoding="utf-8"))
    (panel,) = p.bases(real)
    k = list(panel.ticks).index("64")
    row = next(line for line in p.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| 64 |"))
    assert [line.y[k] for line in panel.lines] == [p.number(cell) for cell in row.strip("| ").split("|")[1:]]
    by_users, by_choices = p.data(real)
    assert [line.y[-1] for line in by_users.lines] == [line.y[-1] for line in by_choices.lines]  # all of both
    p.main(["--out", str(tmp_path)])
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(f"ablation-{name}" for name in p.PICTURES)
