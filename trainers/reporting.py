"""What the workers of a Ray Train job tell its driver: seldom, and without waiting for it.

Train's worker holds one report until the driver next looks, every RAY_TRAIN_HEALTH_CHECK_INTERVAL_S
(2 s unless set), and a plain second one waits for that: with a report every few short steps,
training went at the driver's pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_SECONDS = 1.0


class Reporter:
    """One worker's; all workers call it at the same steps."""

    def __init__(self, agreed: Callable[[bool], bool]) -> None:
        """`agreed`: whether something holds for every worker."""
        self._agreed = agreed
        self._told = time.monotonic()

    def tell_now_and_then(self, facts: dict[str, Any]) -> None:
        """Tell, unless the last time was less than a second ago."""
        # For all of them, since Train wants as many reports from each.
        if self._agreed(time.monotonic() - self._told > _SECONDS):
            self.tell(facts)

    def tell(self, facts: dict[str, Any]) -> None:
        """Tell in any case, and wait until all workers do."""
        import ray.train

        self._told = time.monotonic()
        ray.train.report(facts, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
