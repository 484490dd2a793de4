"""What a library offers and how its replacements are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from storage.section import Section
from trainers.students.plan import Ffn, Start, Text


class TrainingConfig(Section):
    """How a replacement is trained; all of it is part of the name that it is stored under."""

    steps: PositiveInt = 80
    """Optimizer steps."""

    batch_size: PositiveInt = 24
    """Pictures a step."""

    lr: PositiveFloat = 1e-2
    """Highest learning rate; it falls along a cosine. For a width of 64; the wider the model, the
    less: PPCL trains Qwen-Image at 1e-5."""

    warmup: NonNegativeInt = 8
    """Steps over which the learning rate rises linearly."""

    start: Literal["first", "middle", "average"] = "middle"
    """First weights of one that is trained, as in a plan; `middle`, as PPCL's code has it, ended
    best on the miniature."""

    fit_batches: PositiveInt = 16
    """Batches over which linear maps (projected text, linear FFNs) are fitted in closed form before
    training."""

    magnitude: NonNegativeFloat = 1.0
    """Weight of the relative squared error beside PPCL's loss, which is blind to magnitude; 0
    leaves PPCL's loss alone."""

    timestep_shift: PositiveFloat = 1.0
    """Above 1 training sees more noise, as schedulers do for large pictures."""


class LibraryConfig(TrainingConfig):
    """The library: which replacements may be offered, and how they are trained."""

    widths: tuple[Ffn, ...] = Field((1.0, 0.5), min_length=1)
    """Kept fractions of the FFN that are offered for every span beside the whole one, or `linear`.
    Here and below: only where the teacher's blocks can have it."""

    texts: tuple[Text, ...] = ("dual",)
    """How replacements may treat text beside `dual`, which is always offered: `projected`,
    `shared`, as in a plan."""

    starts: tuple[Start, ...] = Field(("library",), min_length=1)
    """What plans may start from, for every span, width and text: `library` is a trained
    replacement; `first`, `middle` and `average` are cut from the teacher and measured as they are,
    and never have projected text or linear FFNs. The plans of search.rules start from the library
    at any rate."""

    max_span: PositiveInt = 4
    """Teacher blocks that one replacement may stand for at most."""

    group: PositiveInt = 24
    """Replacements that a worker trains in one pass of the teacher, and stores together, at most;
    fewer on GPUs that have no room for so many."""

    micro_batch: PositiveInt | None = None
    """Pictures that pass together, at most; null: the whole batch. Fewer take less memory, and
    change nothing that is learned."""

    checkpoint_every: PositiveInt = 100
    """Optimizer steps between checkpoints of each replacement."""

    retries: NonNegativeInt = 2
    """How often replacements whose worker is lost go on without having come to another checkpoint
    since they lost the one before; the last time each is trained alone, so that one that ends every
    worker fails alone."""

    timeout: PositiveFloat = 1800.0
    """Seconds that a step may take, or what is done before the first and after the last, the
    loading of the teacher among it; a worker that takes longer hangs, and counts as lost."""

    @property
    def training(self) -> TrainingConfig:
        """The part that decides what a replacement becomes."""
        names = TrainingConfig.model_fields
        return TrainingConfig(**{name: getattr(self, name) for name in names})
