"""`python -m benchmarks [speed | accuracy | questions] ...`: the speed figures by default, because they need no data."""

import sys

from benchmarks import accuracy, questions, speed

PARTS = {"speed": speed.main, "accuracy": accuracy.main, "questions": questions.main}

given = sys.argv[1:]
part = given.pop(0) if given and given[0] in PARTS else "speed"
PARTS[part](given)
