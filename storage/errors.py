"""The one base of every error that is the user's to mend: what, where, what to do."""


class EspalierError(Exception):
    """Shown bare by the command line, without a traceback."""
