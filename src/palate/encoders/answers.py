"""What a server of embeddings answered, checked number by number, or an error that says what was wrong with it."""

import base64
import binascii
import json
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from palate.errors import DataError


def rows_of(answer: str, n: int, field: str, named: str) -> tuple[NDArray[np.float32], str]:
    """The (n, D) rows of `{"data": [{"index": i, field: numbers}, ...], "model": name}` in the order of `index`, and the name.

    Numbers are a list, or base64 of little-endian float32.

    Raises:
        DataError: no JSON, a row too few or too many, an index that is missing or twice, rows of different widths, something
            that is no finite number, a row of zeros alone.
    """

    def constant(name: str) -> NoReturn:
        raise DataError(f"{named} answered with {name}; expected finite numbers. Nothing is made up in their place")

    try:
        whole = json.loads(answer, parse_constant=constant)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{named} answered {len(answer):,} characters that are no JSON ({error}), beginning with {answer[:80]!r}; the body "
            "was cut off on its way, or this is another kind of server"
        ) from None
    data = whole.get("data") if isinstance(whole, dict) else None
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise DataError(f"{named} answered {answer[:80]!r}, which has no list 'data' of objects; is the address right?")
    if len(data) != n:
        raise DataError(f"{named} gave {len(data)} rows for {n} texts; expected one for each")
    places = [row.get("index") for row in data]
    if any(type(place) is not int for place in places) or sorted(places) != list(range(n)):
        raise DataError(f"{named} gave rows with the indexes {places[:8]}; expected each of 0 to {n - 1} once")
    rows: list[Any] = [None] * n
    for row in data:
        rows[row["index"]] = _numbers(row.get(field), field, row["index"], named)
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1:
        raise DataError(f"{named} gave rows of {' and '.join(map(str, widths))} numbers in one answer; expected one width")
    table = np.stack(rows)
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(bad):
        raise DataError(f"{named} gave NaN or infinite numbers for text {bad[0]} of the request; expected finite ones")
    empty = np.flatnonzero(~table.any(axis=1))
    if len(empty):
        raise DataError(f"{named} gave only zeros for text {empty[0]} of the request, which no model computes; expected features")
    served = whole.get("model")
    return table, served if isinstance(served, str) else ""


def _numbers(value: Any, field: str, place: int, named: str) -> NDArray[np.float32]:
    """One row as float32; what overflows becomes infinite, which the caller refuses."""
    if isinstance(value, str):
        try:
            raw = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise DataError(f"{named} gave text {place} as {value[:40]!r}, which is no base64 ({error})") from None
        if len(raw) % 4 or not raw:
            raise DataError(f"{named} gave text {place} as {len(raw)} bytes; expected float32, four bytes a number")
        return np.frombuffer(raw, dtype="<f4").astype(np.float32)
    if not isinstance(value, list) or not value or any(type(number) not in (int, float) for number in value):
        shown = json.dumps(value)[:60]
        raise DataError(f"{named} gave text {place} the {field} {shown}; expected a list of numbers, one row for a text")
    with np.errstate(over="ignore"):
        return np.asarray(value, dtype=np.float64).astype(np.float32)
