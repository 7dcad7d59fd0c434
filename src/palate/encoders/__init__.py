"""From texts to features: `load_encoder` by name, `restore_encoder` from what a saved model carries."""

from collections.abc import Callable

from palate.encoders.base import Encoder, State
from palate.encoders.joined import JoinedEncoder
from palate.encoders.minilm import MiniLM
from palate.encoders.offline import Items, Style
from palate.errors import DataError, MismatchError, ModelFileError

__all__ = ["Encoder", "Items", "JoinedEncoder", "MiniLM", "State", "Style", "load_encoder", "restore_encoder"]

_KNOWN: dict[str, Callable[[], Encoder]] = {"items": Items, "minilm": MiniLM, "style": Style}


def load_encoder(spec: str) -> Encoder:
    """The encoder named by `spec`: "items", "style", "minilm", or several joined with "+" ("minilm+style").

    Raises:
        DataError: a name that does not exist, an empty part, the same part twice.
        MissingExtraError: an encoder whose packages are not installed; the message has the command.
    """
    if not isinstance(spec, str):
        raise DataError(f"the encoder is a {type(spec).__name__}; expected a name such as 'minilm+style'")
    names = [name.strip() for name in spec.split("+")]
    for name in names:
        if name not in _KNOWN:
            raise DataError(
                f"there is no encoder {name!r} (in {spec!r}); expected {', '.join(sorted(_KNOWN))}, or several joined with "
                "'+'. Models from a hub or a folder are not supported yet: embed the texts yourself and pass EmbeddedPairs"
            )
    if len(set(names)) != len(names):
        raise DataError(f"{spec!r} names an encoder twice; expected each one once")
    parts = [_KNOWN[name]() for name in names]
    return parts[0] if len(parts) == 1 else JoinedEncoder(parts)


def restore_encoder(state: State) -> Encoder:
    """The encoder whose `state()` was saved, with the same fingerprint.

    Raises:
        ModelFileError: a state that no encoder of this version wrote.
        MismatchError: this version of the encoder computes other features than the saved one did.
    """
    try:
        encoder = _restored(state)
    except (AttributeError, KeyError, TypeError, DataError) as error:
        raise ModelFileError(f"the saved encoder cannot be read ({error!r}); expected what Encoder.state() returns") from error
    if encoder.state() != state:
        raise MismatchError(
            f"the saved encoder {encoder.spec!r} differs from the one in this version of palate, so its features would mean "
            "something else; use the version that wrote it, or fit again"
        )
    return encoder


def _restored(state: State) -> Encoder:
    kind = state["encoder"]
    if kind == "joined":
        return JoinedEncoder([_restored(part) for part in state["parts"]], state["gains"])
    if kind == "items":
        return Items(state["catalogue"])
    if kind == "minilm":
        return MiniLM(state["text"])
    if kind == "style":
        return Style()
    raise ModelFileError(f"the saved encoder is of kind {kind!r}; expected one of joined, {', '.join(sorted(_KNOWN))}")
