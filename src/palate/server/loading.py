"""A lane from a model's folder: what stands beside the model is read, and what a sample of choices can tell is made."""

from pathlib import Path

from palate.data.pairs import PairSet
from palate.encoders.saved import saved_encoder
from palate.living import floor as floors
from palate.living import reading as readings
from palate.living import sums
from palate.living.explain import Explainer
from palate.living.floor import Floor
from palate.living.population import Population
from palate.living.reading import Level, Reading
from palate.models.base import load_model
from palate.scoring import Scorer
from palate.server.lanes import ROOM, Lane, Room

LEVELLED = 400  # responses of the sample from which an ordinary one is made


def load_lane(
    folder: Path,
    *,
    name: str | None = None,
    sample: PairSet | None = None,
    half_life: float | None = None,
    flip_rate: float = 0.0,
    room: Room = ROOM,
) -> Lane:
    """The lane of a model that `palate fit` wrote.

    Args:
        folder: with the model, its encoder and, where they were made, `reading.json`, `explainer.safetensors` and
            `floor.safetensors`.
        name: what requests call it; the folder's name by default.
        sample: choices like those that will come, from which an explainer and the level of an ordinary response are made where
            there is no file. Without either nobody is explained, and thumbs and ratings have nothing to be read against.
        half_life: seconds after which a choice weighs half as much; None forgets nothing.
        flip_rate: probability that a choice is turned round.
        room: caches and batches.

    Raises:
        ModelFileError: a file that is missing or damaged.
        MismatchError: files of different models in one folder.
        DataError: a method without living profiles, a half-life or a rate that is none.
    Cost: some seconds with a sample, for the explainer.
    """
    scorer = Scorer(saved_encoder(folder), load_model(folder))
    reading = Reading.load(folder, scorer.model) if (folder / readings.NAME).exists() else None
    floor = Floor.load(folder, scorer.model) if (folder / floors.NAME).exists() else None
    explainer = Explainer.load(folder, scorer.model) if (folder / sums.NAME).exists() else None
    return lane_of(
        name or folder.resolve().name,
        scorer,
        Population.of(scorer.model, half_life=half_life, flip_rate=flip_rate),
        sample=sample,
        reading=reading,
        explainer=explainer,
        floor=floor,
        room=room,
    )


def lane_of(
    name: str,
    scorer: Scorer,
    population: Population,
    *,
    sample: PairSet | None = None,
    reading: Reading | None = None,
    explainer: Explainer | None = None,
    floor: Floor | None = None,
    room: Room = ROOM,
) -> Lane:
    """The lane of a model at hand, with what `sample` can tell made where it is not given."""
    if sample is not None and reading is None:
        ordinary = scorer.encoder.encode(sample.texts[:: max(1, len(sample.texts) // LEVELLED)])
        reading = Reading(level=Level.of(scorer.model, ordinary, scorer.encoder.fingerprint))
    if sample is not None and explainer is None and scorer.model.n_weights:
        explainer = Explainer(scorer.model, scorer.encoder, sample)
    return Lane(name, scorer, population, reading=reading, explainer=explainer, floor=floor, room=room)
