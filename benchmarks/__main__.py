"""`python -m benchmarks PART ...`: speed (the default, which needs no data), accuracy, questions, ablations, robust, sentences
or encoders.
"""

import sys

from benchmarks import ablations, accuracy, encoders, questions, robust, sentences, speed

PARTS = {"speed": speed.main, "accuracy": accuracy.main, "questions": questions.main}
PARTS |= {"ablations": ablations.main, "robust": robust.main}
PARTS |= {"sentences": sentences.main, "encoders": encoders.main}

given = sys.argv[1:]
part = given.pop(0) if given and given[0] in PARTS else "speed"
PARTS[part](given)
