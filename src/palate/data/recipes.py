"""The published preparations by name, for the command line: which files each takes, and what comes of them.

In Python the loaders themselves are called; they have the arguments that a name leaves out.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from palate.errors import DataError

if TYPE_CHECKING:
    from palate.data.pairs import PairSet
    from palate.data.prism import Recipe
    from palate.data.validation import ValidationReport

    Prepared = tuple[PairSet, *tuple[ValidationReport, ...]]
    Files = Sequence[Path]


class _Preparation(NamedTuple):
    files: tuple[str, ...]  # what they are called there; one that ends with "..." may be several, one with "?" may be left out
    run: "Callable[[Files, int | None], Prepared]"


def _prism(recipe: "Callable[[], Recipe]") -> "Callable[[Files, int | None], Prepared]":
    def run(files: "Files", seed: int | None) -> "Prepared":
        from palate.data.prism import load_prism, prism_split

        pairs, report = load_prism(files[0], recipe=recipe(), survey=files[1] if len(files) > 1 else None)
        return prism_split(pairs, recipe(), seed=seed), report

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


def _tldr_mrm(files: "Files", seed: int | None) -> "Prepared":
    from palate.data.tldr import load_tldr

    return load_tldr(files[0], files[1], seed=42 if seed is None else seed)


def _tldr_paper(files: "Files", seed: int | None) -> "Prepared":
    from palate.data.tldr import load_tldr_paper

    return load_tldr_paper(*files, seed=seed or 0)


def _tldr_lore(files: "Files", seed: int | None) -> "Prepared":
    from palate.data.tldr import load_tldr_lore

    return load_tldr_lore(files[0], files[1], seed=seed or 0)


def _arena(files: "Files", seed: int | None) -> "Prepared":
    from palate.data.arena import load_arena

    return load_arena(files[0], files[1], files[2], seed=seed or 0)


def _community(files: "Files", seed: int | None) -> "Prepared":
    from palate.data.community import load_community_alignment

    return load_community_alignment(files)


def _personas(files: "Files", seed: int | None) -> "Prepared":
    from palate.data.personas import load_personas

    return load_personas(files[0], files[1], files[2], files[3])


def _attributes(files: "Files", seed: int | None) -> "Prepared":
    from palate.data.attribute_texts import attribute_texts

    return (attribute_texts(seed or 0).pairs,)


def _simulated(standardised: bool) -> "Callable[[Files, int | None], Prepared]":
    def run(files: "Files", seed: int | None) -> "Prepared":
        from palate.data.personalllm import best_and_worst, load_personalllm, two_at_random

        train, report = load_personalllm(files[0], standardised=standardised)
        test, of_test = load_personalllm(files[1], standardised=standardised)
        n_test = min(100, len(test))
        if standardised:
            users = two_at_random(train, test, n_test=n_test, seed=42 if seed is None else seed)
        else:
            users = best_and_worst(train, test, n_test=n_test, seed=seed or 0)
        return users.pairs, report, of_test

    return run


RECIPES: Mapping[str, _Preparation] = {
    "prism-mrm": _Preparation(("conversations.jsonl", "survey.jsonl?"), _prism(_mrm)),
    "prism-lore-paper": _Preparation(("conversations.jsonl", "survey.jsonl?"), _prism(_lore_paper)),
    "prism-lore-corrected": _Preparation(("conversations.jsonl", "survey.jsonl?"), _prism(_lore_corrected)),
    "tldr-mrm": _Preparation(("train", "validation"), _tldr_mrm),
    "tldr-paper": _Preparation(("part...",), _tldr_paper),
    "tldr-lore": _Preparation(("train", "validation"), _tldr_lore),
    "personalllm-lore": _Preparation(("train", "test"), _simulated(False)),
    "personalllm-random": _Preparation(("train", "test"), _simulated(True)),
    "arena": _Preparation(("train", "val", "test"), _arena),
    "community-alignment": _Preparation(("part...",), _community),
    "personas": _Preparation(("train", "validation", "calibration", "test"), _personas),
    "attributes": _Preparation((), _attributes),
}


def prepared(name: str, files: "Files", seed: int | None = None) -> "tuple[PairSet, tuple[ValidationReport, ...]]":
    """The choices of a recipe with their split, and the reports on rows that were left out (none where they are generated).

    Args:
        name: one of `RECIPES`.
        files: the published files in the recipe's order.
        seed: of the split; None for the published one, else 0. Personas come with their split and have no draws; Community
            Alignment has no published split, and its rows have none.

    The simulated users of PersonalLLM are the 1000 + 1000 of the paper on the first 100 test prompts, because rows repeat their
    texts; in Python all test prompts cost nothing.

    Raises `DataError` for another name or number of files, and what the loader raises.
    """
    if name not in RECIPES:
        raise DataError(f"there is no recipe {name!r}; expected one of {', '.join(RECIPES)}")
    wanted = RECIPES[name].files
    least = sum(not file.endswith("?") for file in wanted)
    most = None if any(file.endswith("...") for file in wanted) else len(wanted)
    if len(files) < least or (most is not None and len(files) > most):
        raise DataError(f"{name} got {len(files)} files; expected {', '.join(wanted) or 'none, because it generates its rows'}")
    pairs, *reports = RECIPES[name].run(files, seed)
    return pairs, tuple(reports)
