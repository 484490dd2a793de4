"""What it costs to find a good half: our search against TPE + ASHA with a student a trial.

    OMP_NUM_THREADS=1 python -m benchmarks.rival.run benchmarks/rival/half.yaml --out build/rival

Needs the latents of that sweep (`espalier encode CONFIG`). Our search runs once a seed, the rival's
with the first. Of either, as many processes train at a time as there are processors, since
neighbours slow each other; half of ours run before the rival and half after it, since machines are
not equally fast at all times. Each part is written when it is done and not run again. Prints one
JSON object and draws build/rival/search.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
    arguments.add_argument("--steps", type=int, default=200, help="of each student of the rival")
    arguments.add_argument("--reuse", type=int, default=1, help="of its teacher's answers")
    arguments.add_argument("--per-family", type=int, default=80)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    middle = (len(options.seeds) + 1) // 2
    ours = our_searches(options, options.seeds[:middle])
    rival = once(options.out / "rival.json", lambda: rival_search(options))
    ours += our_searches(options, options.seeds[middle:])
    found = [compare(mine, rival) for mine in ours]
    print(json.dumps(dict(zip(options.seeds, found, strict=True)), indent=1))
    draw(ours, rival, found, options.out / "search.png")


def our_searches(options: argparse.Namespace, seeds: Sequence[int]) -> list[dict[str, Any]]:
    # Processes of their own, as the rival's: models are opened anew in each.
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processors(), spawning, max_tasks_per_child=1) as pool:
        return list(pool.map(partial(our_search, options), seeds))


def our_search(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    def search() -> dict[str, Any]:
        setting = open_setting(options.config, options.per_family)
        limit = parse_budget(options.budget).limit(setting.sweep.teacher_parameters)
        return run_ours(setting, limit, options.trials, seed)

    return once(options.out / f"ours-{seed}.json", search)


def rival_search(options: argparse.Namespace) -> dict[str, Any]:
    sweep = open_setting(options.config, options.per_family).sweep
    limit = parse_budget(options.budget).limit(sweep.teacher_parameters)
    notes = options.out / "trials"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    with connected("cpu"):
        return run_baseline(
            options.config, limit, options.trials, options.steps, options.reuse,
            options.seeds[0], options.per_family, processors(), notes,
        )  # fmt: skip


def once(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gave, now or before."""
    if not file.exists():
        file.write_text(json.dumps(work(), indent=1) + "\n")
    read: dict[str, Any] = json.loads(file.read_text())
    return read


if __name__ == "__main__":
    main()
