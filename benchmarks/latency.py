"""How well a plan's latency and memory are predicted from a table of blocks.

    python -m benchmarks.latency examples/miniature.yaml

Measures the table anew, then whole students beside the teacher: merged uniformly, with narrow and
linear FFNs, projected and shared text, and mixed at random. Needs the latents of that sweep
(`espalier encode CONFIG`). Prints one JSON object: predicted over measured, by plan.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cluster.cli.common import open_config
from search.costs import plan_costs
from search.space import candidates
from search.sweep import Sweep
from trainers.data.latents import open_latents
from trainers.measure import (
    measure_beside,
    measure_table,
    measuring_inputs,
    shaped_model,
    weight_bytes,
)
from trainers.students.plan import BlockPlan, Ffn, Plan, Text, uniform_plan

WIDTHS: tuple[Ffn, ...] = (1.0, 0.5, "linear")
TEXTS: tuple[Text, ...] = ("dual", "projected", "shared")
MIXED = 12


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", type=Path)
    arguments.add_argument("--storage", default="runs")
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    sweep = open_config(options.config, [f"storage={options.storage}"])
    settings = sweep.config.measure.model_copy(update={"repeats": options.repeats})
    family, config = sweep.teacher.family, sweep.teacher.config
    teacher = sweep.teacher.transformer()
    each = next(teacher.parameters())
    latents = open_latents(sweep.store, sweep.encoded_prefix)
    resolution = sweep.config.data.resolution
    inputs = measuring_inputs(latents, resolution, settings, each.device, each.dtype)
    offered = _offered(sweep)
    table = measure_table(teacher, family, config, offered, inputs, settings)
    ratios: dict[str, dict[str, float]] = {}
    for name, plan in _plans(sweep, offered):
        model = shaped_model(family, config, plan, each)
        found = measure_beside(
            partial(family.forward, teacher),
            partial(family.forward, model),
            weight_bytes([model]),
            table,
            inputs,
            settings,
        )
        predicted = plan_costs(plan, family, config, table)
        ratios[name] = {
            "latency": round(predicted["latency"] / found.latency, 3),
            "memory": round(predicted["memory"] / found.memory, 4),
        }
    said = {
        "device": table.device,
        "teacher_ms": round(table.teacher.latency / 1e3, 2),
        "predicted_over_measured": ratios,
    }
    for kind in ("latency", "memory"):
        column = [ratio[kind] for ratio in ratios.values()]
        said[kind] = {
            "median": round(statistics.median(column), 3),
            "least": min(column),
            "most": max(column),
        }
    print(json.dumps(said))


def _offered(sweep: Sweep) -> list[BlockPlan]:
    family, config = sweep.teacher.family, sweep.teacher.config
    own = [BlockPlan(span=(i, i)) for i in range(sweep.teacher_blocks)]
    every = candidates(sweep.teacher_blocks, 3, WIDTHS, TEXTS)
    return [*own, *(block for block in every if family.refusal(config, block) is None)]


def _plans(sweep: Sweep, offered: list[BlockPlan]) -> Iterator[tuple[str, Plan]]:
    count, name = sweep.teacher_blocks, sweep.teacher.family.name
    for share in (0.75, 0.5):
        yield f"{share:.0%} of the blocks", uniform_plan(name, count, int(share * count))
    rng = random.Random(0)
    for number in range(MIXED):
        blocks: list[BlockPlan] = []
        while (at := sum(block.length for block in blocks)) < count:
            blocks.append(rng.choice([block for block in offered if block.span[0] == at]))
        yield f"mixed {number}", Plan(family=name, teacher_blocks=count, blocks=tuple(blocks))


if __name__ == "__main__":
    main()
