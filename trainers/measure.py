"""What a forward pass takes on this device: its latency, and its memory at the peak.

Block by block to predict a plan's (`measure_table`), whole to confirm it (`measure_beside`). The
values of weights do not matter to either. Importing this needs no torch, so that a configuration
can hold a `MeasureConfig`.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from storage.section import Section
from trainers.data.sources import of_whole_tokens
from trainers.students.families.base import Config, Family, Inputs, State
from trainers.students.plan import BlockPlan, Plan

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainers.data.latents import Latents


IN_A_ROW = 8
"""Calls of one block that are timed together: in a model one follows another too, so that a GPU's
queue does not run dry, and what else a machine does meets them as it meets a whole model."""


class MeasureConfig(Section):
    """On what latency and peak memory are measured: forward passes of the transformer, one
    denoising step each, in the teacher's dtype, with the longest caption of the data. Latency is
    the mean over all resolutions and batch sizes, memory the largest."""

    resolutions: tuple[Annotated[PositiveInt, AfterValidator(of_whole_tokens)], ...] = ()
    """Pixels a side of the pictures; none stands for data.resolution."""

    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    """Pictures in one pass."""

    warmup: NonNegativeInt = 3
    """Passes before the first that counts."""

    repeats: PositiveInt = 15
    """Passes of which the median counts."""

    margin: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of a latency budget that proposed plans leave free. What they take is predicted as a sum
    over blocks; a finalist must meet the whole budget when it is measured as one model."""


class Cost(Section):
    """What one pass takes."""

    latency: NonNegativeInt
    """Microseconds."""
    memory: NonNegativeInt
    """Bytes: of a model, with its weights; of a part, of everything else that is alive."""


class Table(Section):
    """What the parts of any student of one teacher take on one device."""

    device: str
    """The machine's name for it."""
    bytes_each: PositiveInt
    """Of a parameter."""
    teacher: Cost
    """Measured whole."""
    outside: Cost
    """Before and after the blocks together."""
    blocks: dict[str, Cost]
    """One block, by `variant`."""


def variant(family: Family, config: Config, block: BlockPlan) -> str:
    """Names what decides a block's cost: not its span, but its shape. The number of parameters
    tells a family's kinds of blocks apart."""
    mapped = "-mapped" if block.text_map else ""
    return f"{block.text}{mapped}-{block.ffn}-{family.block_parameters(config, block)}"


def measuring_inputs(
    latents: Latents,
    resolution: int,
    settings: MeasureConfig,
    device: torch.device | str,
    dtype: torch.dtype,
) -> list[Inputs]:
    """A batch of noise for every resolution and batch size. `resolution` is that of the latents."""
    import torch

    from trainers.flow import pack

    lengths = [shard.mask.sum(dim=1) for shard in latents.shards]
    shard, length = max(zip(latents.shards, lengths, strict=True), key=lambda s: int(s[1].max()))
    row, longest = int(length.argmax()), int(length.max())
    embeds_MD = shard.embeds[row, :longest].to(device, dtype)
    rows, columns = latents.grid
    channels, token = shard.latents.shape[1], resolution // rows
    made = []
    for size in settings.resolutions or (resolution,):
        grid = (size // token, size * columns // rows // token)
        for count in settings.batch_sizes:
            noise_BCHW = torch.randn(count, channels, 2 * grid[0], 2 * grid[1])
            pooled = shard.pooled
            made.append(
                Inputs(
                    noisy_BNC=pack(noise_BCHW).to(device, dtype),
                    timestep_B=torch.full((count,), 0.5, device=device, dtype=dtype),
                    embeds_BMD=embeds_MD.repeat(count, 1, 1),
                    mask_BM=None,
                    grid=grid,
                    pooled_BP=None
                    if pooled is None
                    else pooled[row].to(device, dtype).repeat(count, 1),
                )
            )
    return made


def measure_table(
    teacher: nn.Module,
    family: Family,
    config: Config,
    blocks: Sequence[BlockPlan],
    inputs: Sequence[Inputs],
    settings: MeasureConfig,
) -> Table:
    """Measures the teacher, its outside, and one block of every variant among `blocks`, the
    teacher's own among them, on the teacher's device.

    All parts take turns, so that a machine that slows down slows all of them. Latencies of parts
    are scaled to sum up to the whole teacher's: in a model a block finds colder caches than here.
    """
    import torch

    example = next(teacher.parameters())
    chosen = {variant(family, config, block): block for block in reversed(blocks)}
    modules = {
        name: _drawn(family.build_block(config, block, "meta"), example)
        for name, block in chosen.items()
    }
    latencies: list[list[float]] = []
    memories: list[list[int]] = []
    for each in inputs:
        with torch.no_grad():
            parts, alive = _parts(teacher, family, chosen, modules, each)
            latencies.append(_medians(parts, settings, example.device))
            memories.append(
                [_growth(p, example.device) + held for p, held in zip(parts, alive, strict=True)]
            )
    latency = [statistics.mean(column) for column in zip(*latencies, strict=True)]
    memory = [max(column) for column in zip(*memories, strict=True)]
    whole, begin, end = range(3)
    around = latency[begin] + latency[end]
    each_block = {name: latency[3 + i] / IN_A_ROW for i, name in enumerate(modules)}
    own = (BlockPlan(span=(i, i)) for i in range(family.blocks(config)))
    scale = latency[whole] / (around + sum(each_block[variant(family, config, b)] for b in own))
    return Table(
        device=device_name(example.device),
        bytes_each=example.element_size(),
        teacher=Cost(
            latency=_whole(latency[whole]), memory=memory[whole] + weight_bytes([teacher])
        ),
        outside=Cost(latency=_whole(scale * around), memory=max(memory[begin], memory[end])),
        blocks={
            name: Cost(latency=_whole(scale * alone), memory=memory[3 + i])
            for i, (name, alone) in enumerate(each_block.items())
        },
    )


def measure_beside(
    teacher: Callable[[Inputs], object],
    model: Callable[[Inputs], object],
    weights: int,
    table: Table,
    inputs: Sequence[Inputs],
    settings: MeasureConfig,
) -> Cost:
    """What a model of `weights` bytes takes, by forward passes in turn with the teacher's.

    Its latency is the table's of the teacher times the ratio of the two: so a machine that is
    busier than it was for the table does not make a student look slower than the teacher was then.
    """
    import torch

    device = inputs[0].noisy_BNC.device
    with torch.no_grad():
        runs = [partial(run, each) for each in inputs for run in (teacher, model)]
        medians = _medians(runs, settings, device)
        peak = max(_growth(partial(model, each), device) + _held(each) for each in inputs)
    ratio = sum(medians[1::2]) / sum(medians[::2])
    return Cost(latency=_whole(ratio * table.teacher.latency), memory=weights + peak)


def shaped_model(family: Family, config: Config, plan: Plan, like: torch.Tensor) -> nn.Module:
    """The student of a plan with weights drawn at random, on the device and in the dtype of `like`:
    as fast and as large as any other of that plan."""
    return _drawn(family.build(config, plan, "meta"), like)


def weight_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of the parameters of some modules."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def device_name(device: torch.device | str) -> str:
    """What tells one kind of device from another, and how much of a CPU is used."""
    import platform
    from pathlib import Path

    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not an x86
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def _parts(
    teacher: nn.Module,
    family: Family,
    chosen: Mapping[str, BlockPlan],
    modules: Mapping[str, nn.Module],
    inputs: Inputs,
) -> tuple[list[Callable[[], object]], list[int]]:
    """The whole teacher, what is before and after its blocks, and each module, ready to run; and
    the bytes that are alive when each starts, weights apart."""
    state, context = family.begin(teacher, inputs)
    before = {}
    for index, block in enumerate(family.block_modules(teacher)):
        before[index] = state
        state = family.run_block(block, state, context)
    starts = {name: before[block.span[0]] for name, block in chosen.items()}
    parts: list[Callable[[], object]] = [
        lambda: family.forward(teacher, inputs),
        lambda: family.begin(teacher, inputs),
        lambda: family.end(teacher, state, context),
    ]

    def in_a_row(module: nn.Module, start: State) -> None:
        for _ in range(IN_A_ROW):
            family.run_block(module, start, context)

    parts += [partial(in_a_row, modules[name], start) for name, start in starts.items()]
    alive = [_held(inputs), _held(inputs), _held(inputs, state, context)]
    alive += [_held(inputs, starts[name], context) for name in modules]
    return parts, alive


def _medians(
    works: Sequence[Callable[[], object]], settings: MeasureConfig, device: torch.device
) -> list[float]:
    """Microseconds of each, taking turns."""
    for _ in range(settings.warmup):
        for work in works:
            work()
    rounds = [[_microseconds(work, device) for work in works] for _ in range(settings.repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _microseconds(work: Callable[[], object], device: torch.device) -> float:
    import torch

    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - started)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    work()
    after.record()
    after.synchronize()
    return 1e3 * before.elapsed_time(after)


def _growth(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that are alive at most while `work` runs, beyond those before it."""
    import torch

    if device.type != "cuda":
        return live_bytes(work)
    work()  # what libraries keep for themselves from their first call on does not count
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def live_bytes(work: Callable[[], object]) -> int:
    """The same on a CPU, which keeps no count: every storage that an operation makes is counted
    until it is freed. What an operation allocates and frees inside itself is not seen."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    known: set[int] = set()
    live = peak = 0

    def freed(storage: int, size: int) -> None:
        nonlocal live
        known.discard(storage)
        live -= size

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal live, peak
            given = {id(s) for s in _storages((args, kwargs))}
            made = func(*args, **(kwargs or {}))
            for storage in _storages(made):
                if id(storage) not in given | known:
                    known.add(id(storage))
                    live += storage.nbytes()
                    peak = max(peak, live)
                    weakref.finalize(storage, freed, id(storage), storage.nbytes())
            return made

    def _storages(tree: Any) -> list[Any]:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    with Counting():
        work()
    return peak


def _held(inputs: Inputs, *trees: Any) -> int:
    """Bytes of all tensors, what several share once. Of a table that a model owns and lends a view
    of, only what is seen counts."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    seen: dict[int, int] = {}
    for tensor in tree_leaves((list(vars(inputs).values()), trees)):
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            size = seen.get(storage.data_ptr(), 0) + tensor.numel() * tensor.element_size()
            seen[storage.data_ptr()] = min(storage.nbytes(), size)
    return sum(seen.values())


def _drawn(module: nn.Module, like: torch.Tensor) -> nn.Module:
    """A module from the meta device with weights as they may be in a model: memory as it was found
    holds numbers that slow a CPU down."""
    import torch

    weights = {
        name: 0.02 * torch.randn(empty.shape, device=like.device, dtype=like.dtype)
        for name, empty in module.state_dict().items()
    }
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def _whole(microseconds: float) -> int:
    return max(1, round(microseconds))
