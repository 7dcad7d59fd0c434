"""The command line: what it prints and where, exit codes, one line for an error, and the whole way through on files."""

import gzip
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import palate
from palate import doctor, terminal
from palate.data.pairs import Text
from palate.encoders import Items, load_encoder
from palate.errors import DataError, ModelFileError

Run = Callable[..., "tuple[int, str, str]"]
GOOD = {"user_id": "ada", "prompt": "Lunch?", "chosen": "Soup.", "rejected": "Bread."}
BAD = {"user_id": "ada", "prompt": "Lunch?", "chosen": "Rice.", "rejected": "Rice."}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_version_help_and_nothing(palate_command: Run) -> None:
    assert palate_command("--version") == (0, f"palate {palate.__version__}\n", "")
    code, out, err = palate_command("--help")
    assert (code, err) == (0, "")
    for command in ("demo", "validate", "fit", "adapt", "rank", "compare", "train", "bench", "judge", "serve", "forget", "data"):
        assert f" {command} " in out
    assert "personal taste" in palate_command()[1]


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "validate", "fit", "adapt", "rank", "compare", "train", "bench", "judge", "doctor", "data", "data synthetic"),
        *("serve", "keys", "keys add", "export", "forget", "prune", "retire", "ask", "bases"),
    ],
)
def test_every_command_has_help(command: str, palate_command: Run) -> None:
    code, out, _ = palate_command(*command.split(), "--help")
    assert code == 0
    assert "Usage: palate" in out
    assert len(out) > 200


def test_threads_that_wait_do_not_spin_unless_the_caller_wants_it(
    palate_command: Run, monkeypatch: pytest.MonkeyPatch, alone: Callable[[Path], str], tmp_path: Path
) -> None:
    """OpenMP reads the variable when torch is loaded, so it has to be there before."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    palate_command("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    palate_command("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    script = tmp_path / "script.py"
    script.write_text("import sys\nimport palate.cli\nassert 'torch' not in sys.modules\n")
    assert alone(script) == ""


def test_an_unknown_option_is_a_usage_error(palate_command: Run) -> None:
    code, out, err = palate_command("fit", "rows.jsonl", "--encodr", "style")
    assert (code, out) == (2, "")
    assert "--encodr" in err


# validate


def test_validate_good_rows(palate_command: Run, tmp_path: Path) -> None:
    code, out, err = palate_command("validate", write(tmp_path / "rows.jsonl", GOOD, GOOD | {"user_id": "bo"}))
    assert (code, err) == (0, "")
    assert "2 of 2 rows are good" in out


def test_validate_names_bad_rows_and_leaves_with_1(palate_command: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", GOOD, BAD, GOOD | {"user_id": "bo", "mood": "fine"})
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    code, out, err = palate_command("validate", rows, "--good", good, "--quarantine", bad)
    assert code == 1
    assert "2 of 3 rows are good" in out
    assert "line 2" in out
    assert "identical_sides" in out
    assert "mood" in err
    assert [json.loads(line)["user_id"] for line in good.read_text().splitlines()] == ["ada", "bo"]
    assert [json.loads(line)["line"] for line in bad.read_text().splitlines()] == [2]
    assert palate_command("validate", good)[0] == 0
    assert "--quarantine" in palate_command("validate", rows)[2]


def test_validate_shows_as_many_rows_as_asked(palate_command: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", *(BAD | {"prompt": str(i)} for i in range(7)))
    assert palate_command("validate", rows, "--show", 3)[1].count("identical_sides]") == 3


def test_an_unusable_input_is_one_line_and_2(palate_command: Run, tmp_path: Path) -> None:
    code, out, err = palate_command("validate", tmp_path / "nothing.jsonl")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("palate: ")
    assert "does not exist" in err


def test_an_error_of_the_system_is_one_line_too(palate_command: Run, tmp_path: Path) -> None:
    code, _, err = palate_command("validate", write(tmp_path / "rows.jsonl", GOOD), "--good", tmp_path / "no" / "folder.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert "No such file or directory" in err


def test_an_error_of_several_lines_is_said_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, terminal.errors_as_one_line(debug=False):
        raise DataError("no hub (refused\nby the network); give a folder")
    assert (left.value.code, capsys.readouterr().err) == (2, "palate: no hub (refused by the network); give a folder\n")


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from palate.cli import main

    for arguments in (["--debug", "validate", str(tmp_path / "x.jsonl")], ["validate", str(tmp_path / "x.jsonl"), "--debug"]):
        with pytest.raises(DataError, match="does not exist"):
            main(arguments)
    capsys.readouterr()


# data synthetic


def test_synthetic_rows_are_the_generated_ones(palate_command: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code, out, err = palate_command("data", "synthetic", path, "--users", 7, "--choices", 5, "--seed", 3)
    assert (code, out.strip()) == (0, str(path))
    assert "35 choices" in err
    data = palate.synthetic(7, 5, seed=3).pairs
    again = palate.load_pairs(path)
    assert again.user_ids == data.user_ids
    assert [again.texts[i] for i in again.chosen] == [data.texts[i] for i in data.chosen]
    assert [again.texts[i] for i in again.rejected] == [data.texts[i] for i in data.rejected]
    assert again.timestamp.tolist() == data.timestamp.tolist()
    assert again.conversation.tolist() == data.conversation.tolist()
    assert not list(tmp_path.glob("*.partial"))


def test_synthetic_rows_are_the_same_bits_compressed_or_not(palate_command: Run, tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.gz"]
    for path in paths:
        options = ["--users", 6, "--choices", 4, "--groups", 2, "--drift", 0.5, "--contrarians", 0.2, "--noise", 0.1]
        assert palate_command("data", "synthetic", path, *options)[0] == 0
    assert paths[1].read_bytes() == paths[2].read_bytes()
    assert gzip.decompress(paths[1].read_bytes()) == paths[0].read_bytes()


def test_synthetic_refuses_drift_without_groups(palate_command: Run, tmp_path: Path) -> None:
    code, _, err = palate_command("data", "synthetic", tmp_path / "x.jsonl", "--groups", 1, "--drift", 0.5)
    assert code == 2
    assert "drift" in err


# names


def test_names_are_looked_up() -> None:
    assert terminal.shots("0,1, 5,all,1") == (0, 1, 5, None)
    assert terminal.one_of("prompt", terminal.UNITS, "--split-by") == "prompt"


@pytest.mark.parametrize("text", ["", "1,,2", "-1", "two", "1.5", "²"])
def test_shots_that_are_no_numbers(text: str) -> None:
    with pytest.raises(DataError, match="--shots has"):
        terminal.shots(text)


def test_unknown_names() -> None:
    with pytest.raises(DataError, match="--methods is 'mmr'; expected one of hierarchical, bt, lore, lore-faithful"):
        terminal.methods("bt,mmr")
    with pytest.raises(DataError, match="--method is 'mmr'"):
        terminal.method("mmr")
    with pytest.raises(DataError, match="--methods is ' ,'"):
        terminal.methods(" ,")
    with pytest.raises(DataError, match="--split-by is 'user'; expected one of conversation"):
        terminal.one_of("user", terminal.UNITS, "--split-by")


def test_compare_refuses_an_unknown_unit_and_method(palate_command: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", GOOD)
    assert "--split-by is 'user'" in palate_command("compare", rows, "--out", tmp_path / "o", "--split-by", "user")[2]
    assert "--methods is 'mmr'" in palate_command("compare", rows, "--out", tmp_path / "o", "--methods", "mmr")[2]
    assert not (tmp_path / "o").exists()


# candidates


def test_candidates_are_json_strings(tmp_path: Path) -> None:
    path = tmp_path / "candidates.jsonl"
    path.write_text('\ufeff"Two\\nlines"\n\n"Ein Käse"\r\n', encoding="utf-8")
    assert terminal.read_candidates(path) == ["Two\nlines", "Ein Käse"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'"a"\nb\n', r"line 2: 'b' is no JSON string"),
        (b'{"response": "a"}\n', "line 1: .* is no JSON string"),
        (b"\n \n", "has no candidates"),
        (b'"\xff"\n', "is not UTF-8"),
        (b'"\\ud800"\n', "half a character"),
    ],
)
def test_bad_candidates(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "candidates.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        terminal.read_candidates(path)


def test_rank_wants_both_profiles_and_user(palate_command: Run, tmp_path: Path) -> None:
    code, _, err = palate_command("rank", tmp_path, "--prompt", "Lunch?", "--user", "ada")
    assert code == 2
    assert "--profiles and --user belong together" in err


# the encoder beside a model


def test_the_encoder_of_a_model_comes_back_with_its_catalogue(tmp_path: Path) -> None:
    encoder = Items()
    texts = [Text("Lunch?", "Soup."), Text("Lunch?", "Bread."), Text("Lunch?", "Rice.")]
    encoder.encode(texts)
    terminal.save_encoder(encoder, tmp_path)
    again = terminal.saved_encoder(tmp_path)
    assert again.fingerprint == encoder.fingerprint
    assert isinstance(again, Items)
    assert again.encode([texts[2], Text("Lunch?", "Fish.")]).column.tolist() == [2, -1]
    assert [path.name for path in tmp_path.iterdir()] == [terminal.ENCODER_FILE]


def test_a_folder_without_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has no encoder\.json; expected a folder written by `palate fit`"):
        terminal.saved_encoder(tmp_path)
    (tmp_path / terminal.ENCODER_FILE).write_text('{"enco')
    with pytest.raises(ModelFileError, match="is no JSON"):
        terminal.saved_encoder(tmp_path)


# what a person sees


def test_progress_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.progress("Reading [rows]") as advance:
        advance(1, 2, "half")
    assert capsys.readouterr() == ("", "")


def test_progress_is_drawn_on_a_terminal(root: Path) -> None:
    ours, theirs = pty.openpty()
    code = "from palate import terminal\nwith terminal.progress('Reading [rows]') as advance:\n    advance(1, 2, 'half [done]')"
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert "half [done]" in drawn


def test_cells_and_notes_are_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.note("a [red]user[/red] wrote [/this] :smile:")
    terminal.show(terminal.table("", ["user", "n"], [("[bold]x :smile:", 1)]))
    out, err = capsys.readouterr()
    assert err == "a [red]user[/red] wrote [/this] :smile:\n"
    assert "[bold]x :smile:" in out
    terminal.note("\x1b[2Jgone\x07\x9b")
    terminal.show(terminal.table("\x1b[2J", ["user"], [("\x1b[31mred",)]))
    out, err = capsys.readouterr()
    assert err == "\ufffd[2Jgone\ufffd\ufffd\n"
    assert "\ufffd[31mred" in out
    assert "\x1b" not in out + err


# doctor


def test_doctor(palate_command: Run) -> None:
    code, out, err = palate_command("doctor")
    assert (code, err) == (0, "")
    for word in ("palate", "torch threads", "items", "style", "minilm", "works, 2 features"):
        assert word in out


def test_doctor_tells_missing_from_broken(palate_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from palate.errors import MissingExtraError

    def missing(spec: str) -> object:
        raise MissingExtraError("run: pip install 'palate[x]'")

    def broken(spec: str) -> object:
        raise OSError("half a file")

    monkeypatch.setattr("palate.encoders.load_encoder", missing)
    assert doctor.encoder_state("minilm") == ("run: pip install 'palate[x]'", False)
    monkeypatch.setattr("palate.encoders.load_encoder", broken)
    code, out, _ = palate_command("doctor")
    assert code == 1
    assert "broken: half a file" in out


def test_doctor_reads_the_extras_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.13",
        "pyphen>=0.18; extra == 'style'",
        "absent>=1; extra == 'report'",
        "pyphen; extra == 'all'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "absent" else "1.2")
    assert doctor.requirements() == {"": ["torch"], "style": ["pyphen"], "report": ["absent"]}
    assert doctor.extras() == [("style", "pyphen 1.2"), ("report", "missing: pip install 'palate[report]'")]


# the whole way through


@pytest.mark.parametrize("method", ["hierarchical", "bt", "pal-b-faithful", "vpl"])
def test_fit_adapt_rank(method: str, palate_command: Run, tmp_path: Path) -> None:
    rows, model, profiles = tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "profiles"
    palate_command("data", "synthetic", rows, "--users", 24, "--choices", 12)
    code, out, err = palate_command("fit", rows, "--encoder", "style", "--method", method, "--out", model)
    assert (code, out.strip()) == (0, str(model)), err
    code, out, err = palate_command("adapt", model, rows, "--out", profiles)
    assert (code, out.strip()) == (0, str(profiles)), err
    assert "24 profiles from 288 choices" in err
    data = palate.load_pairs(rows)
    user, prompt = data.user_ids[3], data.texts[0].prompt_text
    responses = [text.response for text in data.texts if text.prompt_text == prompt]
    given = "".join(json.dumps(response) + "\n" for response in responses)
    code, out, err = palate_command("rank", model, "--prompt", prompt, "--profiles", profiles, "--user", user, stdin=given)
    ranked = [json.loads(line) for line in out.splitlines()]
    assert code == 0, err
    assert [row["rank"] for row in ranked] == list(range(1, len(responses) + 1))
    assert sorted(row["index"] for row in ranked) == list(range(len(responses)))
    assert all(row["response"] == responses[row["index"]] for row in ranked)
    rewards = [row["reward"] for row in ranked]
    assert rewards == sorted(rewards, reverse=True)
    # the same numbers without the command line
    fitted, encoder = palate.load_model(model), load_encoder("style")
    profile = palate.adapt(fitted, encoder.embed(data, prompts=fitted.reads_prompts))[user]
    expected = palate.Scorer(encoder, fitted).score(prompt, responses, profile)
    assert [row["reward"] for row in sorted(ranked, key=lambda row: row["index"])] == pytest.approx(
        [float(r) for r in expected], abs=1e-4
    )
    code, _, err = palate_command("rank", model, "--prompt", prompt, "--profiles", profiles, "--user", "nobody", stdin=given)
    assert (code, err.count("\n")) == (2, 1)
    assert "nobody" in err
    assert palate_command("rank", model, "--prompt", prompt, stdin=given)[0] == 0


def test_fit_and_adapt_keep_the_good_rows(palate_command: Run, tmp_path: Path) -> None:
    rows, model, profiles = tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "profiles"
    palate_command("data", "synthetic", rows, "--users", 12, "--choices", 6)
    with rows.open("a") as file:
        file.write(json.dumps(BAD) + "\n")
    code, _, err = palate_command("fit", rows, "--method", "bt", "--out", model)
    assert code == 0, err
    assert "1 of 73 rows are bad and were left out" in err
    code, _, err = palate_command("adapt", model, rows, "--out", profiles)
    assert code == 0, err
    assert "1 of 73 rows are bad and were left out" in err
    assert "12 profiles from 72 choices" in err


def test_adapt_replaces_profiles_and_nothing_else(palate_command: Run, tmp_path: Path) -> None:
    rows, model, profiles = tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "profiles"
    palate_command("data", "synthetic", rows, "--users", 8, "--choices", 6)
    palate_command("fit", rows, "--method", "bt", "--out", model)
    before = rows.read_bytes()
    code, _, err = palate_command("adapt", model, rows, "--out", rows)
    assert (code, rows.read_bytes()) == (2, before)
    assert "exists and holds no profiles" in err
    assert palate_command("adapt", model, rows, "--out", rows, "--overwrite")[0] == 2
    assert palate_command("adapt", model, rows, "--out", profiles)[0] == 0
    before = profiles.read_bytes()
    code, _, err = palate_command("adapt", model, rows, "--out", profiles)
    assert (code, err.count("\n"), profiles.read_bytes()) == (2, 1, before)
    assert "--overwrite to replace it" in err
    assert palate_command("adapt", model, rows, "--out", profiles, "--overwrite")[0] == 0


def test_fit_replaces_a_model_only_when_told_to_and_nothing_else_ever(palate_command: Run, tmp_path: Path) -> None:
    rows, model, other = tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "other"
    palate_command("data", "synthetic", rows, "--users", 8, "--choices", 6)
    model.mkdir()
    (model / "README.md").write_text("What I wrote of it.\n")  # a folder that is there is no model yet
    assert palate_command("fit", rows, "--method", "bt", "--out", model)[0] == 0
    before = {path: path.read_bytes() for path in model.iterdir()}
    code, _, err = palate_command("fit", rows, "--method", "lore", "--out", model)
    assert (code, err.count("\n"), {path: path.read_bytes() for path in model.iterdir()}) == (2, 1, before)
    assert f"--out {model} holds a model; give another name, or --overwrite to replace it" in err
    code, _, err = palate_command("fit", rows, "--method", "lore", "--out", model, "--overwrite")
    assert code == 0
    assert "README.md is of what was there before" in err
    assert type(palate.load_model(model)).__name__ == "LoRe"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = palate_command("fit", rows, "--method", "bt", "--out", other, "--overwrite")
    assert (code, err.count("\n"), [path.name for path in other.iterdir()]) == (2, 1, ["config.json"])
    assert "holds no model that can be read" in err
    assert "is a file; expected a folder" in palate_command("fit", rows, "--method", "bt", "--out", rows, "--overwrite")[2]


def test_rows_are_never_replaced_unasked(palate_command: Run, tmp_path: Path) -> None:
    mine, bad = write(tmp_path / "mine.jsonl", GOOD), write(tmp_path / "bad.jsonl", BAD, GOOD)
    before = mine.read_bytes()
    for command in (
        ("data", "synthetic", mine, "--users", 2, "--choices", 2),
        ("data", "prepare", "attributes", "--out", mine),
        ("validate", bad, "--good", mine),
        ("validate", bad, "--quarantine", mine),
    ):
        code, _, err = palate_command(*command)
        assert (code, err.count("\n"), mine.read_bytes()) == (2, 1, before), err
        assert "mine.jsonl exists; give another name, or --overwrite to replace it" in err
    assert palate_command("validate", bad, "--quarantine", mine, "--overwrite")[0] == 1
    assert json.loads(mine.read_text())["line"] == 1


def test_options_that_would_do_nothing_are_refused(palate_command: Run, tmp_path: Path) -> None:
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    palate_command("data", "synthetic", rows, "--users", 8, "--choices", 6)
    code, _, err = palate_command("fit", rows, "--method", "bt", "--epochs", 3, "--out", model)
    assert (code, err.count("\n"), model.exists()) == (2, 1, False)
    assert "give one of these, or leave them out" in err


@pytest.mark.parametrize("command", ["fit", "train"])
def test_rows_are_read_before_an_encoder_is_loaded(command: str, palate_command: Run, tmp_path: Path) -> None:
    code, _, err = palate_command(command, tmp_path / "none.jsonl", "--encoder", "minilmm", "--out", tmp_path / "model")
    assert code == 2
    assert "none.jsonl does not exist" in err


def test_compare_of_votes_needs_no_options(palate_command: Run, tmp_path: Path) -> None:
    votes = [(f"p{i}", [1 if (i + j) % 4 < 2 else -1 for j in range(24)]) for i in range(12)]
    (tmp_path / "comments.csv").write_text("comment-id,comment-body\n" + "".join(f"{j},Statement {j}.\n" for j in range(24)))
    lines = ["participant," + ",".join(map(str, range(24))), *(f"{user}," + ",".join(map(str, row)) for user, row in votes)]
    (tmp_path / "participants-votes.csv").write_text("\n".join(lines) + "\n")
    options = ["--methods", "bt", "--encoder", "items", "--seeds", 1, "--shots", "0,all"]
    code, out, err = palate_command("compare", tmp_path, "--out", tmp_path / "report", *options)
    assert code == 0, err
    assert "choices are split by item" in err
    assert "report.html" in out
    results = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    assert {row["data_set"] for row in results} == {tmp_path.name}
    assert max(row["n_support"] for row in results) <= 40


@pytest.mark.slow
def test_compare_writes_a_report_and_counts_bad_rows(palate_command: Run, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "report"
    palate_command("data", "synthetic", rows, "--users", 24, "--choices", 12)
    with rows.open("a") as file:
        file.write(json.dumps(BAD) + "\n")
    options = ["--methods", "bt,hierarchical", "--seeds", 2, "--shots", "0,2,all", "--split-by", "conversation"]
    code, shown, err = palate_command("compare", rows, "--out", out, *options)
    assert code == 0, err
    assert "1 of 289 rows are bad and were left out" in err
    assert str(out / "report.html") in shown
    assert {path.name for path in out.iterdir()} >= {"report.html", "report.md", "results.jsonl"}
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in results} == {"bt", "hierarchical"}
    assert "identical" in (out / "report.md").read_text()  # why the bad row was left out
    assert {row["seed"] for row in results} == {0, 1}


@pytest.mark.slow
def test_demo(palate_command: Run, tmp_path: Path) -> None:
    options = ["--users", 24, "--choices", 12, "--seeds", 1]
    code, out, err = palate_command("demo", "--out", tmp_path / "demo", *options)
    assert code == 0, err
    assert str(tmp_path / "demo" / "report.html") in out
    for method in ("bt", "lore", "hierarchical"):
        assert method in out


def test_a_method_is_named_once(palate_command: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", GOOD)
    code, _, err = palate_command("compare", rows, "--methods", "bt,bt", "--out", tmp_path / "out")
    assert code == 2
    assert "each method once" in err
