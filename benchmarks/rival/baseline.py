"""The rival: Optuna's TPE over which blocks to keep and how wide, every trial distilling its own
student, ASHA stopping the worse ones. What a user of Ray Tune would write with its own parts.

It is given much that its writer would have to find out: each proposal fits the budget, the first
block always stays, and the loss, batch and noise of its distillation are those of our own recovery.
Using an answer of the teacher twice is ours, and no part of it unless `reuse` says so.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.rival.common import Mark, distil, judged, open_setting
from trainers.schedule import Phase, Schedule
from trainers.students.families.base import Config, Family
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble

WIDTHS = (1.0, 0.5)
RATES = (1e-3, 6e-3)
REDUCTION = 3
"""ASHA's: of three candidates one goes on."""


def rungs(steps: int) -> list[int]:
    """Where ASHA looks at a trial of so many steps."""
    found = [steps]
    while found[0] >= 10 * REDUCTION:
        found.insert(0, found[0] // REDUCTION)
    return found


def drawn_plan(family: Family, config: Config, limit: int, drawn: Mapping[str, Any]) -> Plan:
    """The blocks of highest score, as many as the budget allows; each stands for those that were
    dropped behind it."""
    width, blocks = drawn["ffn"], family.blocks(config)
    one = BlockPlan(span=(0, 1), start="first", ffn=width)
    room = limit - family.outside_parameters(config)
    count = min(blocks, room // family.block_parameters(config, one))
    ranked = sorted(range(1, blocks), key=lambda i: -drawn[f"keep_{i}"])
    kept = sorted([0, *ranked[: count - 1]])
    spans = zip(kept, [*(i - 1 for i in kept[1:]), blocks - 1], strict=True)
    made = tuple(
        BlockPlan(span=span, ffn=width)
        if span[0] == span[1]
        else BlockPlan(span=span, ffn=width, start="first")
        for span in spans
    )
    return Plan(family=family.name, teacher_blocks=blocks, blocks=made)


def drawn_schedule(steps: int, rate: float, reuse: int) -> Schedule:
    """The whole student matches the teacher's velocity."""
    phase = Phase(
        loss="velocity",
        train="all",
        steps=steps,
        lr=rate,
        batch_size=64,
        timestep_shift=8.0,
        reuse=reuse,
    )
    return Schedule(phases=(phase,))


def space(trial: Any) -> None:
    """What Optuna draws; OptunaSearch pickles it, so it is no lambda."""
    for i in range(1, 16):
        trial.suggest_float(f"keep_{i}", 0.0, 1.0)
    trial.suggest_categorical("ffn", WIDTHS)
    trial.suggest_float("rate", *RATES, log=True)


def trial(config: dict[str, Any]) -> None:
    """One student from nothing but its teacher; the body of a Tune trial."""
    from ray import tune

    options = config["options"]
    setting = open_setting(Path(options["config"]), options["per_family"])
    plan = drawn_plan(setting.family, setting.config, options["limit"], config)
    student = assemble(setting.teacher, plan)
    steps = options["steps"]

    def reached(mark: Mark) -> None:
        score = judged(setting, student) if mark.steps == steps else None
        told = {**mark._asdict(), "judge": score, "order": config["order"]}
        with (Path(options["notes"]) / f"{config['order']:04d}.jsonl").open("a") as lines:
            lines.write(json.dumps(told) + "\n")
        tune.report(told)

    schedule = drawn_schedule(steps, config["rate"], options["reuse"])
    distil(setting, student, plan, schedule, options["seed"], rungs(steps), reached)


def run_baseline(
    config: Path,
    limit: int,
    trials: int,
    steps: int,
    reuse: int,
    seed: int,
    per_family: int,
    workers: int,
    notes: Path,
) -> dict[str, Any]:
    """Searches, and says of each trial in order of proposal what it reached and what it cost; as
    they run, trials note it in the empty folder `notes`."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from search.study import quiet_tune

    class Numbered(OptunaSearch):
        """Trials know their number, by which costs add up."""

        asked = 0

        def suggest(self, trial_id: str) -> Any:
            drawn = super().suggest(trial_id)
            if isinstance(drawn, dict):
                drawn = {**drawn, "order": self.asked, "options": options}
                self.asked += 1
            return drawn

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, quiet_tune():
        options = {
            "config": str(config.resolve()),
            "limit": limit,
            "steps": steps,
            "reuse": reuse,
            "seed": seed,
            "per_family": per_family,
            "notes": str(notes.resolve()),
        }
        scheduler = ASHAScheduler(
            time_attr="steps", max_t=steps, grace_period=rungs(steps)[0], reduction_factor=REDUCTION
        )
        tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                metric="fidelity",
                mode="min",
                search_alg=Numbered(space=space, metric="fidelity", mode="min", seed=seed),
                scheduler=scheduler,
                num_samples=trials,
                max_concurrent_trials=workers,
            ),
            run_config=tune.RunConfig(name="rival", storage_path=f"{folder}/tune", verbose=0),
        ).fit()
        told = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted(notes.glob("*.jsonl"))
        ]
    return {
        "steps": steps,
        "reuse": reuse,
        "trials": told,
        "wall_s": round(time.monotonic() - started, 1),
        "workers": workers,
    }
