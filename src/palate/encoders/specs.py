"""How an encoder is named in one line: `minilm+style`, `st:org/name?text=response`, `hf:./folder+style`.

    spec   = part *( "+" part )
    part   = name [ "?" option *( "&" option ) ]
    name   = "style" | "minilm" | ... | kind ":" source
    option = key "=" value

A source is a folder or an id, and a folder's name may hold a plus sign. So after a `kind:` a plus sign ends the part only where
a name that exists, or a `kind:`, follows it. What would be misread is written as in an address: %2B for "+", %3F for "?", %26
for "&", %25 for "%"; `str` of a part does it.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from palate.errors import DataError

_PLAIN = "/:@,= ~\\()[]!'"  # beside letters, digits and _.-: what may stand in a source or a value as it is


class Part(NamedTuple):
    """One encoder of a spec: the kind that makes it, what it is made from ("" for a name alone), and its options."""

    kind: str
    source: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """The part as `parse` reads it."""
        named = f"{self.kind}:{_quoted(self.source)}" if self.source else _quoted(self.kind)
        return f"{named}?{'&'.join(f'{key}={_quoted(value)}' for key, value in self.options)}" if self.options else named


def _quoted(text: str) -> str:
    # Letters of any alphabet stay readable; quote() would turn them into bytes.
    return "".join(letter if ord(letter) > 127 else quote(letter, safe=_PLAIN) for letter in text)


def parse(spec: str, names: Collection[str], kinds: Collection[str]) -> list[Part]:
    """The parts of `spec` in their order, in O(its length).

    Args:
        spec: what the module's docstring describes; spaces around a part are dropped.
        names: that stand alone ("style"); a name outside them is kept as it is, for the caller to judge.
        kinds: that take a source ("st").

    Raises:
        DataError: an option without "=" or twice, a kind without a source.
    """
    begins = re.compile(rf"\s*(?:(?:{'|'.join(map(re.escape, kinds))}):|(?:{'|'.join(map(re.escape, names))})\s*(?:[?+]|$))")
    pieces: list[str] = []
    start, sourced = 0, False  # of the piece that is being read; whether a plus sign may belong to it
    for i, letter in enumerate(spec):
        if i == start:
            sourced = any(spec[start:].lstrip().startswith(f"{kind}:") for kind in kinds)
        if letter == "+" and (not sourced or begins.match(spec, i + 1)):
            pieces.append(spec[start:i])
            start = i + 1
    pieces.append(spec[start:])
    return [_part(piece.strip(), spec, kinds) for piece in pieces]


def _part(piece: str, spec: str, kinds: Collection[str]) -> Part:
    named, asked, listed = piece.partition("?")
    kind, colon, source = named.partition(":")
    if not colon or kind not in kinds:
        kind, source = unquote(named), ""
    elif not source:
        raise DataError(f"{piece!r} (in {spec!r}) names nothing after {kind!r}; expected '{kind}:' and an id or a folder")
    options: dict[str, str] = {}
    for option in listed.split("&") if asked else ():
        key, equals, value = option.partition("=")
        if not equals or not key or key in options:
            raise DataError(f"{piece!r} (in {spec!r}) has the option {option!r}; expected key=value, every key once")
        options[key] = unquote(value)
    return Part(kind, unquote(source), tuple(options.items()))


def chosen(options: Mapping[str, str], texts: Collection[str], numbers: Collection[str], kind: str) -> dict[str, Any]:
    """`options` as a constructor takes them, those among `numbers` as whole numbers.

    Raises:
        DataError: an option that `kind` does not have, or no whole number where one is expected.
    """
    out: dict[str, Any] = {}
    for key, value in options.items():
        if key not in texts and key not in numbers:
            known = ", ".join(sorted([*texts, *numbers])) or "none"
            raise DataError(f"the encoder {kind!r} has no option {key!r}; expected one of: {known}")
        if key in numbers and not value.isdecimal():
            raise DataError(f"the option {key} of the encoder {kind!r} is {value!r}; expected a whole number")
        out[key] = int(value) if key in numbers else value
    return out
