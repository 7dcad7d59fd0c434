"""The command line: every command reads files, calls one public function, writes files, and says what it did.

Exit codes: 0 done; 1 done, and bad rows or a broken part were found; 2 not done, with one line that says why.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate import (
    asking_cli,
    bases_cli,
    bench_cli,
    cache_cli,
    data_cli,
    hub_cli,
    judge_cli,
    keys_cli,
    serve_cli,
    split_cli,
    store_cli,
    terminal,
    training_cli,
    tuning_cli,
)
from palate.errors import DataError
from palate.version import __version__

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.encoders import Encoder
    from palate.models.base import RewardModel

app = typer.Typer(
    name="palate", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
app.add_typer(data_cli.app, name="data")
app.add_typer(cache_cli.app, name="cache")
app.add_typer(keys_cli.app, name="keys")

Rows = Annotated[
    Path,
    typer.Argument(
        metavar="ROWS",
        help="Choices: JSON Lines, CSV (either may be .gz) or Parquet with the columns user_id, prompt, chosen, rejected; "
        "or the folder of a Polis export.",
        show_default=False,
    ),
]
Model = hub_cli.AnyModel
EncoderSpec = Annotated[
    str,
    typer.Option(
        "--encoder",
        metavar="SPEC",
        help="How texts become features: 'style' (interpretable statistics), 'items' (one feature per distinct response, for a "
        "fixed catalogue), 'minilm' (a small sentence encoder), 'hf:' or 'st:' and an id on the hub or a folder (a model of "
        "transformers or of sentence-transformers), or several joined: 'minilm+style'. docs/encoders.md lists all of them.",
    ),
]
Seed = data_cli.Seed


def _version(wanted: bool) -> None:
    if wanted:
        terminal.say(f"palate {__version__}")
        raise typer.Exit


@app.callback()
def _palate(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere on the line.")
    ] = False,
) -> None:
    """Reward models with personal taste: from a log of people's choices to what each of them wants.

    Begin with [bold]palate demo[/bold], or, with choices of your own, with [bold]palate validate[/bold] and
    [bold]palate compare[/bold].
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo-report"),
    users: Annotated[int, typer.Option(help="Number of generated users; half of them are held out as unseen.", min=8)] = 200,
    choices: Annotated[int, typer.Option(help="Choices of each user.", min=4)] = 40,
    seeds: Annotated[int, typer.Option(help="Number of random splits.", min=1)] = 3,
    seed: Seed = 0,
) -> None:
    """Compare three methods on generated choices with a planted truth, and write the report. Needs no data and no network."""
    from palate.data.synthetic import synthetic

    with terminal.progress("Writing texts and choosing"):
        data = synthetic(users, choices, noise=0.05, seed=seed)
    best = data.oracle_accuracy()
    terminal.note(f"{data.pairs!r}, generated. The true rewards predict {best:.1%} of the choices, the most that can be reached.")
    models = terminal.methods("bt,lore,hierarchical")
    sides = split_cli.Sides("conversation")
    _compare(data.pairs, cache_cli.encoder("style"), models, out, sides=sides, seeds=seeds, shots="0,1,2,5,10,all")


@app.command()
def validate(
    file: Rows,
    good: Annotated[
        Path | None, typer.Option(metavar="F", help="Write the good rows here, as JSON Lines (.gz is compressed).")
    ] = None,
    quarantine: Annotated[Path | None, typer.Option(metavar="F", help="Write the bad rows here, verbatim, with reasons.")] = None,
    format: Annotated[str | None, typer.Option(help="'jsonl', 'csv', 'parquet' or 'polis'; by default by the name.")] = None,
    show: Annotated[int, typer.Option(help="How many bad rows to show.", min=0)] = 20,
    overwrite: data_cli.Overwrite = False,
) -> None:
    """Check every row, in one pass and whatever the size; nothing is lost.

    Exit code 0: every row is good. 1: some rows are bad, each with its line number and reason. 2: no row can be read.
    """
    from palate.data.validation import validate as check

    for path, option in ((good, "--good"), (quarantine, "--quarantine")):
        if path is not None:
            terminal.free(path, overwrite, option)
    with terminal.progress(f"Reading {file}"):
        report = check(file, good=good, quarantine=quarantine, format=format)
    terminal.say(report.summary(most=show))
    for path, what in ((good, "good"), (quarantine, "bad")):
        if path is not None:
            terminal.note(f"{what} rows: {path}")
    if report.ignored_columns:
        terminal.note(f"columns that nothing reads: {', '.join(sorted(report.ignored_columns))}")
    if not report.ok:
        if quarantine is None:
            terminal.note("To go on with the good rows: palate validate FILE --good good.jsonl --quarantine bad.jsonl")
        raise typer.Exit(1)


@app.command()
def fit(
    rows: Rows,
    out: Annotated[Path, typer.Option(metavar="MODEL", help="Folder of the model.", show_default=False)],
    encoder: EncoderSpec = "style",
    method: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(terminal.METHODS)}.")] = "hierarchical",
    seed: Seed = 0,
    cache: cache_cli.CacheFolder = None,
    no_cache: cache_cli.NoCache = False,
    lora: tuning_cli.Lora = False,
    lora_rank: tuning_cli.Rank = tuning_cli.USUAL.rank,
    hidden: tuning_cli.Hidden = "",
    epochs: tuning_cli.Epochs = tuning_cli.USUAL.epochs,
    rate: tuning_cli.Rate = tuning_cli.USUAL.rate,
    checkpointing: tuning_cli.Checkpointing = False,
    bf16: tuning_cli.Bf16 = False,
    overwrite: data_cli.Overwrite = False,
) -> None:
    """Learn what is shared: the crowd's reward and what people differ about. The model holds no user and no text."""
    from palate.models.reference import bound

    terminal.free_for_model(out, overwrite)
    tuning = tuning_cli.asked(lora, lora_rank, hidden, epochs, rate, checkpointing, bf16)
    model = terminal.method(method)
    pairs, _ = terminal.read_choices(rows)
    features = cache_cli.encoder(encoder, cache, no_cache)
    model = bound(model, features)
    model = tuning_cli.fitted(features, pairs, model, tuning, method=method, out=out, seed=seed)
    terminal.note(f"{method}, fitted on {pairs!r}; {terminal.what_was_found(model)}")
    if (out / hub_cli.CARD).exists():
        terminal.note(f"{out / hub_cli.CARD} is of what was there before; palate card --overwrite writes it anew")
    terminal.say(str(out))


app.command("train")(training_cli.train)
app.command("ask")(asking_cli.ask)
app.command("bases")(bases_cli.bases)
app.command("bench")(bench_cli.bench)
app.command("judge")(judge_cli.judge)
app.command("card")(hub_cli.card)
app.command("push")(hub_cli.push)
app.command("serve")(serve_cli.serve)
app.command("export")(store_cli.export)
app.command("forget")(store_cli.forget)
app.command("prune")(store_cli.prune)
app.command("retire")(store_cli.retire)


@app.command()
def adapt(
    model: Model,
    rows: Rows,
    out: Annotated[
        Path, typer.Option(metavar="PROFILES", help="File of the profiles, one for each user of ROWS.", show_default=False)
    ],
    cache: cache_cli.CacheFolder = None,
    no_cache: cache_cli.NoCache = False,
    overwrite: data_cli.Overwrite = False,
) -> None:
    """Learn what each user of ROWS wants, all in one batched solve. A profile is a few numbers and belongs to this model."""
    from palate.adaptation import adapt as adapt_users
    from palate.models.base import load_model

    terminal.free_for_profiles(out, overwrite)
    fitted = load_model(model)
    pairs, _ = terminal.read_choices(rows)
    features = cache_cli.kept(terminal.saved_encoder(model), cache, no_cache)
    data = cache_cli.embed(features, pairs, prompts=fitted.reads_prompts)
    with terminal.progress(f"Adapting {len(pairs.user_ids)} users"):
        profiles = adapt_users(fitted, data)
    profiles.save(out)
    terminal.note(f"{len(profiles)} profiles from {len(pairs)} choices")
    unfinished = int((~profiles.converged).sum())
    if unfinished and terminal.solves(fitted):
        terminal.note(f"the solver did not reach its tolerance for {unfinished} of them: their profiles are rough")
    terminal.say(str(out))


@app.command()
def rank(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The prompt that the candidates answer.", show_default=False)],
    candidates: Annotated[
        Path,
        typer.Argument(metavar="[CANDIDATES]", help="Responses, one JSON string a line; '-' is standard input.", allow_dash=True),
    ] = Path("-"),
    profiles: Annotated[
        Path | None, typer.Option(metavar="PROFILES", help="A file written by `palate adapt`.", show_default=False)
    ] = None,
    user: Annotated[
        str | None, typer.Option(metavar="ID", help="For whom; without it, the crowd's reward ranks.", show_default=False)
    ] = None,
) -> None:
    """Rank responses for a user, best first: one JSON object a line with rank, index (from 0, as given), reward and response.

    Example: [dim]printf '"Sure!"\\n"No."\\n' | palate rank MODEL --prompt "May I?" --profiles P --user ada[/dim]
    """
    if (user is None) != (profiles is None):
        raise DataError("--profiles and --user belong together; give both, or neither for the crowd's ranking")
    from palate.adaptation import Profiles
    from palate.models.base import load_model
    from palate.scoring import Scorer

    scorer = Scorer(terminal.saved_encoder(model), load_model(model))
    profile = None if profiles is None or user is None else Profiles.load(profiles)[user]
    responses = terminal.read_candidates(candidates)
    rewards = [float(reward) for reward in scorer.score(prompt, responses, profile)]
    best_first = sorted(range(len(responses)), key=lambda i: -rewards[i])
    for place, i in enumerate(best_first, start=1):
        row = {"rank": place, "index": i, "reward": round(rewards[i], 6), "response": responses[i]}
        terminal.say(json.dumps(row, ensure_ascii=False))


@app.command()
def compare(
    rows: Rows,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of report.html, report.md and results.jsonl.", show_default=False)
    ],
    methods: Annotated[
        str, typer.Option(help=f"Which, separated by commas: {', '.join(terminal.METHODS)}.")
    ] = "hierarchical,lore,bt",
    encoder: EncoderSpec = "style",
    seeds: Annotated[int, typer.Option(help="Number of random splits; the worst users want ten.", min=1)] = 3,
    split_by: Annotated[
        str | None,
        typer.Option(
            help=f"What a user's support and test must not share: {', '.join(terminal.UNITS)}. 'item' is for votes. By default "
            "the widest of which users have several."
        ),
    ] = None,
    shots: Annotated[str, typer.Option(help="Numbers of choices from which unseen users are adapted.")] = "0,1,2,5,10,20,all",
    max_support: split_cli.MaxSupport = None,
    max_test: split_cli.MaxTest = None,
    min_support: split_cli.MinSupport = None,
    quote_texts: Annotated[bool, typer.Option("--quote-texts", help="Let the report quote users' texts.")] = False,
    believe_format: Annotated[
        bool, typer.Option("--believe-format", help="Take it for taste, not for a leak, if formatting alone tells the choices.")
    ] = False,
    cache: cache_cli.CacheFolder = None,
    no_cache: cache_cli.NoCache = False,
) -> None:
    """Compare methods on the same splits, with intervals over users, and write a report. The test choices are never fitted on.

    Bad rows are left out, counted in the report, and do not stop it. A `split` column is used as given, or so
    much of it as --max-support and --max-test leave.
    """
    by = None if split_by is None else terminal.one_of(split_by, terminal.UNITS, "--split-by")
    models = terminal.methods(methods)
    pairs, report = terminal.read_choices(rows)
    sides = split_cli.sides(pairs, by, max_support, max_test, min_support)
    if by is None:
        terminal.note(f"choices are split by {sides.by}; --split-by says otherwise")
    _compare(
        pairs,
        cache_cli.encoder(encoder, cache, no_cache),
        models,
        out,
        sides=sides,
        seeds=seeds,
        shots=shots,
        data_set=rows.resolve().name,
        quarantined=report.reasons,
        quote_texts=quote_texts,
        believe_format=believe_format,
    )


def _compare(
    pairs: "PairSet",
    features: "Encoder",
    models: "dict[str, RewardModel]",
    out: Path,
    *,
    sides: split_cli.Sides,
    seeds: int,
    shots: str,
    data_set: str = "",
    quarantined: Mapping[str, int] | None = None,
    quote_texts: bool = False,
    believe_format: bool = False,
) -> None:
    numbers = terminal.shots(shots)
    from palate.evaluation import compare as compare_methods
    from palate.report import write_report

    with terminal.progress(f"Encoding {len(pairs.texts)} texts") as advance, cache_cli.watched(features, advance):
        evaluation = compare_methods(
            pairs,
            features,
            models,
            by=sides.by,
            seeds=seeds,
            shots=numbers,
            max_support=sides.max_support,
            max_test=sides.max_test,
            min_support=sides.min_support,
            believe_format=believe_format,
            data_set=data_set,
            progress=advance,
        )
    cache_cli.say_encoded(features)
    with terminal.progress("Writing the report"):
        write_report(evaluation, out, quarantined=quarantined, quote_texts=quote_texts)
    terminal.show_evaluation(evaluation)
    terminal.say(f"Report: {out / 'report.html'}")


@app.command()
def doctor() -> None:
    """Say what is installed and whether each encoder works here. Exit code 1 where an installed part is broken."""
    from palate import doctor as facts

    terminal.show(terminal.table("Core", ["what", "version"], facts.core()))
    if extras := facts.extras():
        terminal.show(terminal.table("Extras", ["extra", "state"], extras))
    with terminal.progress("Trying the encoders"):
        states = [(spec, *facts.encoder_state(spec)) for spec in facts.ENCODERS]
    terminal.show(terminal.table("Encoders", ["encoder", "state"], [(spec, state) for spec, state, _ in states]))
    if any(broken for _, _, broken in states):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    # Read once, when torch is loaded, which is later. By default threads that wait keep their cores busy, and where other work
    # wants these too a fit takes many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours = given[: given.index("--")] if "--" in given else given
    debug = "--debug" in ours  # people add it to the end of the line that failed
    kept = [part for part in ours if part != "--debug"] + given[len(ours) :]
    with terminal.errors_as_one_line(debug=debug):
        app(kept, prog_name="palate")
