"""What it costs to find a good half: our search against TPE + ASHA with a student a trial.

    OMP_NUM_THREADS=1 python -m benchmarks.rival.run examples/miniature.yaml --out build/rival

Needs the latents of that sweep (`espalier encode CONFIG`). Each part is written when it is done and
not run again. Prints one JSON object and draws build/rival/search.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rival.baseline import run_baseline
from benchmarks.rival.common import open_setting
from benchmarks.rival.compare import compare, draw
from benchmarks.rival.ours import run_ours
from cluster.connect import connected, processors
from search.budget import parse_budget


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", type=Path)
    arguments.add_argument("--out", type=Path, default=Path("build/rival"))
    arguments.add_argument("--budget", default="50%")
    arguments.add_argument("--trials", type=int, default=60)
    arguments.add_argument("--steps", type=int, nargs="+", default=[200])
    arguments.add_argument("--per-family", type=int, default=40)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    setting = open_setting(options.config, options.per_family)
    limit = parse_budget(options.budget).limit(setting.sweep.teacher_parameters)

    ours = once(
        options.out / "ours.json", lambda: run_ours(setting, limit, options.trials, options.seed)
    )
    rivals = []
    for steps in options.steps:

        def search(steps: int = steps) -> dict[str, Any]:
            notes = options.out / f"trials-{steps}"
            shutil.rmtree(notes, ignore_errors=True)
            notes.mkdir()
            with connected("cpu"):
                return run_baseline(
                    options.config,
                    limit,
                    options.trials,
                    steps,
                    options.seed,
                    options.per_family,
                    processors(),
                    notes,
                )

        rivals.append(once(options.out / f"baseline-{steps}.json", search))
    found = [compare(ours, rival) for rival in rivals]
    print(json.dumps(found, indent=1))
    draw(ours, rivals, found, options.out / "search.png")


def once(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gave, now or before."""
    if not file.exists():
        file.write_text(json.dumps(work(), indent=1) + "\n")
    read: dict[str, Any] = json.loads(file.read_text())
    return read


if __name__ == "__main__":
    main()
