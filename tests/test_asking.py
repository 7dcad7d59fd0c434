"""`palate ask`: a person who answers by a rule, at the other end of a pipe; what is written down, when it ends, what is shown."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import palate
from palate.encoders.offline import Style
from palate.encoders.saved import save_together

PROMPT = "How do I boil an egg?"
RESPONSES = [
    "Seven minutes.",
    "Great question! I am so glad you asked, and I would love to walk you through it!",
    "It depends, perhaps, on the egg and maybe on the pot.",
    "First boil the water. Then put the egg in. After seven minutes it is done.",
    "# Eggs\n\n- boil water\n- add the egg\n- wait",
]


def eight() -> list[palate.Text]:
    """Generated responses to one prompt."""
    pairs = palate.synthetic(n_users=20, n_choices=16, seed=0).pairs
    prompt = max(pairs.texts, key=lambda text: sum(other.prompt == text.prompt for other in pairs.texts)).prompt
    return [text for text in pairs.texts if text.prompt == prompt][:8]


class Asked(NamedTuple):
    first: str
    second: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of generated people, with its encoder."""
    out, encoder = tmp_path_factory.mktemp("asked") / "model", Style()
    data = encoder.embed(palate.synthetic(n_users=20, n_choices=16, seed=0).pairs)
    save_together(palate.fit(data, palate.PReF(3)), encoder, out)
    return out


@pytest.fixture
def file(tmp_path: Path) -> Path:
    out = tmp_path / "responses.jsonl"
    out.write_text("".join(json.dumps(response) + "\n" for response in RESPONSES))
    return out


QUESTION = re.compile(r"\n\d+\. (.*?)\n\n  1: (.*?)\n\n  2: (.*?)\n\n1 or 2, ", flags=re.DOTALL)


def questions(notes: str) -> list[Asked]:
    """The questions that stand in what a person has read."""
    return [Asked(first, second) for _, first, second in QUESTION.findall(notes)]


def conversation(arguments: list[object], say: Callable[[int, Asked], str]) -> tuple[int, str, str]:
    """Run `palate ask` in a process of its own, and answer each question as it is asked: exit code, output, notes."""
    command = [sys.executable, "-m", "palate", "ask", *map(str, arguments)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    notes, asked = "", 0
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
        try:
            for line in process.stderr:
                notes += line
                if line.startswith("1 or 2"):
                    asked += 1
                    process.stdin.write(say(asked, questions(notes)[-1]) + "\n")
            out = process.stdout.read()
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()  # it is still waiting for an answer
    return process.returncode, out, notes


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_somebody_is_asked_until_the_best_is_settled(folder: Path, tmp_path: Path, palate_command: Callable[..., Any]) -> None:
    fitted, encoder, out = palate.load_model(folder), Style(), tmp_path / "answers.jsonl"
    texts = eight()
    prompt, responses = texts[0].prompt_text, [text.response for text in texts]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(response) + "\n" for response in responses))
    prior = fitted.prior
    assert prior is not None
    drawn = prior.mean + prior.factors[0] @ torch.randn(3, generator=torch.Generator().manual_seed(4))
    person = palate.Profile("zoe", drawn, None, 0, True, fitted.fingerprint())
    truth = dict(zip(responses, palate.Scorer(encoder, fitted).score(prompt, responses, person).tolist(), strict=True))

    def say(number: int, asked: Asked) -> str:
        return "perhaps" if number == 2 else "?" if number == 3 else "1" if truth[asked.first] > truth[asked.second] else "2"

    options = ["--prompt", prompt, "--user", "zoe", "--out", out, "--error", 0.2]
    code, shown, notes = conversation([folder, tmp_path / "responses.jsonl", *options], say)
    assert code == 0, notes
    assert notes.count("'perhaps' is no answer") == 1
    seen = questions(notes)
    assert len({frozenset(asked) for asked in seen}) == len(seen)  # also what could not be said is not asked again
    made = rows_of(out)
    answered = [asked for number, asked in enumerate(seen) if number != 1]
    assert [frozenset((row["chosen"], row["rejected"])) for row in made] == [frozenset(asked) for asked in answered]
    assert all(truth[row["chosen"]] > truth[row["rejected"]] for row in made)
    assert {(row["user_id"], row["prompt"]) for row in made} == {("zoe", prompt)}
    assert {row["chosen"] == asked.first for row, asked in zip(made, answered, strict=True)} == {True, False}
    assert palate_command("validate", out)[0] == 0
    # what `adapt` makes of the rows is what was shown
    profile = palate.adapt(fitted, encoder.embed(palate.load_pairs(out)))["zoe"]
    rewards = palate.Scorer(encoder, fitted).score(prompt, responses, profile).tolist()
    figures = [float(n) for n in re.findall(r"│ +\d │ +(-?\d+\.\d{3}) │", shown)]
    assert figures == pytest.approx(sorted(rewards, reverse=True), abs=2e-3)
    best = re.search(r"│ (.*?) +│ +1 │", shown)
    assert best is not None
    assert responses[rewards.index(max(rewards))].startswith(best[1])
    assert len(seen) < len(responses) * (len(responses) - 1) / 2
    assert "the best is settled but for a probability of 0.2; " in notes
    wrong = re.search(r"another one is the best with a probability of (\d\.\d\d)", notes)
    assert wrong is not None
    assert float(wrong[1]) <= 0.2


def test_what_was_answered_before_is_known(folder: Path, file: Path, tmp_path: Path, palate_command: Callable[..., Any]) -> None:
    out = tmp_path / "answers.jsonl"
    with file.open("a") as more:
        more.write(json.dumps(RESPONSES[0] + " ") + "\n")  # the same response again
    out.write_text(json.dumps({"user_id": "bo", "prompt": PROMPT, "chosen": RESPONSES[0], "rejected": RESPONSES[1]}))  # no end
    options = ["ask", folder, file, "--prompt", PROMPT, "--user", "zoe", "--out", out, "--error", 0]
    code, _, notes = palate_command(*options, "--most", 3, stdin="1\n2\n1\n")
    assert (code, len(rows_of(out))) == (0, 4), notes
    assert "3 questions were asked" in notes
    first = questions(notes)
    code, _, notes = palate_command(*options, stdin="2\n1\n2\nq\n1\n")
    assert (code, len(rows_of(out))) == (0, 7), notes
    assert "zoe has made 3 choices" in notes
    assert "stopped; 6 choices of zoe are known" in notes
    assert (len(first), len(questions(notes))) == (3, 4)
    assert not {frozenset(asked) for asked in first} & {frozenset(asked) for asked in questions(notes)}
    code, shown, notes = palate_command(*options, stdin="1\n" * 9)
    assert (code, len(rows_of(out)), shown.count("Seven minutes.")) == (0, 11, 1)  # all ten pairs of five, and bo's
    assert "nothing is left to ask; 10 choices of zoe are known" in notes
    assert palate_command("validate", out)[0] == 0


def test_pairs_of_a_file_can_be_asked_too(folder: Path, tmp_path: Path, palate_command: Callable[..., Any]) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    palate_command("data", "synthetic", rows, "--users", 4, "--choices", 4)
    options = ["--user", "zoe", "--out", out, "--error", 0]
    code, shown, err = palate_command("ask", folder, rows, *options, stdin="1\n2\n1\n")  # and then the input ends
    assert code == 0, err
    assert "stopped; 3 choices of zoe are known" in err
    pairs = palate.load_pairs(rows)
    known = {frozenset((pairs.texts[a], pairs.texts[b])) for a, b in zip(pairs.chosen, pairs.rejected, strict=True)}
    mine = palate.load_pairs(out)
    assert {frozenset((mine.texts[a], mine.texts[b])) for a, b in zip(mine.chosen, mine.rejected, strict=True)} <= known
    n_prompts = len({text.prompt for text in pairs.texts})
    assert shown.count("Better than the next") == min(n_prompts, 10)
    code, shown, err = palate_command("ask", folder, rows, *options, "--error", 1)
    assert (code, len(rows_of(out))) == (0, 3)  # no answer can change more than that
    assert "the best is settled" in err


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"--out": "answers.csv"}, "expected a file whose name ends in .jsonl"),
        ({"--until": "worst"}, "--until is 'worst'; expected one of best, order"),
        ({"--user": " "}, "an answer would be a bad row: user_id"),
        ({"FILE": "one.jsonl"}, "has one response; expected at least two"),
        ({"FILE": "-"}, "cannot come from standard input"),
        ({"FILE": "empty.jsonl"}, "an answer would be a bad row"),
        ({"MODEL": "crowd"}, "has no personal weights, so everybody gets the crowd's ranking"),
        ({"MODEL": "flat"}, "needs a covariance of the weights, and this method has none"),
    ],
)
def test_what_cannot_be_asked(
    changed: dict[str, str],
    reason: str,
    folder: Path,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    palate_command: Callable[..., Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.jsonl").write_text('"Yes."\n"Yes."\n')
    Path("empty.jsonl").write_text('"Yes."\n" "\n')
    if "MODEL" in changed:
        encoder = Style()
        data = encoder.embed(palate.synthetic(n_users=8, n_choices=8, seed=0).pairs)
        save_together(
            palate.fit(data, palate.BradleyTerry() if changed["MODEL"] == "crowd" else palate.LoRe(2)),
            encoder,
            Path(changed["MODEL"]),
        )
    given = {"MODEL": folder, "FILE": file, "--prompt": PROMPT, "--user": "zoe", "--out": "answers.jsonl"} | changed
    words = [word for name, value in given.items() for word in ((value,) if name.isupper() else (name, value))]
    code, out, err = palate_command("ask", *words, stdin="1\n")
    assert (code, out, err.count("\n"), Path("answers.jsonl").exists()) == (2, "", 1, False), err
    assert reason in err
