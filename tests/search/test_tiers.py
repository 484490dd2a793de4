"""Who is measured when and who goes on, with invented losses in place of recoveries."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from search.samplers import SAMPLERS, Sampler
from search.tiers import Promotion, Rules, climbers, forerunners
from tests.search.races import SPACE, Bench, one_tier, schedules, two_tiers


def test_a_finalist_s_first_schedule_is_in_the_middle_and_all_are_within_the_ranges() -> None:
    bench = Bench(lambda *_: 0.3, one_tier(5))
    tried = schedules(bench.run(bench.race()))
    assert tried[0] == SPACE.schedule(SPACE.middle())
    assert len({schedule.model_dump_json() for schedule in tried}) == 5
    assert all(10 <= s.phases[0].steps <= 40 and s.phases[1].steps == 30 for s in tried)


def test_races_of_other_seeds_explore_elsewhere() -> None:
    benches = [Bench(lambda *_: 0.3, one_tier(2)) for _ in range(2)]
    one, two = (schedules(b.run(b.race(seed=seed))) for seed, b in enumerate(benches))
    assert one[0] == two[0]
    assert one[1] != two[1]


def test_only_the_best_of_a_tier_go_on() -> None:
    bench = Bench(lambda _, number, tier: [0.3, 0.1, 0.2][number] / (tier + 1), two_tiers(1, 3))
    race = bench.run(bench.race())
    assert sorted(bench.ran) == [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0)]
    assert race.best == 0.05
    assert [tier for tier, _ in race.outcomes(race.candidates[1])] == [0, 1]
    assert [tier for tier, _ in race.outcomes(race.candidates[0])] == [0]


def test_a_tier_that_would_stop_nobody_is_skipped() -> None:
    bench = Bench(lambda *_: 0.3, two_tiers(1, 1))
    bench.run(bench.race())
    assert bench.ran == [(0, 0, 1)]


def test_a_failed_run_does_not_stop_its_race() -> None:
    bench = Bench(lambda _, number, tier: None if number == 0 else 0.2, one_tier(2))
    race = bench.run(bench.race())
    assert race.done
    assert race.best == 0.2


@pytest.mark.parametrize("remembers", [True, False])
def test_a_run_that_comes_through_at_last_changes_no_schedule_that_came_after_it(
    remembers: bool,
) -> None:
    """It broke off, which is no outcome that is kept: the next attempt runs it again."""
    broke: set[int] = {1, 4}

    def losses(_: int, number: int, tier: int) -> float | None:
        return None if number in broke else 0.1 + 0.01 * (number * 7 % 5)

    bench = Bench(losses, one_tier(9))
    first = bench.run(bench.race(), most=7).candidates
    for candidate in first:
        if candidate.number in broke:
            del bench.outcomes[candidate, 0]
    broke.clear()
    if not remembers:
        bench.chosen.clear()
    again = bench.run(bench.race())
    assert (again.candidates[:8] == first) == remembers
    assert len(bench.ran) == 7 + 2 + 2 or not remembers  # nothing else is done twice


def test_when_all_that_went_on_failed_the_next_best_go_on() -> None:
    def losses(_: int, number: int, tier: int) -> float | None:
        return None if tier == 1 and number < 2 else 0.1 * (number + 1)

    bench = Bench(losses, two_tiers(1, 4, keep=0.25))
    race = bench.run(bench.race())
    assert [place for place in bench.ran if place[2] == 1] == [(0, 0, 1), (0, 1, 1), (0, 2, 1)]
    assert race.best == pytest.approx(0.1)


def test_a_tier_that_ranks_differently_from_the_next_is_widened_once() -> None:
    def losses(_: int, number: int, tier: int) -> float:
        return 0.1 + 0.01 * (number if tier == 0 else -number)

    def went_on(widen: float) -> int:
        bench = Bench(losses, two_tiers(1, 9, keep=1 / 3, widen=widen))
        bench.run(bench.race())
        return sum(tier == 1 for _, _, tier in bench.ran)

    assert went_on(-1) == 3
    assert went_on(0.4) == 6


def test_more_finalists_come_in_when_their_scores_as_assembled_mislead() -> None:
    def entered(slope: float) -> set[int]:
        bench = Bench(
            lambda rank, _, tier: 0.2 + slope * rank, two_tiers(3, 1, widen=0.4), finalists=6
        )
        bench.run(bench.race())
        return {rank for rank, _, _ in bench.ran}

    assert entered(0.01) == {0, 1, 2}
    assert entered(-0.01) == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_after_what_was_stopped_failed_and_ended(sampler: Sampler) -> None:
    """What is suggested, told as complete, pruned or failed, and restored, is the same for all."""

    def losses(_: int, number: int, tier: int) -> float | None:
        return None if number == 3 else 0.1 + 0.01 * (number * 7 % 5) - 0.05 * tier

    for rules in (Rules(1, 8, 2, 0.34, -1, sampler), Rules(1, 8, 1, 1, -1, sampler)):
        plain = Bench(losses, rules)
        wanted = plain.run(plain.race())
        assert len({s.model_dump_json() for s in schedules(wanted)}) == 8
        cut = Bench(losses, rules)
        cut.run(cut.race(), most=5)
        assert schedules(cut.run(cut.race())) == schedules(wanted)
        told = [trial.state for trial in wanted._lanes[0]._study.trials]
        assert told == [TrialState.FAIL if n == 3 else TrialState.COMPLETE for n in range(8)]


@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if sampler != "random"])
def test_samplers_learn_from_what_was_stopped(sampler: Sampler) -> None:
    """Whether short or long phases lose less decides where a sampler looks."""

    def lengths(sign: int) -> list[int]:
        def losses(_: int, number: int, tier: int) -> float:
            steps = race.candidates[number].schedule.phases[0].steps
            return 1 + sign * steps / 100

        bench = Bench(losses, Rules(1, 24, 2, 0.1, -1, sampler))
        race = bench.race()
        bench.run(race)
        return [schedule.phases[0].steps for schedule in schedules(race)]

    short, long = lengths(1), lengths(-1)
    assert sum(short[12:]) < sum(long[12:])


@pytest.mark.parametrize(("promotion", "tier"), [("halving", 0), ("asha", 1)])
def test_by_asha_the_better_ones_go_on_while_others_still_run(
    promotion: Promotion, tier: int
) -> None:
    bench = Bench(lambda rank, *_: 0.1 * rank, Rules(6, 1, 2, 0.5, -1, promotion=promotion), 6)
    race = bench.run(bench.race(), most=2)
    following = race.waiting()
    assert following is not None
    assert following.tier == tier


def test_asha_goes_on_through_every_tier_and_ends_with_the_best_of_each() -> None:
    for seed in range(20):
        drawn = random.Random(seed)
        worth = [drawn.random() for _ in range(9)]

        def losses(rank: int, number: int, tier: int) -> float:
            return worth[rank] / (tier + 1)  # noqa: B023

        bench = Bench(losses, Rules(9, 1, 3, 1 / 3, -1, promotion="asha"), 9)
        race = bench.run(bench.race(), at_once=3, order=seed)
        assert race.best == min(worth) / 3
        by_tier = [sum(tier == t for _, _, tier in bench.ran) for t in range(3)]
        assert by_tier[0] == 9
        assert 3 <= by_tier[1] <= 6
        assert 1 <= by_tier[2] < by_tier[1]


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=9), st.floats(0.1, 1))
def test_forerunners_are_the_best_of_some_beginning(
    losses: list[float | None], keep: float
) -> None:
    items = list(range(len(losses)))
    wanted = set()
    for count in range(len(losses) + 1):
        known = [(loss, item) for item, loss in enumerate(losses[:count]) if loss is not None]
        wanted |= {item for _, item in sorted(known)[: int(count * keep)]}
    going = forerunners(items, lambda item: (True, losses[item]), keep)
    assert sorted(going) == sorted(wanted)
    for cut in items:  # what comes later takes none back
        early = forerunners(items, lambda item: (item < cut, losses[item]), keep)  # noqa: B023
        assert going[: len(early)] == early


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 200), st.integers(1, 5), st.integers(0, 20), st.sampled_from(["halving", "asha"])
)
@example(119, 1, 15, "halving")
def test_a_race_is_the_same_however_many_run_at_once_and_wherever_it_is_cut_off(
    seed: int, at_once: int, cut: int, promotion: Promotion
) -> None:
    def losses(rank: int, number: int, tier: int) -> float | None:
        drawn = random.Random(f"{seed} {rank} {number} {tier}").random()
        return None if drawn < 0.2 else drawn

    rules = dataclasses.replace(two_tiers(3, 3, keep=0.4, widen=0.4), promotion=promotion)
    plain = Bench(losses, rules, finalists=6)
    wanted = plain.run(plain.race())
    bench = Bench(losses, rules, finalists=6)
    bench.run(bench.race(), most=cut, at_once=at_once, order=seed)
    again = bench.run(bench.race(), at_once=at_once, order=seed + 1)
    assert again.candidates == wanted.candidates
    assert sorted(bench.ran) == sorted(plain.ran)
    assert wanted.total == len(plain.ran)
    assert bench.race().done  # asked first of all, as a sweep that is started again does


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9, unique=True), st.integers(1, 4))
def test_climbers_are_the_best_of_their_tier(losses: list[float], width: int) -> None:
    ranked = sorted(enumerate(losses), key=lambda pair: pair[1])
    going = climbers(ranked, lambda _: (False, None), width, 0.4)
    assert going == [item for item, _ in ranked[:width]]
