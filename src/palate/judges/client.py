"""`Chat`: a model behind any OpenAI-compatible `/chat/completions`, asked many things at once and never the same thing twice.

The requests, their retries and their limits are those of `palate.encoders.asking`. On top of it: every request ends in a `Reply`
or in a `ChatError` that says what went wrong, one failure never costs the others, and an answer is in the cache as soon as it is
there, so that a run that was killed asks only for what is missing.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from palate.data.pairs import Message
from palate.encoders.asking import OPENAI, EndpointError, Limits, Server
from palate.errors import DataError, PalateError
from palate.judges.ledger import Ledger, Usage
from palate.judges.stored import Stored

PATH = "/chat/completions"
DENIED = (401, 403, 404)  # said of the key, the address or the model: what one request hears, all of them will
GIVE_UP_AFTER = 8  # requests in a row that failed after all their retries: the server is down

Kind = Literal["endpoint", "budget", "malformed", "empty", "refusal", "truncated"]


class Request(NamedTuple):
    """One question. `seed` goes to the server, which may ignore it; another seed is another question, so another answer."""

    messages: tuple[Message, ...]
    temperature: float = 0.0
    seed: int | None = None
    max_tokens: int = 512


class Reply(NamedTuple):
    """One answer. Tokens are None where the server does not count them; `cached` says that it was read, not asked for."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    cached: bool = False

    @property
    def truncated(self) -> bool:
        """The answer was cut off at `max_tokens`."""
        return self.finish_reason == "length"


class ChatError(PalateError):
    """A request that came to no answer; the message says why.

    Attributes:
        kind: "endpoint" (refused, or not answered within the limits), "budget" (never sent), "malformed" (what came is no answer
            of a chat), "empty" (an answer without text), "refusal" (the model or its filter declined) or "truncated" (where only
            a whole answer will do).
    """

    def __init__(self, message: str, kind: Kind = "endpoint"):
        super().__init__(message)
        self.kind: Kind = kind


@dataclass(frozen=True)
class _Asked:
    key: str
    body: dict[str, Any]
    max_tokens: int


class Chat:
    """A model behind an address that speaks OpenAI's `/chat/completions`: OpenAI, vLLM, llama.cpp, Ollama and others.

    Args:
        model: the name that the server knows it by.
        base_url: such as 'http://localhost:8000/v1'; where None, $OPENAI_BASE_URL, else OpenAI's. No part of the cache's keys.
        key_env: the environment variable that holds the key; the key itself is in no file and no message.
        limits: retries and timeouts (`Limits`).
        cache: folder in which answers are kept; None for none.
        workers: requests at once, in place of `limits.concurrent`.
        ledger: counts calls and tokens and holds the budget; may be shared by several clients.
        limit_field: what the server calls the limit of an answer; OpenAI's newer models want "max_completion_tokens".
        fields: further fields of every request, such as {"reasoning_effort": "low"}; {"temperature": None} leaves one out.

    Raises:
        DataError: no model, fields that would change what is asked, or an address that is none or holds a secret.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_env: str = "OPENAI_API_KEY",
        limits: Limits | None = None,
        cache: Path | None = None,
        workers: int = 8,
        ledger: Ledger | None = None,
        limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        fields: Mapping[str, Any] | None = None,
    ):
        if not model:
            raise DataError("the model has no name; expected the name that the server knows it by")
        self.model, self.limit_field, self.fields = model, limit_field, dict(fields or {})
        if wrong := set(self.fields) & {"model", "messages", "n", "stream", limit_field}:
            raise DataError(f"fields sets {', '.join(sorted(wrong))}; these are asked for otherwise, or change what comes back")
        self.server = Server(
            base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI, key_env, replace(limits or Limits(), concurrent=workers)
        )
        self.ledger = ledger or Ledger()
        self.stored = None if cache is None else Stored(Path(cache))

    def __repr__(self) -> str:
        return f"Chat({self.model!r}, base_url={self.server.url!r})"

    def ask(
        self, messages: Sequence[Message], *, temperature: float = 0.0, seed: int | None = None, max_tokens: int = 512
    ) -> Reply:
        """The answer to one conversation. Raises `ChatError` where there is none; other errors as in `ask_all`."""
        (out,) = self.ask_all([Request(tuple(messages), temperature, seed, max_tokens)])
        if isinstance(out, ChatError):
            raise out
        return out

    def ask_all(self, requests: Sequence[Request]) -> list[Reply | ChatError]:
        """The answers in the order of the requests, `workers` at once; equal requests are sent once.

        A request that fails leaves a `ChatError` in its place and the others go on; but once the server denies the key or the
        model, or 8 requests in a row fail with all their retries, those not yet begun fail with the same words. Failures are
        not cached, so the next call asks for them again, unless both are of `one_run` and the server was given up.

        Raises:
            DataError: a request that cannot be sent, or OpenAI's own address without a key.
            MissingExtraError: openai or tenacity is not installed.
        """
        asked = [self._prepared(request) for request in requests]
        out: dict[str, Reply | ChatError] = {}
        missing: dict[str, _Asked] = {}
        for one in asked:
            if one.key in out or one.key in missing:
                continue
            reply = self._read(one.key)
            if reply is None:
                missing[one.key] = one
            else:
                out[one.key] = reply
        self.ledger.found(sum(isinstance(out.get(one.key), Reply) for one in asked))
        if missing:
            out |= self._sent(list(missing.values()))
        return [out[one.key] for one in asked]

    def _prepared(self, request: Request) -> _Asked:
        # half of a surrogate pair, which broken exports hold, is no UTF-8 and would fail on its way out
        sent = ((turn.role, turn.content.encode("utf-8", "replace").decode()) for turn in request.messages)
        messages = [{"role": role, "content": content} for role, content in sent]
        if not messages or request.max_tokens < 1 or not request.temperature >= 0:
            raise DataError(
                f"a request of {len(messages)} messages, temperature {request.temperature} and max_tokens {request.max_tokens}; "
                "expected at least 1 message, a temperature from 0 and at least 1 token"
            )
        body = {"model": self.model, "messages": messages, "temperature": request.temperature, "seed": request.seed}
        body |= {self.limit_field: request.max_tokens, **self.fields}
        body = {name: value for name, value in body.items() if value is not None}
        # where a field sets the seed or leaves it out, the request's own still tells one sample from another
        named = body | {"sample": request.seed} if "seed" in self.fields else body
        packed = json.dumps(named, sort_keys=True, separators=(",", ":"))
        return _Asked(hashlib.sha256(packed.encode()).hexdigest(), body, request.max_tokens)

    def _read(self, key: str) -> Reply | None:
        kept = None if self.stored is None else self.stored.read(key)
        return None if kept is None else Reply(**kept, cached=True)

    def _sent(self, asked: Sequence[_Asked]) -> dict[str, Reply | ChatError]:
        breakers = _breakers.get()
        breaker = _Breaker() if breakers is None else breakers.setdefault(self, _Breaker())
        stop, client = threading.Event(), self.server.client()
        with self.ledger.timed(), ThreadPoolExecutor(self.server.limits.concurrent) as pool:
            futures = {one.key: pool.submit(self._answered, client, one, stop, breaker) for one in asked}
            try:
                return {key: future.result() for key, future in futures.items()}
            finally:  # on an interrupt nothing more is begun, and nobody waits out a pause
                stop.set()
                for future in futures.values():
                    future.cancel()

    def _answered(self, client: Any, asked: _Asked, stop: threading.Event, breaker: "_Breaker") -> Reply | ChatError:
        if breaker.words is not None:
            return ChatError(f"not asked, because the server fails: {breaker.words}", "endpoint")
        reserve = asked.max_tokens
        spent = self.ledger.begin(reserve)
        if spent is not None:
            return ChatError(f"{spent}; raise it and run again: what was answered is in the cache", "budget")
        usage, out = None, None
        try:
            text = self.server.request(client, PATH, asked.body, stop)
            usage, out = _understood(text)
            breaker.passed()
        except EndpointError as error:
            breaker.failed(error)
            out = ChatError(str(error), "endpoint")
        finally:
            self.ledger.end(reserve, usage, failed=not isinstance(out, Reply))
        if isinstance(out, Reply) and self.stored is not None:
            self.stored.write(asked.key, {name: value for name, value in out._asdict().items() if name != "cached"}, asked.body)
        return out


class _Breaker:
    """Knows when asking on is pointless: the server denies everybody, or has failed many times without a good answer between."""

    def __init__(self) -> None:
        self.words: str | None = None
        self._in_a_row = 0
        self._lock = threading.Lock()

    def passed(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def failed(self, error: EndpointError) -> None:
        refused = error.status is not None and error.status < 500 and error.status not in (408, 409, 425, 429)
        with self._lock:
            self._in_a_row += not refused  # a refused request is about itself: the server is well
            if error.status in DENIED or self._in_a_row >= GIVE_UP_AFTER:
                self.words = self.words or str(error)


_breakers: ContextVar[dict[Chat, _Breaker] | None] = ContextVar("_breakers", default=None)  # of the run that this thread is in


@contextmanager
def one_run() -> Iterator[None]:
    """Inside, all calls of a `Chat` share what it learnt of its server: once given up, it is not asked again before the end."""
    token = _breakers.set({})
    try:
        yield
    finally:
        _breakers.reset(token)


def _understood(text: str) -> tuple[Usage, Reply | ChatError]:
    """What an answer of the server says; whatever is not surely a finished or truncated answer with text is a `ChatError`."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return Usage(None, None), ChatError(f"the answer is no JSON: {text[:120]!r}", "malformed")
    counted = answer.get("usage") if isinstance(answer, Mapping) else None
    usage = Usage(_count(counted, "prompt_tokens"), _count(counted, "completion_tokens"))
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list):
        return usage, ChatError(f"the answer has no list of choices: {text[:120]!r}", "malformed")
    if not choices:
        return usage, ChatError("the answer has 0 choices; expected 1", "empty")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping):
        return usage, ChatError(f"the choice has no message: {text[:120]!r}", "malformed")
    content, finish = message.get("content"), choice.get("finish_reason")
    if message.get("refusal") or finish == "content_filter":
        return usage, ChatError(f"declined: {str(message.get('refusal') or 'by a content filter')[:200]}", "refusal")
    if not (content is None or isinstance(content, str)) or not (finish is None or isinstance(finish, str)):
        return usage, ChatError(f"the content is no text: {text[:120]!r}", "malformed")
    if not content or not content.strip():
        return usage, ChatError(f"the answer has no text (finish_reason {finish!r})", "empty")
    return usage, Reply(content, usage.prompt, usage.completion, finish)


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
