"""The card of a model: what somebody who did not fit it has to know before they use it, in the form that the Hub reads.

It is made of what the model's own files hold, so that nobody has to write it, and of a comparison where there is one. It names no
user and quotes no text. What was not measured is said to be not measured.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from palate.encoders import Encoder, State
from palate.encoders.base import digest
from palate.errors import DataError, MismatchError
from palate.evaluation import Evaluation
from palate.models.base import RewardModel
from palate.models.hub import is_id
from palate.report.measured import indexed, one_line, results_in_words, subject_of, table, worst_in_words
from palate.version import __version__

if TYPE_CHECKING:
    from palate.naming import Naming

UNKNOWN = "unknown"  # the Hub's word for a licence that nobody stated
FEW = 100  # users; with fewer, what people differ about is a guess
_MEMORY = "a model that was built in memory"
_SOURCES = ("source", "id", "url")  # keys of what encoders are made from
_DESCRIBES = "Fingerprint of the model"
_BASES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}


def model_card(
    model: RewardModel,
    *,
    encoder: Encoder | State | None = None,
    results: Evaluation | None = None,
    method: str | None = None,
    naming: "Naming | None" = None,
    repo_id: str = "ORG/NAME",
    license: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] = (),
) -> str:
    """The text of a model card: YAML that the Hub indexes, then Markdown for people.

    Args:
        model: a fitted model.
        encoder: what it was fitted with, or its `state()`; without one the card says that texts have to be embedded first.
        results: a comparison in which this kind of model took part; every figure comes with its 95 % interval.
        method: what `results` calls this model; needed only where several of its methods are of this class.
        naming: what `palate.name_bases` found; the names of one person (`name_profile`) are refused.
        repo_id: the id under which it will be found.
        license: an identifier of the Hub ("apache-2.0"); nobody but you can choose one, so it is "unknown" by default.
        datasets: ids of the data sets on the Hub that it was fitted on.
        languages: codes of the languages of the texts ("en").

    Raises:
        DataError: an unfitted model, a method that `results` lacks, or names of a person.
        MismatchError: the model was fitted with another encoder.
    Cost: the intervals of `results`, some tenths of a second a method.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if not model.is_fitted:
        raise DataError(f"this {type(model).__name__} is not fitted; a card describes what palate.fit(data, model) returns")
    state = encoder.state() if isinstance(encoder, Encoder) else encoder
    found = encoder.fingerprint if isinstance(encoder, Encoder) else None if state is None else digest(state)
    if found is not None and model.encoder is not None and found != model.encoder:
        raise MismatchError(
            f"the encoder has fingerprint {found[:12]}, the model was fitted on {model.encoder[:12]}; give the encoder that the "
            "model was fitted with"
        )
    if naming is not None and not all(re.fullmatch(r"the crowd|base \d+", name.what) for name in naming.names):
        raise DataError("the naming describes a person, and a card names nobody; give what palate.name_bases returned")
    subject = None if results is None else subject_of(results, model, method)
    tags = ["palate", "reward-model", "preference", "personalization", type(model).__name__.lower()]
    measured = [] if results is None or subject is None else indexed(results, subject)
    data = ModelCardData(
        license=license or UNKNOWN,
        library_name="palate",
        pipeline_tag="text-classification",
        tags=tags,
        base_model=sorted({source for source in sources(state) if is_id(source) and not is_local(source)}) or None,
        datasets=list(datasets) or None,
        language=list(languages) or None,
        metrics=["accuracy"] if measured else None,
        model_name=repo_id.rpartition("/")[2] if measured else None,
        eval_results=measured or None,
    )
    parts = [
        _opening(model, repo_id),
        _use(model, repo_id, state),
        _inside(model, state),
        _learned(model, naming),
        _data(model, datasets),
        results_in_words(results, subject),
        worst_in_words(results, subject),
        _limits(model, results, license),
        _PRIVACY,
        _making(model),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def sources(state: Any) -> Iterator[str]:
    """What the encoders inside an encoder's state are made from, however deep: ids on the Hub, folders, addresses."""
    if isinstance(state, Mapping):
        if state.get("encoder") in _BASES:
            yield _BASES[state["encoder"]]
        found = [value for key, value in state.items() if key in _SOURCES]
        yield from (_MEMORY if value is None else str(value) for value in found)
    for inner in state.values() if isinstance(state, Mapping) else state if isinstance(state, list) else ():
        yield from sources(inner)


def is_local(source: str) -> bool:
    """Whether a source is of this machine or its network: nobody else's business, and of no use to them."""
    if source.startswith(("http:", "https:")):
        return source.startswith("http:")
    return (
        source == _MEMORY
        or os.path.exists(source)
        or os.path.isabs(source)
        or source.startswith((".", "~"))
        or source.count("/") > 1
    )


# -- what it is


def _opening(model: RewardModel, repo_id: str) -> str:
    first = (type(model).__doc__ or "").partition("\n")[0]
    about = f"{_weights(model.n_weights)} of their own for each person" if model.n_weights else "one reward for everybody"
    return (
        f"# {repo_id.rpartition('/')[2]}\n\nA reward model with personal taste: from a few choices between responses it learns "
        f"what one person prefers, and scores new responses for them. It is a `{type(model).__name__}` of Palate, with {about} "
        f"and {model.n_parameters:,} numbers that all share.\n\n> {one_line(first)}"
    )


def _weights(n: int) -> str:
    return "one weight" if n == 1 else f"{n} weights"


def _use(model: RewardModel, repo_id: str, state: State | None) -> str:
    lines = ["## How to use it", "", "```python", "import palate", ""]
    if state is None:
        lines += [
            f'model = palate.load_model("{repo_id}")',
            f"# It reads {model.n_features} features a text, of the encoder whose fingerprint is below; none was saved with it.",
            "# data = palate.EmbeddedPairs(embeddings, chosen, rejected, users)",
            "# profiles = palate.adapt(model, data)",
        ]
    else:
        lines += [
            f'scorer = palate.load_scorer("{repo_id}")',
            'responses = ["Try the soup.", "The soup of the day is lentil; it comes with bread and costs little."]',
            'scorer.rank("What is for lunch?", responses)  # for somebody of whom nothing is known',
            "",
            "# What one person wants, from their choices: rows of user_id, prompt, chosen, rejected.",
            'choices = palate.load_pairs("choices.jsonl")',
            "profiles = palate.adapt(scorer.model, scorer.encoder.embed(choices))",
            "for user, profile in profiles.items():",
            '    scorer.rank("What is for lunch?", responses, profile)',
        ]
    lines += [
        "```",
        "",
        "Rewards are natural log-odds: the difference of two is the log-odds that the one response is preferred to the other by "
        "that person. They are not comparable between persons or prompts.",
    ]
    return "\n".join(lines)


def described(card: str) -> str | None:
    """The fingerprint of the model that a card says it is about; None for a card that does not say, such as one's own."""
    found = re.search(rf"{_DESCRIBES} *\| *`([0-9a-f]+)`", card)
    return None if found is None else found[1]


def _inside(model: RewardModel, state: State | None) -> str:
    rows = [
        ("Class", f"`{type(model).__name__}`"),
        ("Options", f"`{json.dumps(model.options(), sort_keys=True)}`"),
        ("Weights of a person", str(model.n_weights)),
        ("Shared numbers", f"{model.n_parameters:,}"),
        ("Features of a text", f"{model.n_features:,}"),
        (_DESCRIBES, f"`{model.fingerprint()}`"),
        ("Fingerprint of the encoder", f"`{model.encoder}`" if model.encoder else "not known"),
        ("Encoder", "not saved with the model" if state is None else _encoder(state)),
    ]
    return "## What it is\n\n" + table(("", ""), rows)


def _encoder(state: State) -> str:
    """The kind of an encoder and the settings of it that are short; `encoder.json` has all of them."""
    kind = str(state.get("encoder"))
    inner = state.get("parts") or ([state["base"]] if isinstance(state.get("base"), dict) else [])
    settings = [
        f"{key} {one_line(str(value))[:60]}"
        for key, value in state.items()
        if key not in ("encoder", "parts", "base")
        and isinstance(value, str | int | float)
        and not (key in _SOURCES and is_local(str(value)))
    ]
    within = " of " + " and ".join(_encoder(part) for part in inner) if inner else ""
    return f"{kind}{within}" + (f" ({'; '.join(settings)})" if settings else "")


def _learned(model: RewardModel, naming: "Naming | None") -> str:
    lines = ["## What was learned", ""]
    prior = model.prior
    if not model.n_weights:
        lines.append("One reward for everybody. It knows no personal differences.")
    elif prior is None:
        lines.append(
            f"People have {_weights(model.n_weights)} each. The method has no prior over persons, so it gives no uncertainty."
        )
    else:
        spread = prior.covariance.diagonal().sqrt().tolist()
        shares = ", ".join(f"{share:.0%}" for share in prior.share.tolist())
        people = "one Gaussian" if prior.n_components == 1 else f"{prior.n_components} types of people, with shares {shares}"
        shown = ", ".join(f"{value:.3g}" for value in spread[:16]) + (", ..." if len(spread) > 16 else "")
        lines.append(f"People have {_weights(len(spread))} each, distributed as {people}; standard deviation {shown}.")
    lines += ["", naming.markdown() if naming is not None else "The base rewards were not named (`palate.name_bases`)."]
    return "\n".join(lines)


def _data(model: RewardModel, datasets: Sequence[str]) -> str:
    record = model.record
    counts = [
        (f"{record[key]:,}" if isinstance(record.get(key), int) else "an unknown number of") + f" {what}"
        for key, what in (("n_pairs", "choices"), ("n_users", "people"))
    ]
    lines = [f"Fitted on {' by '.join(counts)}" + (f" of {', '.join(map(one_line, datasets))}." if datasets else ".")]
    if isinstance(record.get("data"), str):
        lines.append(f"Fingerprint of the data: `{record['data']}`.")
    grown = record.get("grown")
    lines += [f"Then grown with {one['n_pairs']:,} choices by {one['n_users']:,} people." for one in grown or []]
    return "## Data\n\n" + "\n".join(lines)


def _limits(model: RewardModel, results: Evaluation | None, license: str | None) -> str:
    n_users = model.record.get("n_users")
    few = isinstance(n_users, int) and n_users < FEW
    out = [
        "It has learned what people chose, not what is true, safe or good for them. A response that flatters may score high.",
        "It knows only differences that its encoder sees and that the people it was fitted on had. People who want something "
        "else are scored as if they did not.",
        "Optimised against without restraint, a reward model is exploited: keep people in the loop, and other rewards beside it.",
        "A profile says something about a person. It is not made for guessing at their health, politics or other traits.",
        *([f"Only {n_users} people took part in the fit, so what people differ about is a rough guess."] if few else []),
        *(["Nobody has measured how good it is; the card has no results."] if results is None else []),
        *(
            ["Whoever published it stated no licence (`license: unknown`); ask them before you build on it."]
            if not license
            else []
        ),
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in out)


_PRIVACY = """## Privacy

The model holds no person: no ids, no profiles, no texts. Its files are numbers that all people share, the settings of the encoder
(of a fixed catalogue, digests of its responses), and a record of the fit: counts, fingerprints, seed, how options were chosen.
That no single person's choices can be traced in the shared numbers is not proven. A profile that you adapt stays on your machine;
treat it as personal data."""


def _making(model: RewardModel) -> str:
    record = model.record
    versions = record.get("versions")
    rows = [("Palate that wrote this card", __version__)]
    rows += [(f"{name} of the fit", str(version)) for name, version in (versions if isinstance(versions, dict) else {}).items()]
    rows += [("Seed", str(record["seed"]))] if "seed" in record else []
    rows += [("Time of the fit", f"{record['fit_seconds']:.3g} s")] if isinstance(record.get("fit_seconds"), float) else []
    return "## How it was made\n\n" + table(("", ""), [(name, one_line(value)) for name, value in rows])
