"""A model to try the service with: generated people, the style encoder, half a minute. Needs no data and no network."""

from typing import NamedTuple

from palate.data.synthetic import synthetic
from palate.encoders import load_encoder
from palate.living.floor import Floor
from palate.living.population import Population
from palate.models.hierarchical import Hierarchical
from palate.scoring import Scorer
from palate.server.lanes import Lane
from palate.server.loading import lane_of
from palate.training import fit

USERS, CHOICES = 160, 24
HELD_OUT = 50  # of the users, for the floor, which needs people whom the model has not seen
EXPLAINED = 400  # choices of the sample that explanations are made against
NAME = "demo"


class Demo(NamedTuple):
    """The lane, and a prompt with two answers to try it with."""

    lane: Lane
    prompt: str
    responses: tuple[str, str]


def demo(seed: int = 0) -> Demo:
    """A lane over generated choices with eight personal weights, the same for the same seed."""
    data = synthetic(USERS, CHOICES, noise=0.05, seed=seed).pairs
    encoder = load_encoder("style")
    embedded = encoder.embed(data)
    seen = embedded.user_index < USERS - HELD_OUT
    model = fit(embedded[seen], Hierarchical(n_bases=8, bend=0, types=(1,), kappa=1.0), seed=seed)
    floor = Floor.fit(model, embedded[~seen])
    lane = lane_of(NAME, Scorer(encoder, model), Population.of(model), sample=data[:EXPLAINED], floor=floor)
    first, second = data.texts[int(data.chosen[0])], data.texts[int(data.rejected[0])]
    return Demo(lane, first.prompt_text, (first.response, second.response))
