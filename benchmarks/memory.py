"""Memory that tensors take while something runs, counted on any device, a CPU too."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, from its making to its end.

    What was there before is not counted, nor what a kernel takes for itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, int] = {}
        self.now = 0
        """Bytes held at this moment."""
        self.peak = 0
        """The most that were held at any."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._note(value, size=0)  # unless noted by now, it was there before
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value, size=value.untyped_storage().nbytes())
        return result

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._held:
            return
        self._held[id(storage)] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage))

    def _gone(self, key: int) -> None:
        self.now -= self._held.pop(key)


class DeviceMemory(PeakMemory):
    """Counts what a device would hold that is not there: tensors on `meta` stand for its own. What
    is copied to the CPU is zeros there, and not counted."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        copies = func is torch.ops.aten._to_copy.default and args[0].is_meta
        if copies and kwargs and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _note(self, tensor: Tensor, size: int) -> None:
        if tensor.is_meta:
            super()._note(tensor, size)
