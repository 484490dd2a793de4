"""The configuration of one sweep: what a YAML file such as examples/miniature.yaml says."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from search.analyse import AnalyseConfig
from search.budget import Budget, Currency
from search.judging import JudgeConfig
from search.objectives import measured
from search.recover import RecoverConfig
from search.tracking.config import TrackConfig
from search.trials import SearchConfig
from storage.section import Section
from storage.store import StoreOptions
from storage.urls import address
from trainers.data.sources import DataConfig
from trainers.library.config import LibraryConfig
from trainers.measure import MeasureConfig
from trainers.students.plan import Plan


class SweepConfig(Section):
    """One sweep, start to end. Relative paths are relative to where the command is run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Names the sweep's folder in the storage: up to 100 letters, digits, `.`, `_`, `-`."""

    teacher: Annotated[str, AfterValidator(address)]
    """The model to compress: a diffusers pipeline folder, a name on the Hugging Face hub, as
    `owner/model` or `owner/model@revision`, or the URL of a published one, whose weights are then
    read by range."""

    storage: Annotated[str, AfterValidator(address)] = "runs"
    """Where everything is kept: a folder, `file:///folder` or `s3://bucket/prefix`."""

    store: StoreOptions = StoreOptions()
    """How an S3 storage is reached; credentials come from the usual AWS variables and files."""

    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)]
    """Wanted sizes: parameters (`10B`, `600M`), peak memory (`12GiB`), latency (`350ms`), or a part
    of the teacher's (`50%` of its parameters, `60% memory`, `60% latency`)."""

    plan: Plan | None = None
    """The student itself, instead of a search for one: only its replacements are trained, and it is
    the only finalist. Needs one budget, which it must fit."""

    accelerator: Literal["cpu", "gpu"] = "cpu"
    """What models run on. `gpu` gives every worker one, or a share when there are fewer."""

    workers: PositiveInt = 2
    """Processes that encode, train the library, score trials and judge models side by side."""

    seed: NonNegativeInt = 0
    """Everything random follows from it."""

    data: DataConfig = DataConfig()
    """The pictures and captions that students learn from."""

    measure: MeasureConfig = MeasureConfig()
    """On what latency and peak memory are measured, where a budget or an objective is one."""

    analyse: AnalyseConfig = AnalyseConfig()
    """How redundancy is measured, and how many replacements it may nominate."""

    library: LibraryConfig = LibraryConfig()
    """Which replacements are offered, and how they are trained."""

    search: SearchConfig = SearchConfig()
    """How plans are searched."""

    recover: RecoverConfig = RecoverConfig()
    """How finalists are distilled, and within which ranges the schedules are searched."""

    judge: JudgeConfig = JudgeConfig()
    """How finished students are judged and shown."""

    track: TrackConfig = TrackConfig()
    """Which trackers are told what the stages found: TensorBoard, MLflow."""

    keep_models: PositiveInt | None = None
    """Published models of each budget that stay when this sweep publishes: so many of the best, and
    its own. null keeps all."""

    @model_validator(mode="after")
    def _budgets_differ(self) -> Self:
        labels = [budget.label for budget in self.budgets]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"budgets: {label} is asked for twice; remove one")
        return self

    @property
    def measured(self) -> frozenset[Currency]:
        """The currencies that a device must measure for the budgets and objectives."""
        asked = {b.currency for b in self.budgets if b.currency != "parameters"}
        return frozenset(asked | measured(self.search.objectives))

    @model_validator(mode="after")
    def _every_objective_is_measured(self) -> Self:
        if "judge_score" in (self.search.objectives or ()) and self.judge.task is None:
            raise ValueError(
                "search.objectives: judge_score is measured by no tier, because there is no judge; "
                "name one as judge.task or leave judge_score out"
            )
        return self

    @model_validator(mode="after")
    def _a_plan_has_one_size(self) -> Self:
        if self.plan is not None and len(self.budgets) > 1:
            raise ValueError("budgets: a given plan has one size; give one budget, or no plan")
        return self

    @model_validator(mode="after")
    def _every_budget_has_a_trial(self) -> Self:
        if self.plan is None and self.search.trials < len(self.budgets):
            raise ValueError(
                f"search.trials: {self.search.trials} for {len(self.budgets)} budgets; each needs "
                "a plan of its own, so give at least as many"
            )
        return self

    @model_validator(mode="after")
    def _fidelity_has_pictures(self) -> Self:
        if self.data.held_out == 0:
            raise ValueError("data.held_out: must be greater than 0; fidelity is measured on them")
        return self

    @model_validator(mode="after")
    def _batches_share_out(self) -> Self:
        for i, phase in enumerate(self.recover.space.phases):
            if phase.batch_size < self.recover.range[1]:
                raise ValueError(
                    f"recover.space.phases[{i}].batch_size: must be at least recover.workers, "
                    f"{self.recover.range[1]}, got {phase.batch_size}"
                )
        return self
