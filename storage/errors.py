"""Errors that are the user's to mend: what, where, what to do. One base, and those of storage."""


class EspalierError(Exception):
    """Shown bare by the command line, without a traceback."""


class StoreError(EspalierError):
    """A store cannot be reached, refuses the credentials, or was asked for what it cannot do."""


class MissingKey(StoreError):  # noqa: N818 - reads as what it is, like KeyError
    """Nothing is stored under the key."""


class DamagedError(EspalierError):
    """Something stored is not what was written: cut short, altered, or of another kind."""
