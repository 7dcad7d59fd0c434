"""`python -m benchmarks [speed | accuracy] ...`: the speed figures by default, because they need no data."""

import sys

from benchmarks import accuracy, speed

PARTS = {"speed": speed.main, "accuracy": accuracy.main}

given = sys.argv[1:]
part = given.pop(0) if given and given[0] in PARTS else "speed"
PARTS[part](given)
