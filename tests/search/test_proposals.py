"""What is proposed depends on seed and results alone: not on workers, order or interruptions."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

import search.proposals
from search.budget import Target
from search.proposals import Proposal, Proposals, Start
from search.samplers import POPULATION, SAMPLERS, Sampler, make_sampler
from search.solver import Piece
from search.space import Space, candidates
from trainers.students.plan import Start as BlockStart
from trainers.students.plan import uniform_plan

BLOCKS = 8
TARGETS = [Target("50pct", 45), Target("70pct", 61)]


def make_space(
    max_span: int = 3,
    widths: tuple[float, ...] = (1.0, 0.5),
    starts: Sequence[BlockStart] = ("library",),
) -> Space:
    rng = random.Random(0)
    pieces = {
        b: Piece(0.0 if b.untouched else b.length * rng.random(), 10 if b.ffn == 1 else 7)
        for b in candidates(BLOCKS, max_span, widths, starts=starts)
    }
    return Space("qwen_image", BLOCKS, 5, pieces)


def make_proposals(
    space: Space, trials: int = 24, seed: int = 3, sampler: Sampler = "tpe"
) -> Proposals:
    starts: list[Start] = [
        (target.label, "uniform", uniform_plan("qwen_image", BLOCKS, blocks, start="library"))
        for target, blocks in zip(TARGETS, (4, 5), strict=True)
    ]
    return Proposals(
        space, TARGETS, trials=trials, exact=2, lag=4, seed=seed, plans=starts, sampler=sampler
    )


def loss_of(space: Space, proposal: Proposal) -> float:
    if proposal.number % 7 == 3:
        return math.nan
    return space.damage(proposal.plan) * (1 + 0.3 * math.sin(proposal.number))


def run(
    proposals: Proposals,
    space: Space,
    workers: int,
    seed: int = 0,
    loss: Callable[[Proposal], float] | None = None,
) -> list[Proposal]:
    """A search on so many workers that finish in random order; `loss` in place of `loss_of`."""
    loss = loss or partial(loss_of, space)
    rng = random.Random(seed)
    running: list[Proposal] = []
    made: list[Proposal] = []
    while not (proposals.finished and not running):
        proposal = proposals.next() if len(running) < workers else None
        if proposal:
            running.append(proposal)
            made.append(proposal)
        elif running:
            done = running.pop(rng.randrange(len(running)))
            proposals.tell(done.number, loss(done))
    return made


@pytest.fixture(scope="module")
def space() -> Space:
    return make_space()


@pytest.fixture(scope="module", params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """Every sampler keeps the same contract."""
    return request.param  # type: ignore[no-any-return]  # pytest is not that precise


@pytest.fixture(scope="module")
def alone(space: Space, sampler: Sampler) -> list[Proposal]:
    return run(make_proposals(space, sampler=sampler), space, workers=1)


def test_starts_from_the_exact_and_the_given_plans(
    space: Space, sampler: Sampler, alone: list[Proposal]
) -> None:
    first = [(p.budget, p.origin) for p in alone[:4]]
    assert first == [
        ("50pct", "exact"), ("70pct", "exact"), ("50pct", "uniform"), ("70pct", "uniform"),
    ]  # fmt: skip
    assert [p.plan for p in alone[:2]] == [space.exact(t.limit)[0] for t in TARGETS]
    assert {p.origin for p in alone[6:]} >= {sampler, "corrected"}


def test_what_was_measured_moves_what_is_expected(space: Space, sampler: Sampler) -> None:
    small = TARGETS[0]
    best = space.exact(small.limit)[0]
    worse = max(best.blocks, key=lambda block: space.pieces[block].damage)

    def loss(proposal: Proposal) -> float:
        """As if that piece did three times its damage."""
        more = 2 * space.pieces[worse].damage if worse in proposal.plan.blocks else 0.0
        return space.damage(proposal.plan) + more

    made = run(make_proposals(space, sampler=sampler), space, workers=1, loss=loss)
    assert [p.expected for p in made[:4]] == [None] * 4
    raised: dict[bool, list[float]] = {True: [], False: []}
    for proposal in (p for p in made[4:] if p.budget == small.label):
        assert proposal.expected is not None
        summed, holds = space.damage(proposal.plan), worse in proposal.plan.blocks
        raised[holds].append(proposal.expected / summed)
        if holds:
            assert abs(proposal.expected - loss(proposal)) < abs(summed - loss(proposal))
    assert min(map(len, raised.values())) >= 3
    assert statistics.mean(raised[True]) > 1.2 * statistics.mean(raised[False])


def test_every_plan_fits_its_budget_and_comes_once(space: Space, alone: list[Proposal]) -> None:
    limits = {target.label: target.limit for target in TARGETS}
    assert [p.number for p in alone] == list(range(24))
    assert all(space.cost(p.plan) <= limits[p.budget] for p in alone)
    assert len({p.plan.digest for p in alone}) == len(alone)
    later = [p.budget for p in alone[6:]]
    assert later == ["50pct", "70pct"] * (len(later) // 2)


def test_starts_are_searched_like_spans_and_widths() -> None:
    space = make_space(starts=("average", "library"))
    made = run(make_proposals(space), space, workers=1)
    limits = {target.label: target.limit for target in TARGETS}
    assert all(space.cost(p.plan) <= limits[p.budget] for p in made)
    assert len({p.plan.digest for p in made}) == len(made) == 24
    for origin in ("exact", "corrected", "tpe"):
        merged = [b for p in made if p.origin == origin for b in p.plan.blocks if b.length > 1]
        assert {block.start for block in merged} == {"average", "library"}
    assert run(make_proposals(space), space, workers=4, seed=1) == made


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_and_their_order_do_not_matter(
    space: Space, sampler: Sampler, alone: list[Proposal], workers: int
) -> None:
    assert run(make_proposals(space, sampler=sampler), space, workers, seed=workers) == alone


def test_an_interrupted_search_proposes_what_it_would_have(
    space: Space, sampler: Sampler, alone: list[Proposal]
) -> None:
    resumed = make_proposals(space, sampler=sampler)
    stored = {p.number: loss_of(space, p) for p in alone[:11] if p.number != 9}
    made = []
    while not resumed.finished:
        proposal = resumed.next()
        assert proposal is not None
        made.append(proposal)
        resumed.tell(proposal.number, stored.get(proposal.number, loss_of(space, proposal)))
    assert made == alone


def test_another_seed_searches_elsewhere(
    space: Space, sampler: Sampler, alone: list[Proposal]
) -> None:
    other = run(make_proposals(space, seed=4, sampler=sampler), space, workers=1)
    assert other[:6] == alone[:6]
    assert other != alone


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_a_genetic_sampler_breeds_from_all_that_is_scored(space: Space, sampler: Sampler) -> None:
    proposals = make_proposals(space, trials=6 + 5 * POPULATION, sampler=sampler)
    run(proposals, space, workers=1)
    for study in proposals.studies.values():
        whole = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        generations = [
            value
            for trial in whole
            for key, value in trial.system_attrs.items()
            if key.endswith(":generation")
        ]
        assert len(generations) == len(whole)
        assert generations[:POPULATION] == [0] * POPULATION
        assert max(generations) >= 1
        assert generations == sorted(generations)


def test_ends_when_every_plan_has_been_proposed() -> None:
    space = make_space(max_span=2, widths=(1.0,))
    made = run(make_proposals(space, trials=1000), space, workers=2)
    holds = dict.fromkeys(space.names, 0.0)
    assert {p.plan.digest for p in made} == {p.digest for p in space.plans(holds, 61)}


def test_waits_for_results_it_needs(space: Space) -> None:
    proposals = make_proposals(space)
    given = [proposals.next() for _ in range(4)]
    assert all(given)
    assert proposals.next() is None
    assert not proposals.finished
    proposals.tell(1, 0.5)
    assert proposals.next() is None
    proposals.tell(0, 0.5)
    assert proposals.next() is not None


def dearer_than_predicted(proposals: Proposals, space: Space, factor: float) -> list[Proposal]:
    """A search in which every plan is measured to take `factor` times what was predicted."""
    made = []
    while (proposal := proposals.next()) is not None:
        made.append(proposal)
        cost = round(factor * space.within("latency").cost(proposal.plan))
        proposals.tell(proposal.number, loss_of(space, proposal), {"latency": cost})
    return made


def test_every_currency_has_its_own_limit() -> None:
    space = timed_space()
    targets = [Target("45", 45), Target("400us", 400, "latency", margin=0.1)]
    proposals = Proposals(space, targets, trials=20, exact=2, lag=1, seed=0)
    for proposal in dearer_than_predicted(proposals, space, 1.0):
        if proposal.budget == "45":
            assert space.cost(proposal.plan) <= 45
        else:
            assert space.within("latency").cost(proposal.plan) <= 360


@pytest.mark.parametrize("name", [s for s in SAMPLERS if s != "random"])
def test_a_measured_violation_reaches_the_sampler_and_the_plans_after_it(name: Sampler) -> None:
    space = timed_space()
    target = Target("400us", 400, "latency")
    proposals = Proposals(space, [target], trials=24, exact=3, lag=1, seed=0, sampler=name)
    made = dearer_than_predicted(proposals, space, 1.25)
    costs = [space.within("latency").cost(p.plan) for p in made]
    assert costs[0] > 400 / 1.25
    assert all(cost <= 400 / 1.25 for cost in costs[4:])
    told = [
        trial.constraints["latency"]
        for trial in proposals.studies["400us"].get_trials(False)
        if trial.state.name == "COMPLETE"
    ]
    finite = [c for p, c in zip(made, costs, strict=True) if math.isfinite(loss_of(space, p))]
    # The last result is told when the next plan is asked for.
    assert told == [round(1.25 * cost) / 400 - 1 for cost in finite[: len(told)]]
    assert len(told) >= len(finite) - 1
    assert max(told) > 0 >= min(told)


def test_samplers_learn_what_a_plan_was_measured_to_cost() -> None:
    target = Target("400us", 400, "latency")
    proposals = Proposals(
        timed_space(), [target], trials=3, exact=2, lag=1, seed=0,
        objectives=("latency", "fidelity_loss"),
    )  # fmt: skip
    for latency in (333, 222):
        proposal = proposals.next()
        assert proposal is not None
        proposals.tell(proposal.number, 0.5, {"latency": latency})
    proposals.next()
    told = proposals.studies["400us"].get_trials(states=[TrialState.COMPLETE])
    assert [trial.values for trial in told] == [[333, 0.5], [222, 0.5]]


def timed_space() -> Space:
    """Narrow blocks are a little faster, and the outside takes its time too."""
    space = make_space()
    pieces = {b: p._replace(cost=80 if b.ffn == 1 else 60) for b, p in space.pieces.items()}
    timed = replace(space, outside=40, pieces=pieces)
    return replace(space, others={"latency": timed})


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_long_search_remembers_its_best_and_its_latest(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.proposals, "_REMEMBERED", 8)
    space = make_space(max_span=4)
    proposals = make_proposals(space, trials=100, sampler=sampler)
    made = run(proposals, space, workers=1)
    assert len(made) == 100
    for target in TARGETS:
        kept = proposals.studies[target.label].get_trials(deepcopy=False)
        assert len(kept) < 5 * 8  # a few are asked between two that are told
        mine = [loss_of(space, p) for p in made[:-4] if p.budget == target.label]
        assert min(t.values[0] for t in kept if t.values) == min(
            loss for loss in mine if math.isfinite(loss)
        )
    assert run(make_proposals(space, trials=100, sampler=sampler), space, workers=3) == made


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_that_knows_the_space_draws_what_one_finds_that_does_not(name: Sampler) -> None:
    space: dict[str, BaseDistribution] = dict.fromkeys(("wide", "deep"), FloatDistribution(0, 1))

    def drawn(known: dict[str, BaseDistribution] | None) -> dict[str, float]:
        study = optuna.create_study(directions=["minimize", "minimize"])
        rng = random.Random(0)
        for _ in range(12):
            values = {name: rng.random() for name in space}
            study.add_trial(
                optuna.trial.create_trial(
                    params=values,
                    distributions=space,
                    values=[sum(values.values()), -values["deep"]],
                )
            )
        study.sampler = make_sampler(name, seed=3, space=known)
        trial = study.ask()
        return {name: trial.suggest_float(name, 0, 1) for name in space}

    assert drawn(space) == drawn(None)
