"""A library of N replacements takes one teacher pass a step, never N: counts and times it.

    python -m benchmarks.library examples/miniature.yaml

Needs the latents of that sweep (`make demo`, or `espalier encode CONFIG`). With
`--checkpoint-every N` each replacement saves to a folder meanwhile, as a sweep's workers do. Prints
one JSON object a library size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from cluster.cli.common import open_config
from storage import layout
from storage.store import open_store
from trainers.data.latents import open_latents
from trainers.library.checkpoints import Checkpoints
from trainers.library.train import train_replacements
from trainers.students.plan import BlockPlan


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", type=Path)
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 13, 26])
    arguments.add_argument("--checkpoint-every", type=int)
    options = arguments.parse_args()
    sweep = open_config(options.config, [])
    family = sweep.teacher.family
    teacher = sweep.teacher.transformer()
    latents = open_latents(sweep.store, sweep.encoded_prefix)
    last = family.blocks(sweep.teacher.config) - 1
    # Every library holds a span that ends at the last block, so that all need the whole pass.
    spans = [
        BlockPlan(span=(end - length, end), start="library")
        for end in range(last, 3, -1)
        for length in (1, 2, 3)
    ]
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    family.block_modules(teacher)[last].register_forward_hook(count)
    config = sweep.config.library.training.model_copy(update={"steps": options.steps})
    for size in options.sizes:
        passes = 0
        started, worked = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = None
            if options.checkpoint_every:
                prefixes = {b: layout.replacement("benchmark", str(i)) for i, b in enumerate(spans)}
                store = open_store(folder)
                checkpoints = Checkpoints(store, prefixes, "benchmark", options.checkpoint_every)
            train_replacements(
                teacher, family, spans[:size], latents, config, 0, checkpoints=checkpoints
            )
            if checkpoints:
                checkpoints.settle()
        seconds = (time.perf_counter() - started) / options.steps
        worked = (time.process_time() - worked) / options.steps
        print(
            json.dumps(
                {
                    "replacements": size,
                    "teacher_passes_per_step": passes / options.steps,
                    "ms_per_step": round(1000 * seconds, 1),
                    "cpu_ms_per_step": round(1000 * worked, 1),
                    "ms_per_step_and_replacement": round(1000 * seconds / size, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
