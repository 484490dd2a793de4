"""What is predicted of a plan, from a table of its parts, against the whole model measured."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.costs import costs_in, plan_costs
from search.space import candidates
from tests.trainers.small import small_latents
from tests.trainers.students.tiny import BLOCKS, FAMILY_TEACHERS, Tiny, plans
from trainers.measure import (
    MeasureConfig,
    Table,
    live_bytes,
    measure_beside,
    measure_table,
    measuring_inputs,
    shaped_model,
    variant,
    weight_bytes,
)
from trainers.students.plan import BlockPlan, Plan

QUICK = MeasureConfig(warmup=0, repeats=2)
WIDTHS = (1.0, 0.75, 0.5, 0.3, 0.01, "linear")


@pytest.fixture(scope="module", params=FAMILY_TEACHERS, ids=lambda tiny: tiny.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param  # type: ignore[no-any-return]  # pytest is not that precise


@pytest.fixture(scope="module")
def table(tiny: Tiny) -> Table:
    own = [BlockPlan(span=(i, i)) for i in range(BLOCKS)]
    offered = candidates(BLOCKS, BLOCKS, WIDTHS, ("dual", "projected", "shared"))
    blocks = [b for b in offered if tiny.family.refusal(tiny.config, b) is None]
    return measure_table(
        tiny.model(), tiny.family, tiny.config, [*own, *blocks], [tiny.inputs(False)], QUICK
    )


def measured(tiny: Tiny, table: Table, plan: Plan) -> tuple[int, int]:
    teacher = tiny.model()
    model = shaped_model(tiny.family, tiny.config, plan, next(teacher.parameters()))
    cost = measure_beside(
        partial(tiny.family.forward, teacher),
        partial(tiny.family.forward, model),
        weight_bytes([model]),
        table,
        [tiny.inputs(False)],
        QUICK,
    )
    return cost.latency, cost.memory


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_memory_is_predicted_as_it_is_measured(
    tiny: Tiny, table: Table, data: st.DataObject
) -> None:
    plan = data.draw(plans(tiny))
    predicted = plan_costs(plan, tiny.family, tiny.config, table)
    latency, memory = measured(tiny, table, plan)
    # But for a few tensors whose lives differ by one operation.
    assert predicted["memory"] == pytest.approx(memory, rel=0.01)
    assert latency > 0


def test_latencies_add_up_to_the_teachers(tiny: Tiny, table: Table) -> None:
    costs = costs_in("latency", tiny.family, tiny.config, tiny.identity.blocks, table)
    rounding = BLOCKS + 1
    assert abs(costs.of(tiny.identity) - table.teacher.latency) <= rounding
    cut = costs_in("latency", tiny.family, tiny.config, tiny.cut.blocks, table)
    assert cut.of(tiny.cut) == cut.outside + sum(cut.blocks[b].cost for b in tiny.cut.blocks)
    assert all(cost.latency > 0 for cost in table.blocks.values())


def test_a_block_costs_what_its_shape_does_wherever_it_stands(tiny: Tiny) -> None:
    def name(block: BlockPlan) -> str:
        return variant(tiny.family, tiny.config, block)

    assert name(BlockPlan(span=(0, 0))) == name(BlockPlan(span=(1, 2), start="library"))
    assert name(BlockPlan(span=(0, 0))) != name(BlockPlan(span=(0, 0), ffn=0.5))
    kinds = {name(BlockPlan(span=(i, i))) for i in range(BLOCKS)}
    assert len(kinds) == (2 if tiny.name == "flux" else 1)


def test_memory_without_weights_is_the_largest_and_not_the_sum(tiny: Tiny, table: Table) -> None:
    blocks = [BlockPlan(span=(i, i)) for i in range(BLOCKS)]
    costs = costs_in("memory", tiny.family, tiny.config, blocks, table)
    weights = table.bytes_each * sum(tiny.family.block_parameters(tiny.config, b) for b in blocks)
    peak = max(price.peak for price in costs.blocks.values())
    assert costs.of(tiny.identity) == costs.outside + weights + peak
    assert peak > 0


def test_live_bytes_count_what_is_alive_at_once() -> None:
    kept: list[Tensor] = []

    def work() -> None:
        one = torch.zeros(1000)  # 4,000 bytes
        two = one + 1  # 8,000
        del one
        kept.append(two.view(10, 100))  # a view is no memory of its own
        three = two * 2  # 8,000
        two.add_(three)
        torch.ones(500)  # 10,000

    assert live_bytes(work) == 10_000
    assert live_bytes(lambda: kept[0].sum()) == 4


def test_inputs_are_of_every_size_with_the_longest_caption() -> None:
    latents = small_latents()
    config = MeasureConfig(resolutions=(64, 128), batch_sizes=(1, 3))
    made = measuring_inputs(latents, 64, config, "cpu", torch.float32)
    assert [(i.noisy_BNC.shape, i.grid) for i in made] == [
        ((1, 16, 64), (4, 4)), ((3, 16, 64), (4, 4)), ((1, 64, 64), (8, 8)), ((3, 64, 64), (8, 8)),
    ]  # fmt: skip
    longest = max(int(shard.mask.sum(dim=1).max()) for shard in latents.shards)
    assert {i.embeds_BMD.shape[1] for i in made} == {longest}
