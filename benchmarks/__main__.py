"""`python -m benchmarks [speed | accuracy | questions | ablations | robust] ...`: `speed` by default, which needs no data."""

import sys

from benchmarks import ablations, accuracy, questions, robust, speed

PARTS = {"speed": speed.main, "accuracy": accuracy.main, "questions": questions.main}
PARTS |= {"ablations": ablations.main, "robust": robust.main}

given = sys.argv[1:]
part = given.pop(0) if given and given[0] in PARTS else "speed"
PARTS[part](given)
