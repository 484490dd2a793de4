"""Runs the study: every method at every budget and seed, a line of JSON each.

    python -m benchmarks.study.run examples/miniature.yaml --out build/study

Needs the latents of that sweep (`espalier encode CONFIG`). What is in --out already is not run
again, so the study may be cut off, and split over processes with --part. `report` makes
docs/study.md of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.study.methods import ABLATIONS, CHAINS, METHODS, Case, Method, needed
from benchmarks.study.setting import Setting, Trained, train_in_sequence, train_library
from cluster.cli.common import open_config
from search.analyse import nominate
from search.budget import Target
from trainers.data.latents import open_latents, training_inputs
from trainers.evaluate import fidelity_loss
from trainers.library.train import train_replacements
from trainers.losses import diffusion_loss, velocity_loss
from trainers.optimizer import adamw, rate_at
from trainers.students.counts import plan_parameters
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble

STEPS, BATCH, RATE = 150, 32, 2e-3
"""Of every recovery; the rate is the middle of the demo's range."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", type=Path)
    arguments.add_argument("--out", type=Path, default=Path("build/study"))
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--budgets", nargs="+", default=["50%", "33%"])
    arguments.add_argument("--per-family", type=int, default=20)
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sweep = open_config(options.config, [])
    latents = open_latents(sweep.store, sweep.encoded_prefix)
    setting = Setting(sweep, latents, options.per_family)
    teacher = options.out / "teacher.json"
    if not teacher.exists():
        whole = {"parameters": setting.sweep.teacher_parameters, **setting.measure(setting.teacher)}
        teacher.write_text(json.dumps(whole, indent=1) + "\n")
    for seed in options.seeds:
        run_seed(setting, METHODS, seed, options.budgets, options.out)
        run_seed(setting, ABLATIONS, seed, options.budgets[:1], options.out)
        run_seed(setting, CHAINS, seed, options.budgets[1:], options.out)


def run_seed(
    setting: Setting, methods: Sequence[Method], seed: int, budgets: list[str], out: Path
) -> None:
    """All methods of one seed, over one library."""
    whole = setting.sweep.teacher_parameters
    limits = {budget: int(whole * float(budget.rstrip("%")) / 100) for budget in budgets}
    todo = [
        (method, budget)
        for budget in budgets
        for method in methods
        if not (out / _name(method, budget, seed)).exists()
    ]
    if not todo:
        return
    started = time.perf_counter()
    ground = setting.ground(setting.analysis(seed))
    analysed = time.perf_counter() - started
    cases = {b: Case(setting, ground, limit, seed) for b, limit in limits.items()}
    wanted: dict[str, list[BlockPlan]] = {"middle": []}
    for case in cases.values():
        for start, blocks in needed(case, [method for method, _ in todo]).items():
            wanted.setdefault(start, []).extend(blocks)
    offered = nominate(
        ground.analysis.damages,
        setting.family.name,
        setting.config,
        [Target(b, limits[b]) for b in sorted(limits, key=lambda b: -limits[b])],
        setting.sweep.config.analyse.replacements,
    )
    if any(method.choose for method, _ in todo):
        wanted["middle"] += offered
    trained = {
        start: train_library(setting, list(dict.fromkeys(blocks)), seed, start)
        for start, blocks in wanted.items()
    }
    for method, budget in todo:
        row = run_method(method, cases[budget], trained.get(method.start, Trained({}, {}, {})))
        row |= {"method": method.name, "budget": budget, "seed": seed, "analysis_s": analysed}
        (out / _name(method, budget, seed)).write_text(json.dumps(row, indent=1) + "\n")
        print(json.dumps(_short(row)), flush=True)


def run_method(method: Method, case: Case, trained: Trained) -> dict[str, Any]:
    """Plan, student, recovery and everything measured; only `reached` when there is no plan."""
    setting = case.setting
    started = time.perf_counter()
    plan = method.choose(case, trained) if method.choose else method.plan(case)
    searched = time.perf_counter() - started
    if plan is None:
        return {"reached": False}
    started = time.perf_counter()
    student = first_student(setting, plan, method, trained, case.seed)
    sequenced = time.perf_counter() - started
    before = fidelity_loss(student, setting.family, setting.probe)
    started = time.perf_counter()
    if method.tuned:
        recover(setting, student, method, case.seed)
    if method.chained:
        plan, student = share_streams(case, plan, student)
        before = fidelity_loss(student, setting.family, setting.probe)
        recover(setting, student, method, case.seed + 1)
    recovered = time.perf_counter() - started
    if method.trained is None:
        library = 0.0
    elif method.trained == "in sequence":
        library = sequenced
    elif method.choose:  # whoever combines freely pays for the whole library
        library = sum(trained.seconds.values())
    else:
        library = sum(trained.seconds.get(block, 0.0) for block in plan.blocks)
    return {
        "reached": True,
        "parameters": plan_parameters(plan, setting.config),
        "blocks": len(plan.blocks),
        "plan": json.loads(plan.to_json()),
        "fidelity_before": before,
        "search_s": searched,
        "library_s": library,
        "recovery_s": recovered,
        **setting.measure(student),
    }


def first_student(
    setting: Setting, plan: Plan, method: Method, trained: Trained, seed: int
) -> nn.Module:
    """The student before recovery."""
    if method.trained == "apart":
        return assemble(setting.teacher, plan, lambda block: trained.weights[block])
    blocks = tuple(
        BlockPlan(span=b.span, ffn=b.ffn, text=b.text, start=method.start) for b in plan.blocks
    )
    student = assemble(setting.teacher, plan.model_copy(update={"blocks": blocks}))
    if method.trained == "in sequence":
        train_in_sequence(setting, student, plan, seed)
    return student


def share_streams(case: Case, plan: Plan, half: nn.Module) -> tuple[Plan, nn.Module]:
    """Amber's hybrid: as many of a student's last blocks as the budget asks for become one shared
    stream, trained towards the student's own states. Its plan in the first teacher's blocks."""
    setting, family, last = case.setting, case.setting.family, len(plan.blocks)
    for count in range(1, last):
        blocks = [
            BlockPlan(span=b.span, start=b.start, text="shared" if i >= last - count else b.text)
            for i, b in enumerate(plan.blocks)
        ]
        whole = plan.model_copy(update={"blocks": tuple(blocks)})
        if plan_parameters(whole, setting.config) <= case.limit:
            break
    step = Plan(
        family=plan.family,
        teacher_blocks=last,
        blocks=tuple(
            BlockPlan(span=(i, i), text=b.text, start="library") for i, b in enumerate(blocks)
        ),
    )
    shared = [block for block in step.blocks if not block.untouched]
    config = setting.sweep.config.library.training.model_copy(update={"start": "first"})
    made = train_replacements(half, family, shared, setting.latents, config, case.seed)
    student = assemble(half, step, lambda block: made[block].module.state_dict())
    return whole, student


def recover(setting: Setting, student: nn.Module, method: Method, seed: int) -> None:
    """The same number of steps for everyone, unless said otherwise, on the method's own loss."""
    family, steps = setting.family, STEPS * method.longer
    student.requires_grad_(True).train()
    blocks = family.block_modules(student)
    for block in islice(blocks, round(method.frozen * len(blocks))):
        block.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = adamw(trained, RATE)
    shift = setting.sweep.config.library.timestep_shift
    batches = setting.latents.batches(seed * 1009 + 1, BATCH)
    for step, batch in enumerate(islice(batches, steps)):
        inputs, noise_BNC = training_inputs(batch, seed * 1009 + 1, shift)
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_at(step, steps, 8)
        velocity_BNC = family.forward(student, inputs)
        if method.loss == "velocity":
            loss = velocity_loss(velocity_BNC, family.forward(setting.teacher, inputs))
        else:
            loss = diffusion_loss(velocity_BNC, batch.clean_BNC, noise_BNC)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    student.requires_grad_(False).eval()


def _name(method: Method, budget: str, seed: int) -> str:
    return f"{method.name.replace(',', '').replace(' ', '-')}.{budget.rstrip('%')}.{seed}.json"


def _short(row: dict[str, Any]) -> dict[str, Any]:
    named = {key: row[key] for key in ("method", "budget", "seed", "reached")}
    if not row["reached"]:
        return named
    return {
        **named,
        "before": round(row["fidelity_before"], 4),
        "after": round(row["fidelity"], 4),
        "judge": round(row["judge"]["overall"], 3),
        "parameters": row["parameters"],
    }


if __name__ == "__main__":
    main()
