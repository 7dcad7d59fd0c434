"""An encoder without meaning and a model over it: whatever is computed with them has one right answer, and none is 0."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import palate
from palate.data.embeddings import Dense
from palate.data.pairs import Text
from palate.encoders import Encoder


class Letters(Encoder):
    """Five features of a text, from a generator that it seeds; keeps what it is asked, and waits where `gate` is closed."""

    spec = "letters"

    def __init__(self) -> None:
        self.calls: list[list[Text]] = []
        self.gate, self.asked = threading.Event(), threading.Event()
        self.gate.set()

    def encode(self, texts: Sequence[Text]) -> Dense:
        self.asked.set()
        assert self.gate.wait(10)
        self.calls.append(list(texts))
        rows = [np.random.default_rng(list(f"{t.prompt}|{t.response}".encode())).standard_normal(5) for t in texts]
        return Dense(torch.tensor(np.array(rows).reshape(len(texts), 5)))

    def state(self) -> dict[str, Any]:
        return {"encoder": "letters"}


def model_of(seed: int = 0) -> palate.Hierarchical:
    """Three weights over five features, types of people and all, in double precision."""
    rng = np.random.default_rng(seed)
    numbers = {
        "direction": rng.standard_normal(5),
        "bases": rng.standard_normal((5, 3)),
        "share": np.array([0.7, 0.3]),
        "means": 0.5 * rng.standard_normal((2, 3)),
        "factors": np.stack([np.tril(rng.standard_normal((3, 3))) + 2 * np.eye(3) for _ in range(2)]),
    }
    return palate.Hierarchical().like({name: torch.tensor(value) for name, value in numbers.items()})
