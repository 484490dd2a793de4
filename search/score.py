"""Scores plans on warm models: assembles a student from the library and measures its fidelity.

Nothing is copied: a student is the teacher with some of its blocks taken from the library, run
block by block; only what is averaged or narrowed untrained is made anew. Teacher, library and
probe are mapped from files that a node fetches once, so on CPUs all scoring processes of a node
share one copy. Plain torch; search/study.py puts it into Ray actors. Shapes: B batch, N image
tokens, C latent channels of a packed token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from search.budget import Currency
from storage.digest import digest_json
from storage.store import Store, StoreOptions, open_store
from trainers.library.library import Library
from trainers.measure import (
    MeasureConfig,
    Table,
    measure_beside,
    measuring_inputs,
    weight_bytes,
)
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
        return Scorer(self.teacher, model, library, probe, store, meter)


@dataclass(frozen=True)
class Meter:
    """What is measured, and on what."""

    measuring: Measuring
    inputs: Sequence[Inputs]


class Scorer:
    """Warm models. Each replacement is loaded when a plan first asks for it, and kept."""

    def __init__(
        self,
        teacher: Teacher,
        model: nn.Module,
        library: Library,
        probe: FidelityProbe,
        store: Store,
        meter: Meter | None = None,
    ) -> None:
        self.store = store
        self._meter = meter
        self._family: Family = teacher.family
        self._config = teacher.config
        self._model = model
        self._own = list(self._family.block_modules(model))
        self._library = library
        self._probe = probe
        self._loaded: dict[BlockPlan, nn.Module] = {}

    def score(self, plan: Plan) -> Score:
        """Measure a plan of the teacher's own blocks, the library's, and some cut out of it."""
        started = time.perf_counter()
        blocks = [self._block(block) for block in plan.blocks]
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

    def _block(self, block: BlockPlan) -> nn.Module:
        if block.untouched:
            return self._own[block.span[0]]
        if block not in self._loaded:
            made = self._from_library(block) if block.start == "library" else self._cut(block)
            self._loaded[block] = made.requires_grad_(False).eval()
        return self._loaded[block]

    def _from_library(self, block: BlockPlan) -> nn.Module:
        example = next(self._model.parameters())
        module = self._family.build_block(self._config, block, "meta")
        weights = {
            name: tensor.to(example.device, example.dtype)
            for name, tensor in self._library(block).items()
        }
        module.load_state_dict(weights, assign=True)
        return module

    def _cut(self, block: BlockPlan) -> nn.Module:
        """As recovery cuts it out of the teacher."""
        from trainers.students.surgery import make_block, source_block

        if block.depth_only and block.start != "average":
            return self._own[source_block(block)]
        return make_block(self._family, self._config, self._own, block)


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
