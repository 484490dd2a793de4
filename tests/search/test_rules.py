"""The papers' rules on analyses made up so that the right plan is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search.analyse import Analysis
from search.rules import RULES, Ground, amber, influence, ppcl, ppcl_intervals
from search.stages.library import rules_alone
from search.sweep import SweepError
from trainers.students.counts import plan_parameters
from trainers.students.plan import BlockPlan, identity_plan, uniform_plan

BLOCKS, LONGEST = 8, 4
CONFIG: dict[str, Any] = {
    "attention_head_dim": 8,
    "joint_attention_dim": 12,
    "num_attention_heads": 2,
    "num_layers": BLOCKS,
}
WHOLE = plan_parameters(identity_plan("qwen_image", BLOCKS), CONFIG)


def limit(blocks: int) -> int:
    """Room for exactly so many blocks."""
    return plan_parameters(uniform_plan("qwen_image", BLOCKS, blocks), CONFIG)


def analysis(
    chain: Tensor | None = None,
    importance: Tensor | None = None,
    moved: Tensor | None = None,
) -> Analysis:
    chain = torch.ones(BLOCKS, LONGEST) if chain is None else chain
    flat = torch.ones(BLOCKS, 2) if importance is None else importance
    return Analysis(
        bands=("0.5–1", "0–0.5"),
        importance=flat,
        influence=torch.ones(BLOCKS) if moved is None else moved,
        ffn_error=torch.arange(BLOCKS) / BLOCKS,
        image_cka=torch.eye(BLOCKS),
        text_cka=text_cka(),
        image_chain=chain,
        text_chain=chain,
        damages={},
    )


def text_cka() -> Tensor:
    """More alike the later."""
    later = torch.arange(BLOCKS) / BLOCKS
    return torch.minimum(later[:, None], later[None, :])


def ground(found: Analysis) -> Ground:
    return Ground("qwen_image", CONFIG, found)


def chain_of(rows: dict[int, list[float]]) -> Tensor:
    """c(u, u + j) by u; other rows lose similarity evenly."""
    chain = torch.tensor([[1 - 0.1 * j for j in range(LONGEST)] for _ in range(BLOCKS)])
    for u, values in rows.items():
        chain[u] = torch.tensor(values)
    for u in range(BLOCKS):
        chain[u, BLOCKS - u :] = math.nan
    return chain


def spans(plan: Any) -> list[tuple[int, int]]:
    return [block.span for block in plan.blocks if block.length > 1]


def test_an_interval_ends_where_the_loss_of_similarity_first_speeds_up():
    # From block 1 the losses are .10, .05, .20: the third is the first to rise, after block 3.
    # From block 4 they are .01, .30: the second rises, after block 5. From 6 on only 7 is left.
    chain = chain_of({1: [1, 0.9, 0.85, 0.65], 4: [1, 0.99, 0.69, 0.68]})
    found = ppcl_intervals(analysis(chain))
    assert [span for span, _ in found] == [(1, 3), (4, 5), (6, 7)]
    assert found[0][1] == pytest.approx(0.85)


def test_an_unlike_interval_is_rejected_and_the_next_starts_one_block_on():
    chain = chain_of({1: [1, 0.9, 0.85, 0.65], 2: [1, 0.97, 0.93, 0.5]})
    found = ppcl_intervals(analysis(chain), least_cka=0.86)
    assert found[0][0] == (2, 3)


def test_the_next_chain_may_start_from_the_end_of_the_last():
    # From block 1 the loss rises after block 3; the chain from 3 then takes 4 and 5, the one from 5
    # takes 6 and 7.
    chain = chain_of({1: [1, 0.9, 0.85, 0.65], 3: [1, 0.99, 0.98, 0.68]})
    found = ppcl_intervals(analysis(chain), next_interval="end")
    assert [span for span, _ in found] == [(1, 3), (4, 5), (6, 7)]
    assert found[1][1] == pytest.approx(0.98)
    for least in (0.0, 0.9, 1.0):
        blocks = [
            block
            for (first, last), _ in ppcl_intervals(analysis(chain), least, "end")
            for block in range(first, last + 1)
        ]
        assert len(blocks) == len(set(blocks))  # spans never share a block


def test_an_even_loss_runs_to_the_longest_span():
    assert [span for span, _ in ppcl_intervals(analysis(chain_of({})))] == [(1, 4), (5, 7)]


def test_ppcl_plugs_the_least_similar_intervals_back_while_there_is_room():
    chain = chain_of({1: [1, 0.9, 0.85, 0.65], 4: [1, 0.99, 0.69, 0.68]})
    found = ground(analysis(chain))
    assert spans(ppcl(found, limit(4))) == [(1, 3), (4, 5), (6, 7)]
    assert spans(ppcl(found, limit(5))) == [(1, 3), (4, 5)]  # (6, 7) is at 0.9, (1, 3) needs two
    assert spans(ppcl(found, limit(6))) == [(4, 5), (6, 7)]


def test_ppcl_goes_on_with_width_where_depth_does_not_reach():
    chain = chain_of({1: [1, 0.9, 0.85, 0.65], 4: [1, 0.99, 0.69, 0.68]})
    found = ground(analysis(chain))
    depth = ppcl(found, limit(4))
    one = found.plan([(1, 3), (4, 5), (6, 7)])
    assert depth == one
    just_below = found.cost(one) - 1
    narrowed = ppcl(found, just_below)
    # The text streams are more alike the later they are.
    assert [(b.span, b.text) for b in narrowed.blocks if b.text != "dual"] == [
        ((6, 7), "projected")
    ]
    projected = [
        BlockPlan(span=b.span, start=b.start, text="projected" if i else "dual")
        for i, b in enumerate(one.blocks)
    ]
    all_projected = one.model_copy(update={"blocks": tuple(projected)})
    further = ppcl(found, found.cost(all_projected) - 1)
    assert [b.span for b in further.blocks if b.ffn == "linear"] == [(0, 0)]  # it fits best there
    assert ppcl(found, limit(1)) is None


def test_amber_drops_the_least_important_and_never_the_ends():
    importance = torch.tensor([[0.0, 0], [5, 5], [1, 1], [2, 2], [9, 9], [0, 0], [7, 7], [0, 0]])
    plan = amber(ground(analysis(importance=importance)), limit(5))
    assert spans(plan) == [(1, 3), (4, 5)]


def test_amber_weighs_noise_more():
    importance = torch.ones(BLOCKS, 2)
    importance[3] = torch.tensor([0.2, 1.0])  # the first band is the noisiest
    importance[5] = torch.tensor([1.0, 0.2])
    assert spans(amber(ground(analysis(importance=importance)), limit(7))) == [(2, 3)]

    even = replace(ground(analysis(importance=importance)), noise_power=0.0)
    assert spans(amber(even, limit(7))) == [(2, 3)]  # alike now: the first of the two
    importance[5] = torch.tensor([1.0, 0.1])
    even = replace(ground(analysis(importance=importance)), noise_power=0.0)
    assert spans(amber(even, limit(7))) == [(4, 5)]


def test_influence_drops_what_moves_least():
    moved = torch.tensor([0.0, 0.5, 0.1, 0.4, 0.3, 0.6, 0.7, 0.0])
    assert spans(influence(ground(analysis(moved=moved)), limit(7))) == [(1, 2)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("blocks", range(1, BLOCKS + 1))
def test_every_rule_fits_its_limit_or_says_none(rule, blocks):
    plan = RULES[rule](ground(analysis(chain_of({}))), limit(blocks))
    if plan is None:
        assert blocks < BLOCKS - 1
    else:
        assert plan_parameters(plan, CONFIG) <= limit(blocks)
    assert RULES[rule](ground(analysis(chain_of({}))), WHOLE) == identity_plan("qwen_image", BLOCKS)


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_merges_blocks_of_two_kinds(rule):
    config = {**CONFIG, "num_layers": 4, "num_single_layers": 4}
    whole = identity_plan("flux", BLOCKS)
    most = int(0.7 * plan_parameters(whole, config))
    plan = RULES[rule](Ground("flux", config, analysis(chain_of({}))), most)
    assert plan is not None
    assert plan_parameters(plan, config) <= most  # PlanError if it does
    assert spans(plan)


def test_uniform_spans_use_the_limit():
    plan = RULES["uniform"](ground(analysis()), limit(5))
    assert plan is not None
    assert sorted(block.length for block in plan.blocks) == [1, 1, 2, 2, 2]


def test_rules_alone_need_their_own_replacements_and_a_plan_for_every_budget():
    found = ground(analysis(chain_of({})))
    starts = [("50pct", "uniform", RULES["uniform"](found, limit(5)))]
    assert [block.span for block in rules_alone(starts, ["50pct"])] == [(1, 2), (4, 5), (6, 7)]
    with pytest.raises(SweepError, match="budget 33pct: no rule"):
        rules_alone(starts, ["50pct", "33pct"])
