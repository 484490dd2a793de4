"""A worker's own ear for notice; what a recovery does with it is in tests/faults/test_nodes.py."""

from __future__ import annotations

import signal
import subprocess
import sys

WORKER = """
import os, signal
from trainers.notice import Notice, hear_signals
hear_signals()
notice = Notice(1, lambda said: said, "cpu")  # the first rank asks Ray, too
print(notice.given(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print(notice.given(), notice.given(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still there", flush=True)
"""


def test_the_first_sigterm_is_notice_and_the_second_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.splitlines() == ["False", "True True"]
    assert done.returncode == -signal.SIGTERM
