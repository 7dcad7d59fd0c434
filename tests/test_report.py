"""The report says what the rows say, in words that follow from the interval, and quotes nobody unasked."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import palate
from palate.data.pairs import PairSet
from palate.data.synthetic import Population, synthetic
from palate.errors import DataError, MissingExtraError
from palate.evaluation import Evaluation, compare
from palate.evaluation.facts import Failure, Misprediction, Run
from palate.models.factored import BradleyTerry, LoRe
from palate.report import main_table, write_markdown, write_report, write_results
from palate.report.contents import baseline_of, contents, subject_of
from palate.report.figures import selection_curve

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks nesting, and collects ids, text and everything that a browser would fetch."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def made_up(gain: float, *, seeds: int = 3, users: int = 40, data_set: str = "toy") -> Evaluation:
    """Bradley-Terry, and Hierarchical that is better by `gain` on average."""
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for s in range(seeds):
        for u in range(users):
            base = float(rng.uniform(0.5, 0.7))
            for method, more in (("bt", 0.0), ("hierarchical", gain + 0.1 * float(rng.standard_normal()))):
                for shots in (0, 5, None):
                    accuracy = base + (more if shots is None else 0)
                    rows.append(
                        {
                            "data_set": data_set,
                            "method": method,
                            "seed": s,
                            "shots": shots,
                            "cohort": "unseen",
                            "user": f"user-{u}",
                        }
                        | {
                            "n_support": 8 if shots is None else shots,
                            "n_test": 20,
                            "accuracy": accuracy,
                            "log_loss": 1 - accuracy,
                        }
                        | {"n_parameters": 5, "fit_seconds": 0.5, "adapt_seconds": 0.01, "auc": accuracy, "n_ties": 0}
                    )
    return Evaluation.from_rows(rows)


@pytest.fixture(scope="module")
def pairs() -> PairSet:
    return synthetic(24, 12, population=Population(groups=2), seed=1).pairs


@pytest.fixture(scope="module")
def compared(pairs: PairSet) -> Evaluation:
    pytest.importorskip("regex")
    methods = {"bt": BradleyTerry(0.01), "lore": LoRe(2), "hierarchical": palate.Hierarchical(bend=False)}
    return compare(
        pairs, palate.load_encoder("style"), methods, by="conversation", seeds=2, shots=(0, 3, None), data_set="<demo>"
    )


def test_the_page_is_whole_and_asks_the_network_for_nothing(compared: Evaluation, tmp_path: Path) -> None:
    path = write_report(compared, tmp_path / "new" / "folder", title="Taste & <b>truth</b>", quarantined={"missing_user": 3})
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert {file.name for file in path.parent.iterdir()} == {"report.html", "report.md", "results.jsonl", "results.facts.json"}
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert re.findall(r"@import|url\((?!#)", text) == []
    assert len(page.ids) == len(set(page.ids))  # figures on one page do not share clip paths
    assert "Taste & <b>truth</b>" in page.text
    assert "<demo>" in page.text
    assert page.tags.count("svg") == text.count('role="img" aria-label="') == 5
    assert {"Bradley-Terry", "LoRe", "Hierarchical"} <= set(page.words)
    for said in (
        "Read with care",
        "3 missing user",
        "Leak checks passed",
        "No labelled ties",
        "Luck alone",
        "How much to personalise",
    ):
        assert said in page.text
    assert "Unseen users: 12 in each split. With fewer than 30 users, intervals are rough." in page.text


def test_nobody_is_quoted_or_named_unless_asked(compared: Evaluation, pairs: PairSet, tmp_path: Path) -> None:
    write_report(compared, tmp_path)
    shown = Page((tmp_path / "report.html").read_text()).text + (tmp_path / "report.md").read_text()
    assert not any(user in shown for user in pairs.user_ids)
    assert not any(" ".join(text.response.split())[:40] in shown for text in pairs.texts)
    assert not any(text.response in (tmp_path / "results.facts.json").read_text() for text in pairs.texts)
    write_report(compared, tmp_path, quote_texts=True)
    quoted = Page((tmp_path / "report.html").read_text()).text
    wrong = [m for m in compared.mispredicted if (m.method, m.seed, m.cohort) == ("hierarchical", 0, "unseen")]
    assert wrong
    assert [m.probability for m in wrong] == sorted(m.probability for m in wrong)
    assert all(m.probability < 0.5 and pairs.users[m.row] == m.user for m in wrong)
    for m in wrong:
        assert " ".join(pairs.texts[pairs.chosen[m.row]].response.split()) in quoted
    assert "Probability given to the choice" in (tmp_path / "report.md").read_text()
    write_results(compared, tmp_path)
    with pytest.raises(DataError, match="has no texts"):
        write_report(Evaluation.load(tmp_path / "results.jsonl"), tmp_path, quote_texts=True)


def test_hostile_texts_stay_texts(compared: Evaluation, tmp_path: Path) -> None:
    from dataclasses import replace

    hostile = "</dd><script>alert(1)</script>| a | b\n# head \ud800"
    evil = PairSet.from_choices([palate.Choice("ada", hostile, hostile + "!", "no")])
    found = replace(compared, pairs=evil, mispredicted=(Misprediction("hierarchical", 0, "unseen", "ada", 0, 0.1),))
    page = Page(write_report(found, tmp_path, quote_texts=True).read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "<script>" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("gain", "verdict", "words"),
    [
        (0.1, "helps", "Personalisation helps here. For people the model has never met, Hierarchical predicts"),
        (-0.1, "harms", "Personalisation does harm here."),
        (0.02, "undecided", "Whether personalisation helps here cannot be told from these data."),
        (0.0, "undecided", "Whether personalisation helps here cannot be told from these data."),
    ],
)
def test_the_headline_follows_from_the_interval(gain: float, verdict: str, words: str) -> None:
    found = made_up(gain)
    part = contents(found, "toy", "bt", None)
    assert part.verdict == verdict
    assert part.headline.startswith(words)
    difference = found.difference("hierarchical", "bt")
    assert (
        f"{abs(100 * difference.value):.1f} points {'more' if difference.value >= 0 else 'fewer'} than Bradley-Terry"
        in part.headline
    )
    assert f"predicts {100 * found.interval('hierarchical').value:.1f} % of their choices" in part.headline
    assert "40 users and 3 random splits" in part.second


def test_the_table_has_the_figures_of_the_summary() -> None:
    found = made_up(0.1)
    rows = {(row["method"], row["shots"]): row for row in found.summary()}
    (bt, mine) = contents(found, "toy", "bt", None).tables[0].rows
    assert bt[:4] == (
        "Bradley-Terry",
        f"{100 * rows['bt', None]['accuracy']:.1f} %",
        "\N{EN DASH}",
        f"{100 * rows['bt', None]['worst_10']:.1f} %",
    )
    gain = found.difference("hierarchical", "bt", metric="worst_decile")
    assert mine[4] == f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]".replace("-", "\N{MINUS SIGN}")
    few = contents(found, "toy", "bt", None).tables[1]
    assert few.columns == ("Choices", "0", "5", "all")
    assert "All: 8 on average" in few.caption


def test_a_table_for_a_terminal() -> None:
    bt, mine = main_table(made_up(0.1))
    assert list(bt) == list(mine) == [*("method", "unseen", "worst decile", "accuracy vs bt", "worst decile vs bt")]
    assert (bt["method"], bt["accuracy vs bt"]) == ("bt", "\N{EN DASH}")
    assert re.fullmatch(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]", mine["accuracy vs bt"])
    both = Evaluation.concat([made_up(0.1), made_up(0.0, data_set="other")])
    assert [row["data set"] for row in main_table(both)] == ["toy", "toy", "other", "other"]


def test_several_data_sets_get_a_section_each(tmp_path: Path) -> None:
    both = Evaluation.concat([made_up(0.1), made_up(-0.1, data_set="other")])
    page = Page(write_report(both, tmp_path).read_text())
    assert page.text.count("Read with care") == 2
    assert "helps here" in page.text
    assert "does harm here" in page.text
    assert len(page.ids) == len(set(page.ids))


def test_failures_and_single_methods_are_said(tmp_path: Path) -> None:
    from dataclasses import replace

    alone = made_up(0.1).where(method="bt")
    failed = replace(alone, failures=tuple(Failure("toy", "hierarchical", s, "fit", "no luck") for s in (0, 2)))
    part = contents(failed, "toy", "bt", {})
    assert part.failures == ("Hierarchical failed (fit, seeds 0, 2): no luck",)
    assert part.verdict == "alone"
    assert "No bad rows." in part.caveats
    text = write_report(failed, tmp_path).read_text()
    assert "Hierarchical failed (fit, seeds 0, 2): no luck" in Page(text).text
    assert "no luck" in (tmp_path / "report.md").read_text()


def test_what_is_compared_with_what() -> None:
    def runs(**kinds: str) -> Evaluation:
        from dataclasses import replace

        base = made_up(0.1, users=3)
        methods = {"bt": "x", "hierarchical": "y"}
        columns = {**base.columns, "method": np.asarray([methods[m] for m in base.columns["method"]], dtype=object)}
        facts = tuple(Run("toy", name, 0, kind, int(kind != "BradleyTerry"), 1, None, {}) for name, kind in kinds.items())
        return replace(base, columns=columns, runs=facts)

    assert baseline_of(runs(x="LoRe", y="BradleyTerry"), None) == "y"
    assert baseline_of(runs(), None) == "x"
    assert baseline_of(runs(), "y") == "y"
    assert subject_of(runs(x="Hierarchical", y="LoRe"), "y") == "x"
    assert subject_of(runs(), "y") == "x"
    with pytest.raises(DataError, match="baseline is 'z'; expected one of x, y"):
        baseline_of(runs(), "z")
    with pytest.raises(DataError, match="no rows"):
        write_report(Evaluation.from_rows([]), Path("nowhere"))


def test_the_selection_curve_is_read_from_the_record_or_not_at_all() -> None:
    curve = [{"kappa": 0.0, "error": 0.7}, {"kappa": 1.0, "error": 0.6}, {"kappa": 1.0, "error": 0.5}]
    record = {"selection": {"population": {"curve": curve, "chosen": {"kappa": 1.0}}}}
    assert selection_curve(record) == ({0.0: 0.7, 1.0: 0.5}, 1.0)
    for other in ({}, {"selection": {"ridge": 1}}, {"selection": [1]}, {"selection": {"population": {"curve": curve[:1]}}}):
        assert selection_curve(other) is None


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_extra_the_rows_and_the_markdown_are_written(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'palate\[report\]' .*report.html was not written"):
        write_report(made_up(0.1), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "results.jsonl", "results.facts.json"}
    assert write_markdown(made_up(0.1), tmp_path / "more").read_text() == (tmp_path / "report.md").read_text()


def test_same_evaluation_same_bytes(tmp_path: Path) -> None:
    first = write_report(made_up(0.1), tmp_path / "a").read_bytes()
    assert write_report(made_up(0.1), tmp_path / "b").read_bytes() == first
