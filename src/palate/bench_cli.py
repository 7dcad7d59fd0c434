"""`palate bench`: every method on every data set, in parallel, resumable, with one page at the end (`palate.bench`)."""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate import cache_cli, terminal
from palate.errors import DataError

if TYPE_CHECKING:
    from palate.bench import Plan
    from palate.models.base import RewardModel

# Neither can be had on every data set: they need an encoder that brings scores or a head.
NEED_MORE = ("scorers", "reference")
INFORMED = "attribute-prior"  # named by itself only: it is told more than the others
_KEYS = ("data", "methods", "seeds", "first-seed", "conditions", "shots", "jobs", "options")


def bench(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the results; a bench that is there already goes on.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="polis=FOLDER, convarg=ROWS, prism=ROWS, or rows=FILE for any other choices, with ,encoder=SPEC and "
            ",attributes=FILE behind where you wish, and ,name=LABEL, ,by=conversation|prompt|item|pair and "
            ",believe-format=yes behind rows=FILE; "
            "attributes, two-groups, one-crowd or personalllm:alpha=A; may be given several times.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="'fixed', 'faithful' (as published), 'all', or names: bt,lore,hierarchical; attribute-prior, where there are "
            "attributes.  [fixed]"
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of random splits.  [5]", min=1)] = None,
    first_seed: Annotated[int | None, typer.Option(help="The first of them.  [0]", min=0)] = None,
    conditions: Annotated[
        str | None, typer.Option(help="Separated by commas: clean, flip=.2, contrarian=.3, pairs=2.  [clean]")
    ] = None,
    shots: Annotated[
        str | None, typer.Option(help="Numbers of choices from which unseen users are adapted.  [0,1,2,5,10,all]")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Worker processes, of one thread each; by default one a core.", min=1)] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="TOML", help="A file of these options, and of methods' own; the command line goes before it."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only make the pages of this folder anew.", show_default=False)
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run the cells that failed again.")] = False,
    again: Annotated[
        str, typer.Option(metavar="NAMES", help="Run all cells of these methods again, as after a change of their code.")
    ] = "",
    cache: cache_cli.CacheFolder = None,
    no_cache: cache_cli.NoCache = False,
) -> None:
    """Compare methods on the benchmark's data sets; killed at any moment, the same command goes on where it was.

    Leaves results.jsonl (a row a user), leaderboard.html and leaderboard.md in DIR. Exit code 1: some cells failed; the page says
    which and why.
    """
    from palate.bench import estimated, run, start, write_pages

    if report is not None:
        with terminal.progress("Making the pages"):
            made = write_pages(report)
        terminal.say(str(made))
        return
    if out is None:
        raise DataError("--out is missing; expected the folder of the results, or --report DIR for its pages alone")
    given = {"data": data, "methods": methods, "seeds": seeds, "first-seed": first_seed, "conditions": conditions}
    given |= {"shots": shots, "jobs": jobs}
    settings = _settings(plan) | {name: value for name, value in given.items() if value is not None}
    wanted = _plan(settings, cache, no_cache)
    workers = _whole(settings, "jobs", os.cpu_count() or 1, 1)
    with terminal.progress("Preparing") as advance:
        started = start(wanted, out, retry=retry_failed, again=[n for n in again.split(",") if n], progress=advance)
    missing = len(started.pending)
    seconds, guessed = estimated(started.pending, out, workers)
    rough = f", {guessed} of them guessed" if guessed else ""
    with_so_many = f"{workers} worker{'' if workers == 1 else 's'}"
    terminal.note(f"{missing} cells to run of {len(started.every)}, about {_duration(seconds)} with {with_so_many}{rough}")
    with terminal.progress("Running") as advance:
        failed = run(started, out, jobs=workers, progress=advance)
    with terminal.progress("Making the pages"):
        made = write_pages(out)
    if failed:
        terminal.note(f"{failed} cells failed; the page says which and why, and --retry-failed runs them again")
    terminal.say(str(made))
    if failed:
        raise typer.Exit(1)


def _settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML ({error}); docs/bench.md has an example") from error
    unknown = sorted(set(found) - set(_KEYS))
    if unknown:
        raise DataError(f"{path} has {', '.join(unknown)}; expected {', '.join(_KEYS)}")
    return found


def _plan(settings: Mapping[str, Any], cache: Path | None, no_cache: bool) -> "Plan":
    from palate.bench import Plan, source
    from palate.data.conditions import Condition

    models = _methods(_words(settings, "methods", "fixed"), settings.get("options", {}))
    first = _whole(settings, "first-seed", 0, 0)
    numbers = range(first, first + _whole(settings, "seeds", 5, 1))
    listed = [Condition.named(text) for text in _words(settings, "conditions", "clean").split(",")]
    tried = terminal.shots(_words(settings, "shots", "0,1,2,5,10,all"))
    texts = settings.get("data", [])
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"--data is {texts!r}; expected at least one data set, such as attributes or polis=FOLDER")
    sources = []
    for text in texts:
        with terminal.progress(f"Reading {text}"):
            sources.append(source(text, lambda spec: cache_cli.encoder(spec, cache, no_cache), terminal.note))
    return Plan(sources, models, numbers, listed, tried)


def _words(settings: Mapping[str, Any], name: str, usual: str) -> str:
    """Words separated by commas; a file may have a list of them."""
    value = settings.get(name, usual)
    value = ",".join(map(str, value)) if isinstance(value, list) else value
    if not isinstance(value, str):
        raise DataError(f"{name} is {value!r}; expected words separated by commas, such as {usual!r}")
    return value


def _whole(settings: Mapping[str, Any], name: str, usual: int, least: int) -> int:
    value = settings.get(name, usual)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return value


def _methods(names: str, options: Mapping[str, Any]) -> "dict[str, RewardModel]":
    """The methods of a group, or those listed, with the options that a file gives them."""
    every = [name for name in terminal.METHODS if name not in NEED_MORE]
    groups = {
        "fixed": [name for name in every if not name.endswith("-faithful")],
        "faithful": [name for name in every if name.endswith("-faithful")],
        "all": every,
    }
    listed = dict.fromkeys(name for word in names.split(",") for name in groups.get(word.strip(), [word.strip()]))
    models = _made(list(listed))
    if not isinstance(options, Mapping):
        raise DataError(f"options is {options!r}; expected a table for each method, such as [options.lore]")
    for name, changed in options.items():
        if name not in models:
            raise DataError(f"options are given for {name!r}; expected one of the methods {', '.join(models)}")
        usual = models[name].options()
        unknown = sorted(set(changed) - set(usual)) if isinstance(changed, Mapping) else [repr(changed)]
        if unknown:
            raise DataError(f"options.{name} has {', '.join(unknown)}; expected {', '.join(usual)}")
        wanted = usual | {key: _over(usual[key], value) for key, value in changed.items()}
        try:
            models[name] = type(models[name]).from_options(wanted)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"options.{name} has {dict(changed)} ({error}); expected values such as {usual}") from error
        taken = json.loads(json.dumps(models[name].options()))
        idle = [key for key in changed if taken.get(key) != wanted[key]]
        if idle:
            raise DataError(f"options.{name} has {', '.join(idle)}, which changes nothing in {models[name]}; leave it out")
    return models


def _made(listed: Sequence[str]) -> "dict[str, RewardModel]":
    from palate.models.attribute_prior import AttributePrior

    names = [name for name in listed if name]
    for name in names:
        terminal.one_of(name, (*terminal.METHODS, INFORMED), "--methods")
    if names == [INFORMED]:
        return {INFORMED: AttributePrior()}
    usual = terminal.methods(",".join(name for name in names if name != INFORMED))
    return {name: AttributePrior() if name == INFORMED else usual[name] for name in names}


def _over(usual: Any, value: Any) -> Any:
    """A table of options changes those that it has."""
    return {**usual, **value} if isinstance(usual, Mapping) and isinstance(value, Mapping) else value


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
