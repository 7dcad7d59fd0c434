"""How a route gets the body of a request, and how the schema says what it is.

A body is read by pydantic straight from its bytes (`validate_json`), which is quicker than `json.loads` and a check after it, and
strict in JSON's own terms. FastAPI does not see the model then, so a route states it twice: `taken(Model)` as the dependency and
`takes(Model)` for the schema.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Request
from pydantic import TypeAdapter, ValidationError

from palate.errors import DataError
from palate.server.guarding import LARGE, UserId
from palate.server.problems import Problem, invalid

REFERENCE = "#/components/schemas/{model}"

User = Annotated[UserId, Path(description="The user's id: up to 256 characters, percent-encoded, without a slash.")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=256,
        pattern=r"^[\x21-\x7e]+$",
        description="A name of your own for this request: sent again under the same name, it is done once and answered alike.",
    ),
]
Behalf = Annotated[
    str | None,
    Header(
        alias="X-Palate-User",
        pattern=r"^[\x20-\x2e\x30-\x7e]{1,256}$",  # headers have no encoding that all agree on: other ids go into the body
        description="For whom, where the body does not say, in ASCII; without either, the crowd's reward.",
    ),
]

_bodies: dict[str, TypeAdapter[Any]] = {}  # every body that a route takes, by its name in the schema


def reader(model: Any, name: str | None = None) -> TypeAdapter[Any]:
    """What reads a body as `model`, which the schema then describes; `name` is what it calls a model that is no class."""
    name = name or model.__name__
    if name not in _bodies:
        _bodies[name] = TypeAdapter(model)
    return _bodies[name]


def taken(model: Any, name: str | None = None) -> Any:
    """The dependency that gives a body as `reader(model, name)` reads it.

    The dependency raises `Problem`: 400 for what is not JSON, 422 with every flaw for what does not fit.
    """
    adapter = reader(model, name)

    async def dependency(request: Request) -> Any:
        body = await request.body()
        if not body:
            raise Problem(422, "the request has no body; expected JSON", code="invalid", errors=[("", "no body")])
        try:
            return await asyncio.to_thread(adapter.validate_json, body) if len(body) > LARGE else adapter.validate_json(body)
        except ValidationError as error:
            raise invalid(error) from None

    return Depends(dependency)


def takes(model: Any, name: str | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route whose body `taken(model, name)` reads."""
    schema = {"$ref": REFERENCE.format(model=name or model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> None:
    """Put the schemas of the bodies into the OpenAPI document of an app."""
    described: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        known = schema.setdefault("components", {}).setdefault("schemas", {})
        given = [(name, "validation", adapter) for name, adapter in _bodies.items()]
        shapes, definitions = TypeAdapter.json_schemas(given, ref_template=REFERENCE)  # type: ignore[arg-type]
        found = {name: shape for (name, _), shape in shapes.items() if "$ref" not in shape} | definitions.get("$defs", {})
        for name, shape in found.items():
            if known.setdefault(name, shape) != shape:
                raise DataError(f"two bodies are called {name}, and they differ; give one of the models another name")
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
