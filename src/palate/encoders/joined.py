"""Several encoders side by side: what `load_encoder("minilm+style")` makes."""

from collections.abc import Sequence

from palate.data.embeddings import Joined
from palate.data.pairs import Text
from palate.encoders.base import Encoder, State
from palate.errors import DataError


class JoinedEncoder(Encoder):
    """The features of `parts` in their order, each block raw: the model standardises columns on its training pairs.

    Dense columns therefore need no gain. A one-hot block has one scale for all its columns, and `gains` weighs it against the
    rest: a larger gain makes the same ridge weaker on it.

    Args:
        parts: at least two encoders with different specs.
        gains: a positive factor for each block, 1 by default; part of the fingerprint.

    Raises:
        DataError: fewer than two parts, a part twice, or gains that are not positive numbers, one for each part.
    """

    def __init__(self, parts: Sequence[Encoder], gains: Sequence[float] | None = None):
        specs = [part.spec for part in parts]
        if len(parts) < 2 or len(set(specs)) != len(specs):
            raise DataError(f"the parts are {specs}; expected at least two different encoders")
        self.parts = tuple(parts)
        self.gains = tuple(1.0 for _ in parts) if gains is None else tuple(float(gain) for gain in gains)
        if len(self.gains) != len(parts) or not all(0 < gain < float("inf") for gain in self.gains):
            raise DataError(f"gains are {self.gains} for {specs}; expected one finite number above 0 for each")
        self.spec = "+".join(specs)
        named = [part.names for part in parts]
        self.names = None if None in named else tuple(name for names in named for name in names or ())

    def encode(self, texts: Sequence[Text]) -> Joined:
        """(N, sum of the widths) table; `slices` of the result says which columns are whose."""
        return Joined([part.encode(texts) for part in self.parts], self.gains)

    def state(self) -> State:
        return {"encoder": "joined", "version": 1, "parts": [part.state() for part in self.parts], "gains": list(self.gains)}
