"""`python -m benchmarks PART ...`: speed (the default, which needs no data), accuracy, questions, ablations, robust, sentences,
encoders, judges, exposure, floor, living, noise, transfer, complexity, convergence or pictures.
"""

import sys

from benchmarks import (
    ablations,
    accuracy,
    complexity,
    convergence,
    encoders,
    exposure,
    floor,
    judges,
    living,
    noise,
    pictures,
    questions,
    robust,
    sentences,
    speed,
    transfer,
)

PARTS = {"speed": speed.main, "accuracy": accuracy.main, "questions": questions.main}
PARTS |= {"ablations": ablations.main, "robust": robust.main}
PARTS |= {"sentences": sentences.main, "encoders": encoders.main}
PARTS |= {"noise": noise.main, "transfer": transfer.main, "complexity": complexity.main}
PARTS |= {"judges": judges.main, "exposure": exposure.main, "floor": floor.main, "living": living.main}
PARTS |= {"convergence": convergence.main, "pictures": pictures.main}

given = sys.argv[1:]
part = given.pop(0) if given and given[0] in PARTS else "speed"
PARTS[part](given)
