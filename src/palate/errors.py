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


class StoreError(PalateError, OSError):
    """The store of profiles could not do what it was asked; nothing that it acknowledged before is lost."""


class StoreBusyError(StoreError):
    """The store is locked, slow or has too much waiting; the same call can succeed in a moment."""


class QueueFullError(StoreBusyError):
    """More writes are waiting than the queue may hold; nothing of this one was kept."""


class StoreDownError(StoreError):
    """No answer from the database server. A write that was under way may or may not have landed; ask again under its key."""


class StoreFullError(StoreError):
    """The disk, or the share of it that the store may use, is full; what was asked for is not written."""


class StoreReadOnlyError(StoreError):
    """The store can be read and not written."""


class StoreCorruptError(StoreError):
    """The file is damaged, or no store of Palate at all."""
