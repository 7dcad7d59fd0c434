"""Simulated people: true margins (U,) to answers (U,): 1 the first text, 0 the second, 1/2 a tie, NaN "I can't say"."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from palate import likelihood
from palate.errors import DataError

Answers = Callable[[Tensor, torch.Generator], Tensor]


def certain(margin: Tensor, generator: torch.Generator) -> Tensor:
    """1 where the true margin (U,) is positive, 0 where it is negative, 1/2 at 0: people who never err."""
    return (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)


def noisy(margin: Tensor, generator: torch.Generator) -> Tensor:
    """1 with probability sigma(margin), else 0: Bradley-Terry."""
    return (_draw(margin, generator) < likelihood.probability(margin)).to(margin)


def twice(margin: Tensor, generator: torch.Generator) -> Tensor:
    """Two `noisy` answers, one for each order of the sides, that count if they agree and else are a tie (1/2): PReF's judge."""
    return (noisy(margin, generator) + noisy(margin, generator)) / 2


@dataclass(frozen=True)
class Undecided:
    """People who cannot say when the two are close: sigma(m - threshold), sigma(-m - threshold), and NaN for the rest.

    Rao and Kupper 1967 (J. Am. Stat. Assoc. 62: 194-204). At margin 0 they say nothing with probability tanh(threshold / 2).
    """

    threshold: float

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise DataError(f"threshold is {self.threshold}; expected a finite number of at least 0, in log-odds")

    def __call__(self, margin: Tensor, generator: torch.Generator) -> Tensor:
        draw = _draw(margin, generator)
        first, second = (likelihood.probability(side * margin - self.threshold) for side in (1, -1))
        neither = (draw >= first) & (draw < 1 - second)
        return (draw < first).to(margin).masked_fill(neither, torch.nan)


@dataclass(frozen=True)
class Distracted:
    """People who cannot say with probability `rate` whatever the pair (it is too long, or about what they do not know)."""

    rate: float
    answers: Answers = noisy

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise DataError(f"rate is {self.rate}; expected a probability")

    def __call__(self, margin: Tensor, generator: torch.Generator) -> Tensor:
        said = self.answers(margin, generator)
        return said.masked_fill(_draw(margin, generator) < self.rate, torch.nan)


def _draw(margin: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(margin.shape, generator=generator, dtype=torch.float64).to(margin.device)
