"""The published preparations, and exports in columns of their own, by name for the command line: which files and options each
takes, and what comes of them.

In Python the loaders themselves are called; they have the arguments that a name leaves out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from palate.errors import DataError

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.data.prism import Recipe
    from palate.data.validation import ValidationReport

    Prepared = tuple[PairSet, *tuple[ValidationReport, ...]]
    Files = Sequence[Path]


@dataclass(frozen=True)
class Options:
    """What a recipe is told besides its files; `RECIPES` says which takes what. None is what is published, or nothing.

    Attributes:
        seed: of the split; where none is published, 0.
        alpha: of PersonalLLM's users, Dirichlet(alpha).
        seen_limit: most comparisons of a seen worker that are learned from.
        languages: the annotators' languages that are kept, separated by commas.
        columns: what is called otherwise, or has no usual name: `user=worker,context=asked`.
        question: the question of an Argilla export whose answers are read.
        prompt: the field of an Argilla export with what was asked.
        answers: the fields or columns of the answers, `a,b`, or `name=a,other=b` where the export calls them by names.
        ties: equal ranks or ratings become ties.
    """

    seed: int | None = None
    alpha: float | None = None
    seen_limit: int | None = None
    languages: str | None = None
    columns: str | None = None
    question: str | None = None
    prompt: str | None = None
    answers: str | None = None
    ties: bool = False

    def given(self) -> set[str]:
        """Those that say something, the seed aside, which every recipe takes."""
        return {field.name for field in fields(self) if field.name != "seed" and getattr(self, field.name) not in (None, False)}


class _Preparation(NamedTuple):
    files: tuple[str, ...]  # what they are called there; one that ends with "..." may be several, one with "?" may be left out
    run: "Callable[[Files, Options], Prepared]"
    may: tuple[str, ...] = ()  # the options that it takes
    needs: tuple[str, ...] = ()  # and those that it cannot do without


def _prism(recipe: "Callable[[], Recipe]") -> "Callable[[Files, Options], Prepared]":
    def run(files: "Files", options: Options) -> "Prepared":
        from palate.data.prism import load_prism, prism_split

        pairs, report = load_prism(files[0], recipe=recipe(), survey=files[1] if len(files) > 1 else None)
        return prism_split(pairs, recipe(), seed=options.seed), report

    return run


def _mrm() -> "Recipe":
    from palate.data.prism import MRM

    return MRM


def _lore_paper() -> "Recipe":
    from palate.data.prism import LORE_PAPER

    return LORE_PAPER


def _lore_corrected() -> "Recipe":
    from palate.data.prism import LORE_CORRECTED

    return LORE_CORRECTED


def _tldr_mrm(files: "Files", options: Options) -> "Prepared":
    from palate.data.tldr import load_tldr

    return load_tldr(files[0], files[1], seen_limit=options.seen_limit or 150, seed=42 if options.seed is None else options.seed)


def _tldr_paper(files: "Files", options: Options) -> "Prepared":
    from palate.data.tldr import load_tldr_paper

    return load_tldr_paper(*files, seen_limit=options.seen_limit or 150, seed=options.seed or 0)


def _tldr_lore(files: "Files", options: Options) -> "Prepared":
    from palate.data.tldr import load_tldr_lore

    return load_tldr_lore(files[0], files[1], seen_limit=options.seen_limit or 150, seed=options.seed or 0)


def _arena(files: "Files", options: Options) -> "Prepared":
    from palate.data.arena import Columns, load_arena

    columns = Columns(**_named(options.columns, ("user", "context", "chosen", "rejected")))
    return load_arena(files[0], files[1], files[2], columns=columns, seed=options.seed or 0)


def _aligned(files: "Files", options: Options) -> "Prepared":
    from palate.data.community import load_community_alignment

    return load_community_alignment(files, languages=_languages(options))


def _community(files: "Files", options: Options) -> "Prepared":
    from palate.data.community import Columns, load_community

    needed = ("annotator", "prompt", "preferred")
    named = _named(options.columns, (*needed, "conversation", "language"))
    if missing := [name for name in needed if name not in named]:
        raise DataError(f"--columns is {options.columns!r}; expected {', '.join(missing)} as well, such as {missing[0]}=COLUMN")
    of_label = _answers(options)
    columns = Columns(answers=list(of_label.values()), labels=list(of_label), **named)
    return load_community(files, columns, languages=_languages(options))


def _rankings(files: "Files", options: Options) -> "Prepared":
    from palate.data.argilla import argilla_rankings

    question, prompt = options.question or "", options.prompt or ""
    return argilla_rankings(files[0], question, prompt=prompt, answers=_answers(options), ties=options.ties)


def _labels(files: "Files", options: Options) -> "Prepared":
    from palate.data.argilla import argilla_labels

    labels = {label: field or None for label, field in _pairs("--answers", options.answers).items()}
    return argilla_labels(files[0], options.question or "", prompt=options.prompt or "", labels=labels)


def _ratings(files: "Files", options: Options) -> "Prepared":
    from palate.data.argilla import argilla_ratings

    question, prompt, answer = options.question or "", options.prompt or "", options.answers or ""
    return argilla_ratings(files[0], question, prompt=prompt, answer=answer, ties=options.ties)


def _personas(files: "Files", options: Options) -> "Prepared":
    from palate.data.personas import load_personas

    return load_personas(files[0], files[1], files[2], files[3])


def _attributes(files: "Files", options: Options) -> "Prepared":
    from palate.data.attribute_texts import attribute_texts

    return (attribute_texts(options.seed or 0).pairs,)


def _simulated(standardised: bool) -> "Callable[[Files, Options], Prepared]":
    def run(files: "Files", options: Options) -> "Prepared":
        from palate.data.personalllm import best_and_worst, load_personalllm, two_at_random

        column = _named(options.columns, ("score",)).get("score", "response_{answer}_{scorer}")
        train, report = load_personalllm(files[0], standardised=standardised, score_column=column)
        test, of_test = load_personalllm(files[1], standardised=standardised, score_column=column)
        n_test, seed = min(100, len(test)), options.seed
        if standardised:
            alpha = 0.01 if options.alpha is None else options.alpha
            users = two_at_random(train, test, alpha=alpha, n_test=n_test, seed=42 if seed is None else seed)
        else:
            alpha = 0.001 if options.alpha is None else options.alpha
            users = best_and_worst(train, test, alpha=alpha, n_test=n_test, seed=seed or 0)
        return users.pairs, report, of_test

    return run


def _languages(options: Options) -> list[str] | None:
    return None if options.languages is None else [one.strip() for one in options.languages.split(",")]


def _answers(options: Options) -> dict[str, str]:
    """{what the export calls an answer: the field that holds it}."""
    found = _pairs("--answers", options.answers)
    if not all(found.values()):
        raise DataError(f"--answers is {options.answers!r}; expected a field for every answer")
    return found


def _named(given: str | None, known: Sequence[str]) -> dict[str, str]:
    """{what: column}, of what is known."""
    found = {} if given is None else _pairs("--columns", given)
    for what, column in found.items():
        if what not in known or not column:
            raise DataError(f"--columns has {what}={column}; expected WHAT=COLUMN with WHAT one of {', '.join(known)}")
    return found


def _pairs(option: str, given: str | None) -> dict[str, str]:
    """{name: field} of `name=field,...`; a part without "=" is both."""
    out: dict[str, str] = {}
    for part in (given or "").split(","):
        name, told, field = (word.strip() for word in part.partition("="))
        if not name or name in out:
            raise DataError(f"{option} is {given!r}; expected names separated by commas, each once, or NAME=FIELD for each")
        out[name] = field if told else name
    return out


_ARGILLA = ("question", "prompt", "answers")

RECIPES: Mapping[str, _Preparation] = {
    "prism-mrm": _Preparation(("conversations.jsonl", "survey.jsonl?"), _prism(_mrm)),
    "prism-lore-paper": _Preparation(("conversations.jsonl", "survey.jsonl?"), _prism(_lore_paper)),
    "prism-lore-corrected": _Preparation(("conversations.jsonl", "survey.jsonl?"), _prism(_lore_corrected)),
    "tldr-mrm": _Preparation(("train", "validation"), _tldr_mrm, ("seen_limit",)),
    "tldr-paper": _Preparation(("part...",), _tldr_paper, ("seen_limit",)),
    "tldr-lore": _Preparation(("train", "validation"), _tldr_lore, ("seen_limit",)),
    "personalllm-lore": _Preparation(("train", "test"), _simulated(False), ("alpha", "columns")),
    "personalllm-random": _Preparation(("train", "test"), _simulated(True), ("alpha", "columns")),
    "arena": _Preparation(("train", "val", "test"), _arena, ("columns",)),
    "community-alignment": _Preparation(("part...",), _aligned, ("languages",)),
    "community": _Preparation(("part...",), _community, ("languages",), ("columns", "answers")),
    "argilla-rankings": _Preparation(("export",), _rankings, ("ties",), _ARGILLA),
    "argilla-labels": _Preparation(("export",), _labels, (), _ARGILLA),
    "argilla-ratings": _Preparation(("export",), _ratings, ("ties",), _ARGILLA),
    "personas": _Preparation(("train", "validation", "calibration", "test"), _personas),
    "attributes": _Preparation((), _attributes),
}


def prepared(
    name: str, files: "Files", seed: int | None = None, *, options: Options | None = None
) -> "tuple[PairSet, tuple[ValidationReport, ...]]":
    """The choices of a recipe with their split, and the reports on rows that were left out (none where they are generated).

    Args:
        name: one of `RECIPES`.
        files: the published files in the recipe's order.
        seed: of the split; None for the published one, else 0. Personas come with their split and have no draws; Community
            Alignment, files in its shape and Argilla exports have no published split, and their rows have none.
        options: what else the recipe takes; its own seed does not count.

    The simulated users of PersonalLLM are the 1000 + 1000 of the paper on the first 100 test prompts, because rows repeat their
    texts; in Python all test prompts cost nothing.

    Raises `DataError` for another name or number of files, an option that the recipe does not take or cannot do without, and what
    the loader raises.
    """
    if name not in RECIPES:
        raise DataError(f"there is no recipe {name!r}; expected one of {', '.join(RECIPES)}")
    wanted, told = RECIPES[name], options or Options()
    least = sum(not file.endswith("?") for file in wanted.files)
    most = None if any(file.endswith("...") for file in wanted.files) else len(wanted.files)
    if len(files) < least or (most is not None and len(files) > most):
        raise DataError(
            f"{name} got {len(files)} files; expected {', '.join(wanted.files) or 'none, because it generates its rows'}"
        )
    takes = (*wanted.needs, *wanted.may)
    if idle := sorted(told.given() - set(takes)):
        raise DataError(f"{name} takes no {_flags(idle)}; expected {_flags(takes) or 'nothing but files and --seed'}")
    if missing := [option for option in wanted.needs if option not in told.given()]:
        raise DataError(f"{name} needs {_flags(missing)}; docs/datasets.md has an example of each")
    pairs, *reports = wanted.run(files, replace(told, seed=seed))
    return pairs, tuple(reports)


def usage(name: str) -> str:
    """The command line of a recipe: `palate data prepare arena TRAIN VAL TEST --out OUT`."""
    wanted = RECIPES[name]
    files = [f"[{file[:-1].upper()}]" if file.endswith("?") else file.upper() for file in wanted.files]
    return " ".join(
        ("palate data prepare", name, *files, *(f"--{option} {option.upper()}" for option in wanted.needs), "--out OUT")
    )


def _flags(options: Sequence[str]) -> str:
    return ", ".join("--" + option.replace("_", "-") for option in options)
