"""What asking costs: `Ledger` counts calls and tokens, prices them, and says no once a budget is spent."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, NamedTuple

from palate.errors import DataError


class Prices(NamedTuple):
    """Money for a million tokens, in any currency."""

    prompt: float
    completion: float


class Usage(NamedTuple):
    """Tokens of one answer, as the server counts them; None where it does not say."""

    prompt: int | None
    completion: int | None


class Ledger:
    """A running account, for any number of threads and clients at once.

    Args:
        max_calls: no request is begun once so many were.
        max_tokens: no request is begun that could pass this sum of prompt and completion tokens, its own prompt aside, whose
            length only the server knows: so the sum may be passed by the prompts that are under way, and by no more. An answer
            that the server did not count takes all the room that it was given, and its prompt none.

    Attributes:
        calls: requests sent to a server, a request with its retries counting once.
        cached: answers that were read instead of asked for; they cost nothing and are in no other number.
        prompt_tokens, completion_tokens: as the servers counted them.
        failures: calls that came to no usable answer.
        unmetered: answers whose server did not say how many tokens they took.
        seconds: time in which at least one caller was waiting.

    Raises:
        DataError: a budget below 0.
    """

    def __init__(self, *, max_calls: int | None = None, max_tokens: int | None = None):
        for name, value in (("max_calls", max_calls), ("max_tokens", max_tokens)):
            if value is not None and value < 0:
                raise DataError(f"{name} is {value}; expected 0 or more, or None for no limit")
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self.calls = self.cached = self.prompt_tokens = self.completion_tokens = self.failures = self.unmetered = 0
        self.seconds = 0.0
        self._held = self._waiting = 0
        self._began = 0.0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Ledger({', '.join(f'{name}={value}' for name, value in self.as_dict().items())})"

    @property
    def limited(self) -> bool:
        """Whether there is a budget, which may end before the work does."""
        return self.max_calls is not None or self.max_tokens is not None

    def begin(self, reserve: int) -> str | None:
        """Count one call whose answer takes up to `reserve` tokens; or say which part of the budget forbids it."""
        with self._lock:
            if self.max_calls is not None and self.calls >= self.max_calls:
                return f"the budget of {self.max_calls} calls is spent"
            tokens = self.prompt_tokens + self.completion_tokens
            if self.max_tokens is not None and tokens + self._held + reserve > self.max_tokens:
                held = f" and {self._held} held for answers under way or not counted" if self._held else ""
                return (
                    f"the budget of {self.max_tokens} tokens has no room for an answer of up to {reserve} ({tokens} spent{held})"
                )
            self.calls += 1
            self._held += reserve
            return None

    def end(self, reserve: int, usage: Usage | None, *, failed: bool) -> None:
        """The call that `begin` counted is over; `usage` is None where the server gave no answer at all."""
        with self._lock:
            if usage is None or usage.completion is not None:
                self._held -= reserve
            self.failures += failed
            if usage is not None:
                self.prompt_tokens += usage.prompt or 0
                self.completion_tokens += usage.completion or 0
                self.unmetered += usage.prompt is None or usage.completion is None

    def found(self, n: int = 1) -> None:
        """Count answers that were read from a cache."""
        with self._lock:
            self.cached += n

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time inside; what several callers wait for together counts once."""
        with self._lock:
            self._began = self._began if self._waiting else monotonic()
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self.seconds += monotonic() - self._began

    def cost(self, prices: Prices, *, at_least: bool = False) -> float:
        """Money for all calls so far, or with `at_least` for the tokens that servers counted, whatever else was spent.

        Raises `DataError` for prices that are none, and without `at_least` where a server did not count.
        """
        if not all(0 <= price < math.inf for price in prices):
            raise DataError(f"prices are {tuple(prices)}; expected money for a million prompt and a million completion tokens")
        if self.unmetered and not at_least:
            raise DataError(
                f"{self.unmetered} of {self.calls} answers came without a count of their tokens, so their cost is not known; "
                "ask a server that sends `usage`, or for the cost of the others with at_least=True"
            )
        return (prices.prompt * self.prompt_tokens + prices.completion * self.completion_tokens) / 1e6

    def as_dict(self) -> dict[str, Any]:
        """Every number of the account, JSON-able."""
        names = ("calls", "cached", "prompt_tokens", "completion_tokens", "failures", "unmetered")
        return {name: int(getattr(self, name)) for name in names} | {"seconds": round(self.seconds, 3)}
