"""A worker of the library by itself; with others and Ray see test_crew.py and test_workers.py."""

from __future__ import annotations

import subprocess
import sys

HANGS = """
import threading
from types import SimpleNamespace
from trainers.library import worker
from trainers.library.config import LibraryConfig

worker.open_very_teacher = lambda *_: threading.Event().wait()
share = SimpleNamespace(prepare=lambda: print("begun", flush=True))
teacher = SimpleNamespace(address="", digest="", options=None)
config = LibraryConfig(timeout=0.5)
worker.LibraryWorker(teacher, "", None, "", config, None, 0, "sweep", share)
"""


def test_a_worker_whose_loading_hangs_ends_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "begun\n"
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout")
