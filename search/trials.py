"""Runs a search: proposals through Ray Tune to warm scoring actors, results into the store."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from search.budget import Currency, Target
from search.objectives import DEFAULT, Objective, Scored, checked, scored
from search.pareto import best_within, pareto_front
from search.proposals import Origin, Proposal, Proposals, Start
from search.ranks import rank_correlation
from search.rules import NextInterval, Rule
from search.samplers import Sampler
from search.score import Bench, Score
from search.space import Space, priced_space
from search.studies import StudyLog, checked_url
from storage.errors import EspalierError
from storage.manifest import publish, published, read_json
from storage.section import Section
from storage.store import Store
from trainers.library.library import Library
from trainers.measure import Table
from trainers.probe import ProbeConfig
from trainers.progress import Progress, silent
from trainers.students.plan import BlockPlan, Plan
from trainers.teacher import Teacher

TRIALS = "trials.json"

ROUND = 2000
"""Trials of one run of Tune, which forgets none of its trials, some 25 KiB each, before it ends.
The next run's actors start and load the models anew: ten seconds for the miniature, so 20 ms a
trial if there were 500 (benchmarks/README.md)."""


class SearchError(EspalierError):
    """A search that cannot go on."""


LAG = 8
"""See `SearchConfig.lag`."""


class SearchConfig(Section):
    """How plans are searched."""

    trials: PositiveInt = 64
    """Plans to score, all budgets together."""

    exact: NonNegativeInt = 3
    """How many plans of least summed damage each budget starts with; those of `rules` come on
    top. 0 leaves the rules alone: the library then holds what their plans need and no more."""

    rules: tuple[Rule, ...] = ("uniform", "ppcl", "amber")
    """Rules whose plans each budget starts with too: `uniform`, `ppcl`, `amber`, or `influence`
    (ShortGPT). A rule that does not reach a budget is left out there."""

    earlier: NonNegativeInt = 1
    """How many plans each budget starts with that other sweeps of the same teacher published to the
    same storage: the best that fit it."""

    noise_power: NonNegativeFloat = 1.0
    """Of Amber's rule: a timestep, 1 at pure noise, counts itself to this power; 0 weighs all
    alike."""

    least_cka: NonNegativeFloat = 0.0
    """Of PPCL's rule: intervals whose similarity is below are rejected; at 0, as in the paper,
    none."""

    next_interval: NextInterval = "after"
    """Of PPCL's rule: where the interval after one that ends at block v starts. `after`: at v + 1,
    as the published intervals lie; `end`: at v itself, whose state the next chain starts from."""

    objectives: Annotated[tuple[Objective, ...] | None, AfterValidator(checked)] = None
    """What is sought: the report's Pareto set, and what the sampler learns from. `fidelity_loss`,
    `parameters`, `memory` and `latency` are known of every scored plan, the latter two as measured
    of the assembled model (see measure). `judge_score` is known of recovered finalists alone, needs
    judge.task, and decides among them when it is named before `fidelity_loss`. null: fidelity loss
    and parameters, and a judge that decides where there is one."""

    sampler: Sampler = "tpe"
    """Which of Optuna's samplers proposes once the starting points are scored: `tpe`, `nsga2`,
    `nsga3`, `gp` or `random`."""

    study: Annotated[str, AfterValidator(checked_url)] | None = None
    """The Optuna storage that shows the trials to optuna-dashboard: a database's URL
    (`sqlite:///…`, `postgresql://…`) or a journal's path. Without one, a journal under `studies/`
    in the storage folder, or in the user's cache for an object store."""

    lag: PositiveInt | None = None
    """A trial is proposed from the results of all trials at least so many before it, whoever is
    done first: the search is the same on one worker and on eight. Fewer learns faster; it also
    bounds how many trials run side by side. null: 8, or as many as `workers` where they are more;
    the search is then that of so many."""

    timeout: PositiveFloat = 1800.0
    """Seconds that scoring a plan may take, with the loading before a process's first. One that
    takes longer hangs: its process is ended, and the plan is scored again by another."""

    probe: ProbeConfig = ProbeConfig()
    """On what plans are scored."""


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Trial:
    """One scored plan; small, since a search may hold ten thousand."""

    number: NonNegativeInt
    """In order of proposal, from 0."""
    budget: str
    """Label of the budget it was proposed for."""
    origin: Origin
    """Who proposed it."""
    plan: Plan
    parameters: PositiveInt
    """Of the whole student."""
    damage: NonNegativeFloat
    """Summed damage of its blocks, each alone in the teacher: what the exact solver goes by."""
    expected: float | None
    """Its fidelity loss as the trials before it let expect, see search/surrogate.py; none before
    there were any."""
    fidelity_loss: NonNegativeFloat | None
    """None when it was not a number."""
    costs: dict[Currency, NonNegativeInt] = Field(default_factory=dict)
    """Memory and latency as predicted from its blocks, where either is asked for."""
    measured: dict[Currency, NonNegativeInt] = Field(default_factory=dict)
    """The same, measured as one model while it was scored."""
    over: float | None = None
    """By which part of its budget it was measured to exceed it, negative below; None for a budget
    of parameters."""
    seconds: float
    """Scoring time."""
    state: Literal["complete", "failed"] = "complete"
    failed: str | None = None
    """Why, in one sentence."""

    def cost(self, currency: Currency) -> int:
        """What the plan is predicted to cost."""
        return self.parameters if currency == "parameters" else self.costs[currency]

    def values(self, objectives: Sequence[Scored]) -> tuple[float, ...]:
        """What is minimised, as measured where it was; a trial without a fidelity loss has none."""
        assert self.fidelity_loss is not None, self.number
        loss = self.fidelity_loss
        return tuple(
            loss if o == "fidelity_loss" else self.measured.get(o, self.cost(o)) for o in objectives
        )

    def fits(self, target: Target) -> bool:
        """Whether it is within a budget, as predicted and where it was measured as measured."""
        measured = self.measured.get(target.currency, 0)
        return max(self.cost(target.currency), measured) <= target.limit


def library_space(teacher: Teacher, library: Library, table: Table | None = None) -> Space:
    """Every plan over the teacher's own blocks and the library's replacements."""
    family, config = teacher.family, teacher.config
    own = [BlockPlan(span=(i, i)) for i in range(family.blocks(config))]
    damages = {block: library.damage(block) for block in (*own, *library.blocks)}
    return priced_space(family.name, config, damages, table)


def plan_space(teacher: Teacher, library: Library, plan: Plan, table: Table | None = None) -> Space:
    """The one plan, over its own blocks; what does not start from the library has no damage."""
    damages = {b: library.damage(b) if b.start == "library" else 0.0 for b in plan.blocks}
    return priced_space(teacher.family.name, teacher.config, damages, table)


def run_search(
    space: Space,
    targets: Sequence[Target],
    bench: Bench,
    config: SearchConfig,
    store: Store,
    prefix: str,
    *,
    workers: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    seed: int = 0,
    plans: Sequence[Start] = (),
    log: StudyLog | None = None,
    progress: Progress | None = None,
) -> list[Trial]:
    """Score plans until there are enough, `plans` among the first, and publish the trials under
    `prefix`.

    Actors of `cpus` and `gpus` each score side by side, as many as the cluster has room for while
    nodes come and go, up to `config.lag`, which by default `workers` may raise. Scores found under
    `bench.scores` are not made again.
    `log` shows the trials to others. Needs a running Ray; raises SearchError with the cause when a
    plan could not be scored, or not logged. A score that is not a number fails its trial alone, and
    so does a plan that ends its process again and again.
    """
    from search.study import PlanSearcher, final, lost, score_from_json, score_json

    progress = progress or silent()
    lag = config.lag or max(LAG, workers)
    proposals = Proposals(
        space,
        targets,
        trials=config.trials,
        exact=config.exact,
        lag=lag,
        seed=seed,
        plans=plans,
        sampler=config.sampler,
        objectives=scored(config.objectives),
    )
    by_label = {target.label: target for target in targets}
    stored = dict(_stored(store, bench.scores))
    trials: dict[int, Trial] = {}
    losses: dict[str, float] = {}
    without: list[tuple[str, Score]] = []
    unlogged: list[Trial] = []

    def known(proposal: Proposal) -> Score | None:
        content = stored.get(bench.key(proposal.plan))
        score = None if content is None else score_from_json(content)
        return score if score is not None and final(score, config.timeout) else None

    def take(proposal: Proposal, score: Score) -> None:
        key = bench.key(proposal.plan)
        if score.failed is not None:
            # No process wrote it. A search that is resumed shall not try again, unless nothing came
            # after it: then the fault may have been another's, and a study keeps what it is told.
            if stored.get(key) != score_json(score):
                without.append((key, score))
        else:
            while without:
                failed, said = without.pop()
                store.write(failed, score_json(said))
        trial = _trial(space, by_label[proposal.budget], proposal, score)
        trials[trial.number] = trial
        if trial.fidelity_loss is not None:
            best = min(trial.fidelity_loss, losses.get(trial.budget, math.inf))
            losses[trial.budget] = best
        progress.update(len(trials), config.trials, **losses)
        unlogged.append(trial)
        if log is not None and not without:
            log.add(unlogged)
            unlogged.clear()

    searcher = PlanSearcher(proposals, known, take, config.timeout)
    cause = ""
    while searcher.advance():
        cause = _tune(searcher, bench, config.timeout, lag, cpus, gpus)
        gc.collect()  # what Tune leaves refers to itself, and would be there beside the next run's
    if searcher.error is not None:
        # Of processes that were lost, and made good, before another fault nothing is said.
        told = cause if searcher.error.endswith(lost(config.timeout)) else ""
        raise SearchError(f"search stopped: {searcher.error}{told}")
    if log is not None:
        log.add(unlogged)
    ordered = [trials[number] for number in sorted(trials)]
    save_trials(store, prefix, ordered)
    return ordered


def save_trials(store: Store, prefix: str, trials: Sequence[Trial]) -> None:
    """Publish a finished search."""
    body = TypeAdapter(list[Trial]).dump_json(list(trials))
    publish(store, prefix, {TRIALS: body}, {"trials": len(trials)})


def load_trials(store: Store, prefix: str) -> list[Trial] | None:
    """The trials of a finished search; None without one, or when another version wrote it."""
    manifest = published(store, prefix)
    if manifest is None or TRIALS not in manifest.files:
        return None
    read = read_json(store, prefix, TRIALS, manifest)
    try:
        return TypeAdapter(list[Trial]).validate_python(read)
    except ValidationError:
        return None


def best_trials(trials: Sequence[Trial], target: Target, count: int | None = 1) -> list[Trial]:
    """The complete trials of lowest fidelity loss within a budget, best first; all for None."""
    fitting = [trial for trial in complete(trials) if trial.fits(target)]
    return best_within(
        fitting,
        target.limit,
        lambda t: t.cost(target.currency),
        lambda t: t.fidelity_loss or 0.0,
        count,
    )


def pareto_trials(trials: Sequence[Trial], objectives: Sequence[Scored] = DEFAULT) -> list[Trial]:
    """The complete trials that no other beats in one objective without losing in another."""
    return pareto_front(complete(trials), lambda t: t.values(objectives))


def complete(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have a fidelity loss."""
    return [trial for trial in trials if trial.fidelity_loss is not None]


def agreement(trials: Sequence[Trial]) -> float | None:
    """Rank correlation of summed damage and measured fidelity loss, see rank_correlation."""
    return _agreement(trials, lambda trial: trial.damage)


def corrected_agreement(trials: Sequence[Trial]) -> tuple[float, float] | None:
    """Of the trials of which something was expected before they were scored: the rank correlation
    of summed damage and measured loss, and that of what was expected; None without one."""
    known = [trial for trial in trials if trial.expected is not None]
    before = _agreement(known, lambda trial: trial.damage)
    after = _agreement(known, lambda trial: trial.expected or 0.0)
    return None if before is None or after is None else (before, after)


def _agreement(trials: Sequence[Trial], guess: Callable[[Trial], float]) -> float | None:
    whole = [(guess(t), t.fidelity_loss) for t in trials if t.fidelity_loss is not None]
    return rank_correlation([guessed for guessed, _ in whole], [loss for _, loss in whole])


def _tune(
    searcher: object, bench: Bench, timeout: float, lag: int, cpus: float, gpus: float
) -> str:
    """Runs Tune once, for at most `ROUND` trials; the last line of the first trial's exception, or
    nothing."""
    from ray import tune

    from search.study import ScoringActor, quiet_tune

    trainable = tune.with_resources(
        tune.with_parameters(ScoringActor, bench=bench, timeout=timeout),
        {"cpu": cpus, "gpu": gpus},
    )
    with tempfile.TemporaryDirectory(prefix="espalier-tune-") as folder, quiet_tune():
        results = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=ROUND,
                max_concurrent_trials=lag,
                reuse_actors=True,
                trial_name_creator=_short,
                trial_dirname_creator=_short,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                # Tune would save a class trainable at its end; a scored plan has nothing to save.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    return f": {str(results.errors[0]).strip().splitlines()[-1]}" if results.errors else ""


def _short(trial: object) -> str:
    return str(getattr(trial, "trial_id"))  # noqa: B009  # Ray is not typed


def _trial(space: Space, target: Target, proposal: Proposal, score: Score) -> Trial:
    finite = math.isfinite(score.fidelity_loss)
    cost = score.costs.get(target.currency)
    return Trial(
        number=proposal.number,
        budget=proposal.budget,
        origin=proposal.origin,
        plan=proposal.plan,
        parameters=space.cost(proposal.plan),
        costs={c: other.cost(proposal.plan) for c, other in space.others.items()},
        measured=dict(score.costs),
        over=None if cost is None else target.over(cost),
        damage=space.damage(proposal.plan),
        expected=proposal.expected,
        fidelity_loss=score.fidelity_loss if finite else None,
        seconds=score.seconds,
        state="complete" if finite else "failed",
        failed=None if finite else score.failed or "its velocity is not a number",
    )


def _stored(store: Store, prefix: str) -> Iterator[tuple[str, bytes]]:
    def read(key: str) -> tuple[str, bytes]:
        with store.read(key) as stream:
            return key, stream.read()

    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(read, store.keys(prefix))
