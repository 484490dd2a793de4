"""What each Ray actor of the library is: opens everything once, makes groups, stores them."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from storage import layout
from storage.manifest import publish_once, withdraw
from storage.store import StoreOptions, open_store
from storage.tensors import save_tensors
from trainers.library.config import LibraryConfig
from trainers.library.library import LOSSES, TENSORS, ReplacementMeta
from trainers.placement import Share
from trainers.probe import FidelityProbe, ProbeConfig, shared_probe
from trainers.students.plan import BlockPlan
from trainers.teacher import Teacher, open_very_teacher

if TYPE_CHECKING:
    from trainers.data.latents import Latents
    from trainers.library.train import Trained


class LibraryWorker:
    """One OS process that trains groups of replacements, or only measures them, and stores them; a
    Ray actor."""

    def __init__(
        self,
        teacher: Teacher,
        url: str,
        options: StoreOptions | None,
        encoding: str,
        config: LibraryConfig,
        probe: ProbeConfig,
        seed: int,
        sweep: str,
        share: Share,
    ) -> None:
        """`sweep`: the name of the one whose checkpoints these are."""
        import faulthandler

        from trainers.data.latents import open_latents

        def alive() -> None:
            # Nobody else can tell loading that hangs from a machine that has yet to come.
            faulthandler.dump_traceback_later(config.timeout, exit=True)

        alive()
        share.prepare()
        # Not `teacher` as it was sent: another may lie at its address by now.
        teacher = open_very_teacher(teacher.address, teacher.digest, teacher.options)
        self._store = open_store(url, options, patient=True)
        self._config, self._seed, self._sweep = config, seed, sweep
        self._family = teacher.family
        self._teacher = teacher.transformer(device=share.device)
        self._latents: Latents = open_latents(self._store, encoding, alive=alive)
        self._probe: FidelityProbe = shared_probe(
            self._store, teacher, self._teacher, self._latents, encoding, probe, seed
        )
        faulthandler.cancel_dump_traceback_later()
        self._steps: list[int] = []
        self._going = threading.Event()

    def machine(self) -> str:
        """Ray's id of the machine that it is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def leave(self) -> None:
        """The machine will be taken away: save what is in training after this step, and end it."""
        self._going.set()

    def steps(self) -> tuple[int, int] | None:
        """From which step the group that is under way went on, and how many are done now; None
        before its training begins, and between groups."""
        return (self._steps[0], self._steps[-1]) if self._steps else None

    def update(self, done: int, total: int, **facts: float | str) -> None:
        """The worker is its own training's progress."""
        self._steps = [*self._steps[:1], done]

    def train(self, group: Sequence[tuple[BlockPlan, str]]) -> bool:
        """Make a group of replacements, measure each in the teacher, and store it under its own
        prefix. False when the machine goes, and they are left in checkpoints."""
        from trainers.evaluate import replacement_damages
        from trainers.library.checkpoints import LeavingError
        from trainers.library.train import cut_replacements

        made = cut_replacements(self._teacher, self._family, [b for b, _ in group if b.untrained])
        if to_train := {block: prefix for block, prefix in group if not block.untrained}:
            try:
                made |= self._trained(to_train)
            except LeavingError:
                return False
        whole = {block: m.module for block, m in made.items() if m.failed is None}
        damages = replacement_damages(self._teacher, self._family, whole, self._probe)
        for block, prefix in group:
            self._publish(prefix, made[block], damages.get(block))
            withdraw(self._store, layout.library_checkpoints(prefix, self._sweep))
        # Not when the next group begins: whoever asks before that would take these for its steps.
        self._steps = []
        return True

    def _trained(self, prefixes: Mapping[BlockPlan, str]) -> dict[BlockPlan, Trained]:
        from trainers.library.checkpoints import Checkpoints
        from trainers.library.train import train_replacements

        every = self._config.checkpoint_every
        checkpoints = Checkpoints(self._store, prefixes, self._sweep, every, self._going)
        try:
            return train_replacements(
                self._teacher,
                self._family,
                list(prefixes),
                self._latents,
                self._config,
                self._seed,
                self,
                checkpoints,
                self._config.micro_batch,
            )
        finally:
            # Whoever trains them next must not meet a save of ours.
            checkpoints.settle()

    def _publish(self, prefix: str, made: Trained, damage: float | None) -> None:
        block, failed = made.block, made.failed
        last = made.losses[-max(1, len(made.losses) // 10) :]
        tail = [loss for loss in last if math.isfinite(loss)]
        if damage is not None and not math.isfinite(damage):
            damage, failed = None, "its damage was not finite"
        meta = ReplacementMeta(
            block=block,
            damage=damage,
            loss=None if failed or not tail else sum(tail) / len(tail),
            failed=failed,
            ridged=made.ridged,
            parameters=sum(p.numel() for p in made.module.parameters()),
            seconds=made.seconds,
            continued=made.continued,
            setbacks=made.setbacks,
            training=None if block.untrained else self._config.training,
        )
        files = {}
        if not block.untrained:
            losses = [loss if math.isfinite(loss) else None for loss in made.losses]
            files[LOSSES] = json.dumps(losses).encode()
            if failed is None:
                files[TENSORS] = save_tensors(made.module.state_dict())
        # Another sweep with the same library may have been first.
        publish_once(self._store, prefix, files, meta.model_dump(mode="json"))
