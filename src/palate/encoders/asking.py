"""Requests to a server that may be busy, slow or down: several at once, with pauses, limits and clear failures.

What passes (no connection, no answer in time, 408, 409, 425, 429, 5xx) is tried again after half a second, one, two and so on, or
after as long as the server asks for; what does not pass (any other 4xx) is an error with the server's words. The official client
of OpenAI sends the requests; its own retries are off, because it knows no limit for all of them together.

Keys come from the environment and are in no message and no file.
"""

import os
import threading
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from palate.errors import DataError, MissingExtraError, PalateError

OPENAI = "https://api.openai.com/v1"


class EndpointError(PalateError, ConnectionError):
    """A server that refused, or did not answer within the limits; the message has its words.

    Attributes:
        status: what it answered at last, such as 401; None where it did not answer.
    """

    status: int | None = None


class StoppedError(PalateError, InterruptedError):
    """A request that was given up because another one failed for good, or because the caller stopped."""


@dataclass(frozen=True)
class Limits:
    """How hard a server may be asked. They change no feature and are no part of the fingerprint.

    Args:
        batch: texts in a request, where a request takes several.
        concurrent: requests at once.
        per_second: most requests begun in a second, retries included; None for no limit.
        retries: of a request that failed in a way that may pass: 408, 409, 425, 429, 5xx, no connection, no answer.
        timeout: seconds without a byte after which a request has failed.
        total: seconds for a request with all its retries; a pause that would end later is not begun.

    Raises:
        DataError: a number that is not positive (retries may be 0).
    """

    batch: int = 64
    concurrent: int = 4
    per_second: float | None = None
    retries: int = 6
    timeout: float = 60.0
    total: float = 600.0

    def __post_init__(self) -> None:
        positive = {"batch": self.batch, "concurrent": self.concurrent, "timeout": self.timeout, "total": self.total}
        positive |= {} if self.per_second is None else {"per_second": self.per_second}
        wrong = [f"{name} is {value}" for name, value in positive.items() if not 0 < value < float("inf")]
        if wrong or self.retries < 0:
            raise DataError(f"{', '.join(wrong) or f'retries is {self.retries}'}; expected a positive number (retries from 0)")


class Server:
    """One address that answers JSON with JSON.

    Args:
        url: without a slash at its end after this.
        key_env: the environment variable that holds the key; where it is not set, none is sent that means anything.
        limits: how hard it may be asked; may be set at any time.

    Raises:
        DataError: an address that is none, or that could hold a secret: addresses are saved and shown.
    """

    def __init__(self, url: str, key_env: str, limits: Limits):
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise DataError(
                f"the url of {parts.hostname} holds a user, a password or a query; expected 'https://host/v1', and the key in "
                "the environment variable that key_env names"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError(f"url is {url!r}; expected 'http://host:8000' or 'https://host/v1'")
        self.url, self.key_env, self.limits = url.rstrip("/"), key_env, limits
        self._pace, self._lock = _Pace(), threading.Lock()
        self._kept: tuple[tuple[int, str, str, float], Any] | None = None

    def ask(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> Generator[str, None, None]:
        """The answers to `bodies`, in their order, `limits.concurrent` at once. When one fails for good the others are stopped.

        Raises:
            EndpointError: the server refused, or did not answer within the limits.
            DataError: OpenAI's own address without a key.
            MissingExtraError: openai or tenacity is not installed.
        """
        stop, client = threading.Event(), self.client()
        with ThreadPoolExecutor(self.limits.concurrent) as pool:
            futures = [pool.submit(self._one_of_all, client, path, body, stop) for body in bodies]
            try:
                for future in futures:
                    yield future.result()
            except StoppedError:
                failed = [future.exception() for future in futures]
                raise next(error for error in failed if error and not isinstance(error, StoppedError)) from None
            finally:
                stop.set()
                for future in futures:
                    future.cancel()

    def client(self) -> Any:
        """The client that `request` sends through, for any number of threads at once. Errors as in `ask`.

        It is kept with its connections, which cost a handshake each, until this object goes; another address, key, timeout
        or process has another one.
        """
        openai, key = _openai(), self._key()
        if not key and self.url == OPENAI:
            raise DataError(f"{self.url} asks for a key and the variable {self.key_env} is not set; set it to your key")
        with self._lock:
            made_for = os.getpid(), self.url, key or "none", self.limits.timeout
            if self._kept is None or self._kept[0] != made_for:
                client = openai.OpenAI(api_key=key or "none", base_url=self.url, timeout=self.limits.timeout, max_retries=0)
                weakref.finalize(self, client.close)  # not sooner: requests may be under way in other threads
                self._kept = made_for, client
            return self._kept[1]

    def request(self, client: Any, path: str, body: Mapping[str, Any], stop: threading.Event) -> str:
        """The answer to one request, with its retries; others are left alone when it fails.

        Raises:
            EndpointError: the server refused, or did not answer within the limits.
            StoppedError: `stop` was set before there was an answer.
        """
        import tenacity

        limits = self.limits

        def wait(state: tenacity.RetryCallState) -> float:
            failed = state.outcome.exception() if state.outcome is not None else None
            asked = failed.after if isinstance(failed, _Passing) else 0.0
            return max(0.5 * 2.0 ** min(state.attempt_number - 1, 6), asked)

        tries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(1 + limits.retries)
            | tenacity.stop_before_delay(limits.total)
            | tenacity.stop_when_event_set(stop),
            wait=wait,
            sleep=tenacity.sleep_using_event(stop),
            retry=tenacity.retry_if_exception_type(_Passing),
            reraise=True,
        )
        began = time.monotonic()
        try:
            return tries(self._once, client, path, body, stop)
        except _Passing as error:
            if stop.is_set():
                raise StoppedError("given up: another request failed for good") from None
            n, seconds = tries.statistics["attempt_number"], time.monotonic() - began
            times = "once" if n == 1 else f"{n} times"
            asked = f"; it asks to wait {error.after:.0f} s" if error.after else ""
            message = f"{self.url}{path}: {error}; tried {times} in {seconds:.0f} s{asked}."
            raise _failed(message, error.status) from None

    def _one_of_all(self, client: Any, path: str, body: Mapping[str, Any], stop: threading.Event) -> str:
        try:
            return self.request(client, path, body, stop)
        except EndpointError:
            stop.set()
            raise

    def _key(self) -> str:
        return os.environ.get(self.key_env) or ""

    def _once(self, client: Any, path: str, body: Mapping[str, Any], stop: threading.Event) -> str:
        openai, key = _openai(), self._key()
        self._pace.wait(self.limits.per_second, stop)
        if stop.is_set():
            raise StoppedError("given up: another request failed for good")
        try:
            answer: str = client.post(path, body=body, cast_to=str)
        except openai.APIStatusError as error:
            words = _said(error.response.text, key)
            if error.status_code in (408, 409, 425, 429) or error.status_code >= 500:
                raise _Passing(
                    f"it answered {error.status_code}: {words}", _retry_after(error.response.headers), error.status_code
                ) from None
            message = f"{self.url}{path} refused the request with {error.status_code}: {words}."
            raise _failed(message, error.status_code) from None
        except openai.APITimeoutError:
            raise _Passing(f"no answer within {self.limits.timeout:g} s", 0.0) from None
        except openai.APIConnectionError as error:
            raise _Passing(f"no connection ({_said(str(error.__cause__ or error), key)})", 0.0) from None
        return answer


class _Passing(Exception):
    """A failure that may pass; `after` is how many seconds the server asks to wait."""

    def __init__(self, what: str, after: float, status: int | None = None):
        super().__init__(what)
        self.after, self.status = after, status


def _failed(message: str, status: int | None) -> EndpointError:
    error = EndpointError(message)  # an OSError takes its meaning from the number of its arguments, so the status is no argument
    error.status = status
    return error


class _Pace:
    """At most so many requests begun in a second, over all threads."""

    def __init__(self) -> None:
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self, per_second: float | None, stop: threading.Event) -> None:
        if per_second is None:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + 1 / per_second
        stop.wait(begin - now)


def _openai() -> Any:
    try:
        import openai
        import tenacity  # noqa: F401 - named here so that one message covers both
    except ImportError as error:
        raise MissingExtraError(
            f"endpoints need the packages openai and tenacity ({error}); run: pip install 'palate[endpoints]'"
        ) from error
    return openai


def _said(words: str, key: str) -> str:
    """What the server said, on one line, shortened, without the key should it repeat it."""
    flat = " ".join((words.replace(key, "[key]") if key else words).split())
    return flat if len(flat) <= 300 else f"{flat[:300]}..."


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: a number or a date; 0 where it does not say."""
    from email.utils import parsedate_to_datetime

    said = headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if seconds < float("inf") else 0.0
