"""What the commands share: their options, how they end, and opening what a configuration names.

Exit codes: 0 done, 1 something the user gave is wrong (one sentence says what), 2 wrong usage,
3 a stage, or Espalier itself, failed while it ran, 130 interrupted.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.errors import EspalierError
from storage.retry import hurry

if TYPE_CHECKING:
    from search.config import SweepConfig
    from search.sweep import Sweep

USER_ERROR, USAGE, STAGE_FAILED, INTERRUPTED = 1, 2, 3, 130

ConfigFile = Annotated[
    Path, typer.Argument(help="The sweep's YAML file.", show_default=False, metavar="CONFIG")
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Overrides a key of the configuration, as in --set search.trials=40.",
        metavar="KEY=VALUE",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines to read.")]


class StageError(Exception):
    """A stage ended in an error that is not the user's; its cause is the error."""


@contextmanager
def endings(resume: str | None = None) -> Iterator[None]:
    """Turns what a command raises into one sentence and an exit code.

    `resume` is the command line that takes up interrupted work.
    """
    # A shell starts a background job of a script with SIGINT ignored, and so it stays.
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except EspalierError as error:
        _complain(str(user_error(error) or error), USER_ERROR)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        what += error.strerror or str(error).strip() or type(error).__name__
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what += "; free some space, or set TMPDIR to a folder on another disk"
        _complain(what, USER_ERROR)
    except KeyboardInterrupt:
        if resume is None:
            _complain("interrupted", INTERRUPTED)
        _complain(
            f"interrupted; nothing finished is lost, the sweep resumes with: {resume}", INTERRUPTED
        )
    except StageError as failure:
        cause = failure.__cause__
        mended = user_error(cause)
        if mended is not None:
            _complain(str(mended), USER_ERROR)
        if cause is not None:
            traceback.print_exception(cause, file=sys.stderr)
        again = f"; what is finished stays, run again with: {resume}" if resume else ""
        _complain(f"{failure}{again}", STAGE_FAILED)
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        mended = user_error(error)
        if mended is not None:
            _complain(str(mended), USER_ERROR)
        traceback.print_exception(error, file=sys.stderr)
        lines = str(error).strip().splitlines()
        said = f": {lines[0]}" if lines else ""
        _complain(f"failed, and not by your doing: {type(error).__name__}{said}", STAGE_FAILED)
    finally:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Threads that wait for a store would hold up the end."""
    # `hurry` takes a lock that the main thread, which runs this, may hold at this very moment.
    threading.Thread(target=hurry, daemon=True).start()
    signal.default_int_handler(number, frame)


def user_error(error: BaseException | None) -> EspalierError | None:
    """The outermost EspalierError of an error's causes, also one that Ray carried from a worker."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray's copy of a worker's error is an instance of both classes, with a traceback as its
        # text; the plain error is what it calls its cause.
        carried = getattr(error, "cause", None)
        if isinstance(carried, BaseException):
            error = carried
        elif isinstance(error, EspalierError):
            return error
        else:
            error = error.__cause__ or error.__context__
    return None


def read_config(path: Path, settings: list[str]) -> SweepConfig:
    """The configuration alone, checked field by field."""
    from cluster.configfile import load_config
    from search.config import SweepConfig

    return load_config(path, settings, SweepConfig)


def open_config(path: Path, settings: list[str]) -> Sweep:
    """The sweep of a configuration, with teacher, store and budgets checked."""
    from search.sweep import open_sweep

    quieten_libraries()
    return open_sweep(read_config(path, settings))


def quieten_libraries() -> None:
    """Model libraries warn about what is none of the user's business; set before their import."""
    import logging
    import warnings

    from cluster.connect import prepare_environment

    prepare_environment()
    # diffusers imports torchao wherever it is installed, and that tells of kernels it lacks.
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def command_line(verb: str, path: Path, settings: list[str]) -> str:
    """The command as the user could type it again."""
    import shlex

    words = ["espalier", verb, str(path)]
    for setting in settings:
        words += ["--set", setting]
    return shlex.join(words)


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))


def _complain(sentence: str, code: int) -> None:
    for line in sentence.splitlines():
        print(f"espalier: {line}", file=sys.stderr)
    raise typer.Exit(code)
