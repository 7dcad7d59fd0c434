"""The two routes that are asked most, answered without the framework's machinery, which costs more than a ranking does.

They are declared in `own` like every other route: the schema comes from there, and so does every refusal. What stands here takes
a request only when there is nothing to refuse, with the same readers of the id, the key and the body; any other it hands on,
unread as far as the framework can tell.
"""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from palate.server.access import permitted
from palate.server.guarding import LARGE, again
from palate.server.keys import Scoped
from palate.server.parsing import Key, User, reader
from palate.server.people import Who
from palate.server.problems import Problem

_USER: TypeAdapter[str] = TypeAdapter(User)
_KEY: TypeAdapter[str | None] = TypeAdapter(Key)
_PASSED = "passed_on"  # in the state of a request that was handed on


class Asked(NamedTuple):
    """A request that nothing is wrong with."""

    who: Who
    body: Any
    key: str | None


class Answer(NamedTuple):
    """What to send: a model, and headers beside those that every answer has."""

    body: BaseModel
    headers: dict[str, str]


class Direct(Route):
    """A POST route about one user, in front of the framework's own of the same path.

    Args:
        path: as it is declared there, with `{user_id}`.
        needs: the scope of a key.
        model: of the body, and its name in the schema if it is no class, as `parsing.taken` was given them.
        answer: what to do. Whatever it raises is answered like an error of any route.
        rest: where to hand a request on to.
    """

    def __init__(
        self,
        path: str,
        needs: Scoped,
        model: Any,
        answer: Callable[[Asked], Awaitable[Answer]],
        rest: ASGIApp,
        *,
        name: str | None = None,
    ):
        self.needs, self.read, self.answer, self.rest = needs, reader(model, name).validate_json, answer, rest
        super().__init__(path, answer, methods=["POST"], include_in_schema=False)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """This path with this method and nothing else: what else a path takes, the framework knows."""
        if scope["type"] != "http" or scope["method"] != "POST" or _PASSED in scope.get("state", {}):
            return Match.NONE, {}
        match, found = super().matches(scope)
        return (match, {**found, "route": self}) if match is Match.FULL else (Match.NONE, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        message = await receive()
        asked = None if message.get("more_body") else self._asked(scope, message.get("body", b""))
        if asked is None:
            scope.setdefault("state", {})[_PASSED] = True
            await self.rest(scope, again(message, receive), send)
            return
        body, headers = await self.answer(asked)
        sent = body.__pydantic_serializer__.to_json(body)
        told = [(b"content-length", b"%d" % len(sent)), (b"content-type", b"application/json")]
        told += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": told})
        await send({"type": "http.response.body", "body": sent})

    def _asked(self, scope: Scope, body: bytes) -> Asked | None:
        """What is asked, None where it has to be refused, or takes long to read."""
        if len(body) > LARGE:
            return None
        key = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"idempotency-key"), None)
        try:
            caller = permitted(scope, self.needs)
            user_id = _USER.validate_python(scope["path_params"]["user_id"])
            return Asked((caller.tenant, user_id), self.read(body), _KEY.validate_python(key))
        except (Problem, ValidationError):
            return None
