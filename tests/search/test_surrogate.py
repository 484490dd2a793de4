"""Corrected damages: against a plain least-squares solution, and where they must not move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from search.ranks import rank_correlation
from search.solver import Piece
from search.space import Space, candidates
from search.surrogate import STRENGTH, Surrogate
from trainers.students.plan import BlockPlan, Plan

BLOCKS = 6


def make_space(seed: int) -> Space:
    rng = np.random.default_rng(seed)
    pieces = {
        block: Piece(0.0 if block.untouched else float(rng.uniform(0.1, 1.0)), 10)
        for block in candidates(BLOCKS, 3, (1.0, 0.5))
    }
    pieces |= {BlockPlan(span=(i, i)): Piece(0.0, 10) for i in range(BLOCKS)}
    return Space("qwen_image", BLOCKS, 5, pieces)


def some_plans(space: Space, count: int) -> list[Plan]:
    """Plans of at most four blocks, from little summed damage to much."""
    plans = space.exact(45, 200)
    return plans[:: len(plans) // count][:count]


def interaction(seed: int, plan: Plan, space: Space) -> float:
    """A loss that neighbours make worse."""
    rng = np.random.default_rng(seed)
    worse = {block: rng.uniform(0.5, 3.0) for block in sorted(space.pieces, key=str)}
    return sum(worse[block] * space.pieces[block].damage for block in plan.blocks)


def test_nothing_is_said_before_a_plan_was_scored() -> None:
    space = make_space(0)
    surrogate = Surrogate(space.pieces)
    assert surrogate.damage(space.exact(45)[0]) is None
    assert surrogate.pieces() == space.pieces


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_the_fit_is_the_least_squares_solution(seed: int, count: int) -> None:
    space = make_space(seed)
    plans = some_plans(space, count)
    losses = [interaction(seed, plan, space) for plan in plans]
    surrogate = Surrogate(space.pieces)
    for plan, loss in zip(plans, losses, strict=True):
        surrogate.learn(plan, loss)
    used = sorted({b for plan in plans for b in plan.blocks if space.pieces[b].damage > 0}, key=str)
    damages = np.array([space.pieces[block].damage for block in used])
    rows = np.array([[b in plan.blocks for b in used] for plan in plans]) * damages
    rows /= np.array(losses)[:, None]
    sums = rows.sum(axis=1)
    scale = sums.sum() / (sums**2).sum()
    system = np.vstack([scale * rows, STRENGTH**0.5 * np.eye(len(used))])
    wanted = np.concatenate([np.ones(len(plans)), np.full(len(used), STRENGTH**0.5)])
    expected = lsq_linear(system, wanted, bounds=(0, np.inf), tol=1e-12).x * scale * damages
    corrected = surrogate.pieces()
    assert [corrected[block].damage for block in used] == pytest.approx(expected, rel=1e-4)
    for plan in plans:
        summed = sum(corrected[block].damage for block in plan.blocks)
        assert surrogate.damage(plan) == pytest.approx(summed)


def test_a_piece_that_no_scored_plan_holds_is_only_scaled() -> None:
    space = make_space(1)
    plan = space.exact(45)[0]
    surrogate = Surrogate(space.pieces)
    surrogate.learn(plan, 3 * space.damage(plan))
    corrected = surrogate.pieces()
    for block, piece in space.pieces.items():
        assert corrected[block].damage == pytest.approx(3 * piece.damage)
        assert corrected[block].cost == piece.cost


def test_what_was_learned_ranks_unseen_plans_better() -> None:
    gains = []
    for seed in range(5):
        space = make_space(seed)
        plans = some_plans(space, 80)
        surrogate = Surrogate(space.pieces)
        for plan in plans[::2]:
            surrogate.learn(plan, interaction(seed, plan, space))
        unseen = plans[1::2]
        losses = [interaction(seed, plan, space) for plan in unseen]
        before = rank_correlation([space.damage(plan) for plan in unseen], losses)
        after = rank_correlation([surrogate.damage(plan) or 0.0 for plan in unseen], losses)
        assert before is not None
        assert after is not None
        gains.append(after - before)
    assert np.mean(gains) > 0.05
