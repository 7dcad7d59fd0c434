"""The next question: which pair of texts a user should be asked to compare, and when to stop asking.

A user's next answer is a Bernoulli draw with the margin m = offset + w . v of the pair, v its slopes. What is known of w is a
Gaussian N(w_MAP, C) (`Belief`), and a way of choosing is an object that scores every pair of a pool for every user, (U, Q); the
highest score that has not been asked is the question.

`next_questions` asks one living user, from a pool or from the responses at hand (`pairs_among`); `should_stop` says when the
ranking is settled; `ask` runs the loop for many simulated people at once.
"""

from palate.questions.asking import Asked, ask
from palate.questions.belief import Belief, Pool, pairs_among
from palate.questions.choosing import Known, belief_of, next_questions, pick
from palate.questions.people import Answers, Distracted, Undecided, certain, noisy, twice
from palate.questions.rules import (
    DOptimal,
    HessianUncertainty,
    InformationGain,
    MutualInformation,
    Question,
    Random,
    Targeted,
    Thompson,
)
from palate.questions.stopping import Place, Settled, ranking, settled, should_stop
from palate.questions.unsure import evidence_of_unsure

__all__ = [
    "Answers",
    "Asked",
    "Belief",
    "DOptimal",
    "Distracted",
    "HessianUncertainty",
    "InformationGain",
    "Known",
    "MutualInformation",
    "Place",
    "Pool",
    "Question",
    "Random",
    "Settled",
    "Targeted",
    "Thompson",
    "Undecided",
    "ask",
    "belief_of",
    "certain",
    "evidence_of_unsure",
    "next_questions",
    "noisy",
    "pairs_among",
    "pick",
    "ranking",
    "settled",
    "should_stop",
    "twice",
]
