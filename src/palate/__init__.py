"""Reward models with personal taste: learn what people differ about, then what one person wants from a few choices.

    data = palate.load_encoder("style").embed(palate.load_pairs("choices.jsonl"))
    model = palate.fit(data)                     # what is shared
    profiles = palate.adapt(model, data)         # one user, or a million
    rewards = palate.margins(model, data, profiles)

Names are imported when they are first used: the base import costs milliseconds, and no optional package is touched before its
feature is.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from palate.version import __version__

if TYPE_CHECKING:
    from palate.adaptation import Profile, Profiles, adapt, margins
    from palate.alignment.hub import load_scorer, push_to_hub
    from palate.carrying import carry
    from palate.client import AsyncClient, Client
    from palate.data.embeddings import Dense, Embeddings, Joined, OneHot
    from palate.data.pairs import Choice, EmbeddedPairs, Message, PairSet, Text
    from palate.data.readers import load_pairs, load_valid_pairs
    from palate.data.splits import Split, split
    from palate.data.synthetic import Population, synthetic
    from palate.data.validation import ValidationReport, validate
    from palate.encoders import Encoder, load_encoder
    from palate.encoders.cache import Cache, with_cache
    from palate.encoders.tuned import LoRA, TunedEncoder
    from palate.end_to_end import Passes, fit_through
    from palate.errors import (
        ConvergenceError,
        DataError,
        LeakError,
        MismatchError,
        MissingExtraError,
        ModelFileError,
        PalateError,
        StoreError,
        UnknownUserError,
    )
    from palate.evaluation import Evaluation, compare, evaluate
    from palate.growing import grow
    from palate.living.explain import Explainer
    from palate.living.floor import Floor
    from palate.living.profile import LiveProfile
    from palate.living.together import together
    from palate.models.attribute_prior import AttributePrior
    from palate.models.base import RewardModel, load_model
    from palate.models.factored import BradleyTerry, LoRe
    from palate.models.given import GivenBases
    from palate.models.groups import GroupBT
    from palate.models.hierarchical import Hierarchical
    from palate.models.individual import IndividualBT
    from palate.models.mrm import MRM
    from palate.models.neighbours import Neighbours
    from palate.models.pal import PAL
    from palate.models.pref import PReF
    from palate.models.published import PublishedPairs, load_published_mrm, load_published_pairs
    from palate.models.reference import Reference
    from palate.models.vpl import VPL
    from palate.naming import Naming, name_bases, name_profile
    from palate.report import write_report
    from palate.report.card import model_card
    from palate.runs import train
    from palate.scoring import Scorer
    from palate.store import open_store
    from palate.training import fit

_HOME = {
    "palate.adaptation": ("Profile", "Profiles", "adapt", "margins"),
    "palate.alignment.hub": ("load_scorer", "push_to_hub"),
    "palate.carrying": ("carry",),
    "palate.client": ("AsyncClient", "Client"),
    "palate.data.embeddings": ("Dense", "Embeddings", "Joined", "OneHot"),
    "palate.data.pairs": ("Choice", "EmbeddedPairs", "Message", "PairSet", "Text"),
    "palate.data.readers": ("load_pairs", "load_valid_pairs"),
    "palate.data.splits": ("Split", "split"),
    "palate.data.synthetic": ("Population", "synthetic"),
    "palate.data.validation": ("ValidationReport", "validate"),
    "palate.encoders": ("Encoder", "load_encoder"),
    "palate.encoders.cache": ("Cache", "with_cache"),
    "palate.encoders.tuned": ("LoRA", "TunedEncoder"),
    "palate.end_to_end": ("Passes", "fit_through"),
    "palate.errors": (
        *("ConvergenceError", "DataError", "LeakError", "MismatchError"),
        *("MissingExtraError", "ModelFileError", "PalateError", "StoreError", "UnknownUserError"),
    ),
    "palate.evaluation": ("Evaluation", "compare", "evaluate"),
    "palate.growing": ("grow",),
    "palate.living.explain": ("Explainer",),
    "palate.living.floor": ("Floor",),
    "palate.living.profile": ("LiveProfile",),
    "palate.living.together": ("together",),
    "palate.models.attribute_prior": ("AttributePrior",),
    "palate.models.base": ("RewardModel", "load_model"),
    "palate.models.factored": ("BradleyTerry", "LoRe"),
    "palate.models.given": ("GivenBases",),
    "palate.models.groups": ("GroupBT",),
    "palate.models.hierarchical": ("Hierarchical",),
    "palate.models.individual": ("IndividualBT",),
    "palate.models.mrm": ("MRM",),
    "palate.models.neighbours": ("Neighbours",),
    "palate.models.pal": ("PAL",),
    "palate.models.pref": ("PReF",),
    "palate.models.published": ("PublishedPairs", "load_published_mrm", "load_published_pairs"),
    "palate.models.reference": ("Reference",),
    "palate.models.vpl": ("VPL",),
    "palate.naming": ("Naming", "name_bases", "name_profile"),
    "palate.report": ("write_report",),
    "palate.report.card": ("model_card",),
    "palate.runs": ("train",),
    "palate.scoring": ("Scorer",),
    "palate.store": ("open_store",),
    "palate.training": ("fit",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of the way through, then the errors
    "load_pairs",
    "load_valid_pairs",
    "validate",
    "ValidationReport",
    "synthetic",
    "Population",
    "split",
    "Split",
    "Choice",
    "Message",
    "Text",
    "PairSet",
    "EmbeddedPairs",
    "Embeddings",
    "Dense",
    "OneHot",
    "Joined",
    "load_encoder",
    "Cache",
    "with_cache",
    "Encoder",
    "fit",
    "fit_through",
    "LoRA",
    "Passes",
    "TunedEncoder",
    "RewardModel",
    "Hierarchical",
    "BradleyTerry",
    "Reference",
    "LoRe",
    "PReF",
    "MRM",
    "PAL",
    "VPL",
    "IndividualBT",
    "GroupBT",
    "Neighbours",
    "AttributePrior",
    "GivenBases",
    "train",
    "load_published_pairs",
    "load_published_mrm",
    "PublishedPairs",
    "load_model",
    "adapt",
    "margins",
    "Profile",
    "Profiles",
    "grow",
    "carry",
    "name_bases",
    "name_profile",
    "Naming",
    "Scorer",
    "load_scorer",
    "LiveProfile",
    "Explainer",
    "Floor",
    "together",
    "open_store",
    "Client",
    "AsyncClient",
    "evaluate",
    "compare",
    "Evaluation",
    "write_report",
    "model_card",
    "push_to_hub",
    "PalateError",
    "DataError",
    "LeakError",
    "UnknownUserError",
    "ModelFileError",
    "MismatchError",
    "ConvergenceError",
    "MissingExtraError",
    "StoreError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'palate' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
