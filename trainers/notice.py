"""Hears that a worker's machine will be taken away while there is still time to save.

Two things say so. Ray marks the machine as draining: its autoscaler does, and so does `ray start
--block` when the scheduler or the cloud sends it SIGTERM; it ends what runs there only after
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, 30 s. Or the worker's own process gets SIGTERM. Who gives
notice thus says how long the grace lasts; who hears it saves at once and leaves.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Ray is asked no more often: its answer is a call to another process.
_ASK_SECONDS = 1.0

_told = threading.Event()


def going_machines() -> set[str]:
    """Ids of the cluster's machines that will be taken away, as Ray Train asks for them."""
    import ray._private.state

    return set(ray._private.state.state.get_draining_nodes())


class Notice:
    """Whether this attempt should save and leave; all ranks ask after every step and agree."""

    def __init__(self, rank: int, mean: Callable[[Tensor], Tensor], device: Any) -> None:
        """`mean` is that over all ranks, `device` where it is taken."""
        self._rank, self._mean, self._device = rank, mean, device
        self._asked = time.monotonic()

    def given(self) -> bool:
        """Whether any rank has been told. Every rank must call it equally often."""
        import ray.train
        import torch

        due = self._rank == 0 and time.monotonic() - self._asked >= _ASK_SECONDS
        said = torch.tensor([float(_told.is_set()), float(due)], device=self._device)
        told, ask = self._mean(said).tolist()
        if ask and not told:
            self._asked = time.monotonic()
            told = ray.train.get_preemption_info() is not None
        return bool(told)


def hear_signals() -> None:
    """Take the first SIGTERM to this process for a notice; a second one does what it did before.

    Called in the main thread, as Python demands it of signals; training runs in another.
    """
    before = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: FrameType | None) -> None:
        _told.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, hear)


def hearing_torch() -> Any:
    """Ray Train's torch backend, its workers hearing signals."""
    from ray.train.torch import TorchConfig

    torch_backend: Any = TorchConfig().backend_cls

    class HearingBackend(torch_backend):
        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(hear_signals)

    class HearingTorch(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return HearingBackend

    return HearingTorch()
