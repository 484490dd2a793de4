"""Scores plans on warm models: assembles a student from the library and measures its fidelity.

Nothing is copied: a student is the teacher with some of its blocks taken from the library, run
block by block; only what is averaged or narrowed untrained is made anew. Teacher, library and
probe are mapped from files that a node fetches once, so on CPUs all scoring processes of a node
share one copy. Plain torch; search/study.py puts it into Ray actors. Shapes: B batch, N image
tokens, C latent channels of a packed token.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from search.budget import Currency
from storage.digest import digest_json
from storage.store import Store, StoreOptions, open_store
from trainers.estimate import USED, Pictures, passing_memory
from trainers.library.library import Library
from trainers.measure import (
    MeasureConfig,
    Table,
    measure_beside,
    measuring_inputs,
    weight_bytes,
)
from trainers.placement import import_models
from trainers.probe import FidelityProbe, ProbeConfig, shared_probe
from trainers.students.families.base import Family, Inputs
from trainers.students.plan import BlockPlan, Plan
from trainers.teacher import Teacher

if TYPE_CHECKING:
    from torch import Tensor, nn


class Score(NamedTuple):
    """What a plan is worth."""

    fidelity_loss: float
    """NaN when the student's velocity is."""
    seconds: float
    """To assemble and measure it."""
    failed: str | None = None
    """Why there is no number, in one sentence."""
    costs: Mapping[Currency, int] = {}
    """Its latency and memory as one model, where these are measured."""


@dataclass(frozen=True)
class Measuring:
    """How a process measures what plans cost as one model."""

    table: Table
    settings: MeasureConfig
    resolution: int
    """Of the latents."""


@dataclass(frozen=True)
class Bench:
    """All that a process needs to score plans: cheap to send, opened once in each."""

    teacher: Teacher
    url: str
    """Of the store that holds latents and library, and takes the scores."""
    encoding: str
    """Prefix of the latents."""
    replacements: tuple[tuple[BlockPlan, str], ...]
    """The library: each replacement and its prefix."""
    scores: str
    """Prefix that scores are kept under."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    seed: int = 0
    options: StoreOptions | None = None
    device: str = "cpu"
    threads: int | None = None
    """CPU threads of a scoring process; None leaves torch alone."""
    measuring: Measuring | None = None
    """None where no budget or objective asks for what plans cost on a device."""

    def key(self, plan: Plan) -> str:
        """Where a plan's score is kept; another for another teacher, probe or replacement."""
        prefixes = dict(self.replacements)
        measured: dict[str, JsonValue] = {
            "teacher": self.teacher.digest,
            "encoding": self.encoding,
            "probe": self.probe.model_dump(mode="json"),
            "seed": self.seed,
            "plan": plan.digest,
            "replacements": [prefixes[b] for b in plan.blocks if b.start == "library"],
        }
        if self.measuring is not None:
            measured["table"] = self.measuring.table.model_dump(mode="json")
            measured["measure"] = self.measuring.settings.model_dump(mode="json")
        return f"{self.scores}/{digest_json(measured)}.json"

    def open(self) -> Scorer:
        """Loads teacher, library and probe."""
        import_models()
        import torch

        from trainers.data.latents import open_latents

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        store = open_store(self.url, self.options, patient=True)
        model = self.teacher.transformer(device=self.device)
        latents = open_latents(store, self.encoding)
        probe = shared_probe(
            store, self.teacher, model, latents, self.encoding, self.probe, self.seed
        )
        meter = None
        if self.measuring is not None:
            each = next(model.parameters())
            inputs = measuring_inputs(
                latents, self.measuring.resolution, self.measuring.settings, each.device, each.dtype
            )
            meter = Meter(self.measuring, inputs)
        library = Library(store, dict(self.replacements))
        # On CPUs replacements are mapped from files, and take nothing.
        free = gpu_free if self.device == "cuda" else None
        return Scorer(self.teacher, model, library, probe, store, meter, free)


@dataclass(frozen=True)
class Meter:
    """What is measured, and on what."""

    measuring: Measuring
    inputs: Sequence[Inputs]


class Scorer:
    """Warm models. Each replacement is loaded when a plan first asks for it, and kept; on a GPU as
    long as there is room."""

    def __init__(
        self,
        teacher: Teacher,
        model: nn.Module,
        library: Library,
        probe: FidelityProbe,
        store: Store,
        meter: Meter | None = None,
        free: Callable[[], int] | None = None,
    ) -> None:
        """`free`: bytes that tensors may still take; None where there is no end of them."""
        self.store = store
        self._meter = meter
        self._family: Family = teacher.family
        self._config = teacher.config
        self._model = model
        self._own = list(self._family.block_modules(model))
        self._library = library
        self._probe = probe
        self._free = free
        self._loaded: OrderedDict[BlockPlan, nn.Module] = OrderedDict()
        """The one that was asked for longest ago first."""

    def score(self, plan: Plan) -> Score:
        """Measure a plan of the teacher's own blocks, the library's, and some cut out of it."""
        started = time.perf_counter()
        blocks = [self._block(block, plan) for block in plan.blocks]
        loss = composed_loss(self._model, self._family, blocks, self._probe)
        costs = {} if self._meter is None else self._costs(blocks, self._meter)
        return Score(loss, time.perf_counter() - started, costs=costs)

    def _costs(self, blocks: Sequence[nn.Module], meter: Meter) -> dict[Currency, int]:
        model, family = self._model, self._family
        outside = weight_bytes([model]) - weight_bytes(self._own)
        found = measure_beside(
            lambda inputs: composed(model, family, self._own, inputs),
            lambda inputs: composed(model, family, blocks, inputs),
            outside + weight_bytes(blocks),
            meter.measuring.table,
            meter.inputs,
            meter.measuring.settings,
        )
        return {"latency": found.latency, "memory": found.memory}

    def _block(self, block: BlockPlan, plan: Plan) -> nn.Module:
        from trainers.students.surgery import make_block, source_block

        if block.depth_only and block.start in ("first", "middle"):
            return self._own[source_block(block)]
        if block not in self._loaded:
            self._make_room(block, plan)
            if block.start == "library":
                made = self._from_library(block)
            else:  # as recovery cuts it out of the teacher
                made = make_block(self._family, self._config, self._own, block)
            self._loaded[block] = made.requires_grad_(False).eval()
        self._loaded.move_to_end(block)
        return self._loaded[block]

    def _make_room(self, block: BlockPlan, plan: Plan) -> None:
        """Drop replacements that the plan has not, until there is room for one more and a pass."""
        if self._free is None:
            return
        each = next(self._model.parameters()).element_size()
        needed = each * self._family.block_parameters(self._config, block) + self._passing()
        for other in [kept for kept in self._loaded if kept not in plan.blocks]:
            if self._free() >= needed:
                return
            del self._loaded[other]

    def _passing(self) -> int:
        """Bytes of the largest pass over the probe."""
        inputs = [chunk.inputs for chunk in self._probe.chunks]
        return max(
            passing_memory(
                self._family,
                self._config,
                len(each.noisy_BNC),
                Pictures(each.noisy_BNC.shape[1], each.embeds_BMD.shape[1]),
            )
            for each in inputs
        )

    def _from_library(self, block: BlockPlan) -> nn.Module:
        example = next(self._model.parameters())
        module = self._family.build_block(self._config, block, "meta")
        weights = {
            name: tensor.to(example.device, example.dtype)
            for name, tensor in self._library(block).items()
        }
        module.load_state_dict(weights, assign=True)
        return module


def gpu_free() -> int:
    """Bytes of the GPU that tensors of this process may still take: a tenth stays free."""
    import torch

    free, whole = torch.cuda.mem_get_info()
    # What the allocator holds for later is free to tensors.
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(free + held - (1 - USED) * whole)


def composed_loss(
    teacher: nn.Module, family: Family, blocks: Sequence[nn.Module], probe: FidelityProbe
) -> float:
    """Fidelity loss of the student that has these blocks inside the teacher's outside.

    The same as `fidelity_loss` of the assembled student. NaN when its velocity is.
    """
    import torch

    from trainers.losses import velocity_loss

    total, pictures = 0.0, 0
    with torch.no_grad():
        for chunk in probe.chunks:
            velocity_BNC = composed(teacher, family, blocks, chunk.inputs)
            count = len(chunk.velocity_BNC)
            total += float(velocity_loss(velocity_BNC, chunk.velocity_BNC)) * count
            pictures += count
    return total / pictures


def composed(
    teacher: nn.Module, family: Family, blocks: Sequence[nn.Module], inputs: Inputs
) -> Tensor:
    """The velocity_BNC of these blocks inside the teacher's outside."""
    state, context = family.begin(teacher, inputs)
    for block in blocks:
        state = family.run_block(block, state, context)
    return family.end(teacher, state, context)
