"""Spreads drawing and judging over Ray actors that share the captions of every model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from search.judging import TEACHER, Drawn, JudgeConfig, draw, gathered, write_judged
from storage.store import Store, StoreOptions, open_store
from trainers.placement import Share, share_of
from trainers.progress import Progress
from trainers.teacher import Teacher

if TYPE_CHECKING:
    from search.stages.place import Site
    from search.sweep import Sweep

RETRIES = 3
"""How often a process that was lost is replaced, and what it was drawing drawn again."""


@dataclass(frozen=True)
class Drawing:
    """All that models are asked for: cheap to send."""

    teacher: Teacher
    config: JudgeConfig
    captions: tuple[str, ...]
    size: int
    """Pixels a side."""

    def parts(self) -> list[range]:
        """Captions that are drawn together, by number."""
        from trainers.evaluate import batches

        return batches(len(self.captions), self.size)


class Easel:
    """The teacher's encoders and decoder, and one model at a time that draws with them."""

    def __init__(self, drawing: Drawing, store: Store, device: str) -> None:
        from trainers.teacher import load_folder

        self._drawing, self._store, self._device = drawing, store, device
        folder = drawing.teacher.folder
        self._pipeline: Any = load_folder(folder, None, device, without=("transformer",))
        self._model: str | None = None

    def draw(self, model: str, part: range) -> Drawn:
        """What a model, which is a student's prefix or TEACHER, makes of some captions."""
        if model != self._model:
            self._load(model)
        asked = self._drawing
        return draw(self._pipeline, asked.config, asked.captions, part, asked.size)

    def _load(self, model: str) -> None:
        from trainers.worker import load_student

        # The one before goes before the next comes.
        self._model = None
        self._pipeline.register_modules(transformer=None)
        teacher = self._drawing.teacher
        if model == TEACHER:
            transformer = teacher.transformer(device=self._device)
        else:
            transformer, _ = load_student(self._store, model, teacher, self._device)
        self._pipeline.register_modules(transformer=transformer)
        self._model = model


class JudgingActor(Easel):
    """An easel in a process of its own; a Ray actor."""

    def __init__(
        self, drawing: Drawing, url: str, options: StoreOptions | None, share: Share
    ) -> None:
        share.prepare()
        super().__init__(drawing, open_store(url, options, patient=True), share.device)

    def draw_of(self, model: str, part: range) -> tuple[str, Drawn]:
        """`draw`, and whose it is."""
        return model, self.draw(model, part)


def judge_here(site: Site, drawing: Drawing, outs: Mapping[str, str]) -> None:
    """Draws and judges with each model in this process; `outs` says where results go."""
    easel, parts = Easel(drawing, site.store, site.device), drawing.parts()
    done = 0
    for model, out in outs.items():
        drawn = []
        for part in parts:
            site.progress.update(done, len(outs) * len(drawing.captions))
            drawn.append(easel.draw(model, part))
            done += len(part)
        write_judged(site.store, out, gathered(drawing.config, drawing.captions, drawn))
    site.progress.update(done, done)


def judge_apart(
    sweep: Sweep, drawing: Drawing, outs: Mapping[str, str], progress: Progress
) -> None:
    """The same on as many actors as the sweep has workers; a model's results are stored as soon as
    they are whole. Models come one after another, so that each is loaded once by an actor."""
    import ray
    from ray.util import ActorPool

    parts = drawing.parts()
    units = [(model, part) for model in outs for part in parts]
    share = share_of(sweep.config.workers, sweep.config.accelerator)
    actor_class = ray.remote(JudgingActor).options(
        num_cpus=share.num_cpus,
        num_gpus=share.num_gpus,
        scheduling_strategy="SPREAD",
        max_restarts=RETRIES,
        max_task_retries=RETRIES,
    )
    actors = [
        actor_class.remote(drawing, sweep.store.url, sweep.config.store, share)
        for _ in range(min(sweep.config.workers, len(units)))
    ]
    drawn: dict[str, list[Drawn]] = {model: [] for model in outs}
    done, total = 0, len(outs) * len(drawing.captions)
    progress.update(done, total)
    try:
        answers = ActorPool(actors).map_unordered(
            lambda actor, unit: actor.draw_of.remote(*unit), units
        )
        for model, part in answers:
            drawn[model].append(part)
            if len(drawn[model]) == len(parts):
                judged = gathered(drawing.config, drawing.captions, drawn.pop(model))
                write_judged(sweep.store, outs[model], judged)
            done += len(part.part)
            progress.update(done, total)
    finally:
        for actor in actors:
            ray.kill(actor)
