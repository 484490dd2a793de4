"""Espalier's search, priced: analysis, library, scored trials, and the best one's recovery.

The sweep's own functions, in one process without Ray, so that a clock can stand beside each.
"""

from __future__ import annotations

import math
import time
from typing import Any

from benchmarks.rival.common import Mark, distil, judged
from benchmarks.study.setting import Setting, train_library
from search.analyse import nominate
from search.budget import Target
from search.proposals import Proposals, Start
from search.rules import RULES
from search.score import composed_loss
from search.space import priced_space
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble, make_block

MARKS = 3
"""Points of a recovery at which its student is measured and judged."""


def run_ours(setting: Setting, limit: int, trials: int, seed: int) -> dict[str, Any]:
    """What each part cost, the best loss after each trial, and the recovery of every plan that was
    the best at some time."""
    sweep, family, config = setting.sweep, setting.family, setting.config
    clock = time.process_time
    begun = clock()
    analysis = setting.analysis(seed)
    ground = setting.ground(analysis)
    rules: list[Start] = [
        ("half", rule, plan)
        for rule in sweep.config.search.rules
        if (plan := RULES[rule](ground, limit)) is not None
    ]
    target = Target("half", limit)
    blocks = nominate(
        analysis.damages,
        family.name,
        config,
        [target],
        # The sweep's are for all of its budgets, and here is one.
        sweep.config.analyse.replacements // len(sweep.config.budgets),
        [plan for _, _, plan in rules],
    )
    analysed = clock() - begun

    begun = clock()
    library = train_library(setting, blocks, seed)
    own = [BlockPlan(span=(i, i)) for i in range(family.blocks(config))]
    damages = {**dict.fromkeys(own, 0.0), **library.damages}
    trained = clock() - begun

    teacher_blocks = list(family.block_modules(setting.teacher))
    modules = dict(zip(own, teacher_blocks, strict=True))
    for block, weights in library.weights.items():
        started = block.model_copy(update={"start": "middle"})
        module = make_block(family, config, teacher_blocks, started)
        module.load_state_dict(dict(weights))
        modules[block] = module.requires_grad_(False).eval()

    begun = clock()
    space = priced_space(family.name, config, damages)
    search = sweep.config.search
    proposals = Proposals(
        space,
        [target],
        trials=trials,
        exact=search.exact,
        lag=1,
        seed=seed,
        plans=rules,
        sampler=search.sampler,
    )
    best, best_plan = math.inf, None
    scored: list[dict[str, Any]] = []
    plans: dict[str, Plan] = {}
    while (proposal := proposals.next()) is not None:
        chosen = [modules[block] for block in proposal.plan.blocks]
        loss = composed_loss(setting.teacher, family, chosen, setting.probe)
        proposals.tell(proposal.number, loss)
        if loss < best:
            best, best_plan = loss, proposal.plan
            plans[best_plan.digest] = best_plan
        assert best_plan is not None
        scored.append({"cpu": clock() - begun, "best": best, "plan": best_plan.digest})

    return {
        "analysis_cpu": analysed,
        "library_cpu": trained,
        "replacements": len(blocks),
        "trials": scored,
        "recoveries": {
            digest: recovered(setting, plan, library.weights, seed)
            for digest, plan in plans.items()
        },
    }


def recovered(setting: Setting, plan: Plan, weights: Any, seed: int) -> list[dict[str, Any]]:
    """A plan's student on its way through the middle schedule."""
    schedules = setting.sweep.config.recover.space
    schedule = schedules.schedule(schedules.middle())
    student = assemble(setting.teacher, plan, lambda block: weights[block])
    found: list[dict[str, Any]] = []

    def reached(mark: Mark) -> None:
        found.append({**mark._asdict(), "judge": judged(setting, student)})

    marks = {math.ceil(schedule.steps * (i + 1) / MARKS) for i in range(MARKS)}
    distil(setting, student.float(), plan, schedule, seed, marks, reached)
    return found
