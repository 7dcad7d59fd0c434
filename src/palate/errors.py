"""The errors that Palate raises on purpose.

Each one is also the standard-library error that a caller would expect, so `except ValueError` keeps working, and each message
says what was wrong (with the value), what was expected, and what to do. They pickle, so they survive a worker process.
"""


class PalateError(Exception):
    """Base of every error raised on purpose by this library."""


class DataError(PalateError, ValueError):
    """Rows, arrays or arguments that cannot be what the caller meant."""


class LeakError(DataError):
    """The same information stands on both sides of a split, or a side can be told from its format alone."""


class UnknownUserError(PalateError, KeyError):
    """A user id for which there is no profile; never answered with somebody else's."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class ModelFileError(PalateError, ValueError):
    """A saved model that is corrupt, foreign, or written by a newer version."""


class MismatchError(PalateError, ValueError):
    """Two things that do not belong together: a profile and another model, a model and another encoder."""


class ConvergenceError(PalateError, RuntimeError):
    """A solver that stopped before its tolerance."""


class MissingExtraError(PalateError, ImportError):
    """An optional package that is not installed; the message holds the command that installs it."""
