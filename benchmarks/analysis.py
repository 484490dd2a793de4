"""How well the analysis estimates a span's damage without a pass of the teacher for it.

    python -m benchmarks.analysis examples/miniature.yaml

The estimate sums what each block's probe does alone; it is held against the velocity's change when
the whole chain of probes stands in for the span, measured for every span through the rest of the
teacher. Needs the latents of that sweep (`espalier encode CONFIG`). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

from cluster.cli.common import open_config
from search.effects import probed
from search.redundancy import Measurer
from trainers.data.latents import make_inputs, open_latents
from trainers.students.families.base import State

TIMES = (0.95, 0.75, 0.5, 0.25)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", type=Path)
    options = arguments.parse_args()
    sweep = open_config(options.config, [])
    latents = open_latents(sweep.store, sweep.encoded_prefix)
    family, teacher = sweep.teacher.family, sweep.teacher.transformer()
    blocks = family.block_modules(teacher)
    settings = sweep.config.analyse
    started = time.perf_counter()
    alone = Measurer(teacher, family, latents, sweep.analysed, settings, sweep.config.seed)
    alone.gather()
    solved = [alone.solve(i, alone.take(i)) for i in range(len(blocks))]
    analysis = alone.conclude(solved, [alone.effects(*solved)], [alone.samples()])
    seconds = time.perf_counter() - started
    probes = {key: weight for one in solved for key, weight in one.probes.items()}
    merged = [b for b in sweep.analysed if b.length > 1 and b.depth_only]
    spans = [block.span for block in merged]

    started = time.perf_counter()
    batch = latents.batch(latents.training[: settings.pictures])
    measured = torch.zeros(len(merged))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in TIMES:
            noise_BNC = torch.randn(batch.clean_BNC.shape, generator=generator)
            t_B = torch.full((len(noise_BNC),), t)
            inputs = make_inputs(batch, t_B, noise_BNC)
            state, context = family.begin(teacher, inputs)
            states = [state]
            for module in blocks:
                states.append(family.run_block(module, states[-1], context))
            velocity_BNC = family.end(teacher, states[-1], context)
            for at, (first, last) in enumerate(spans):
                state = states[first + 1]
                for i in range(first + 1, last + 1):
                    state = State(
                        probed(state.text_BMD, probes[i, "text"]),
                        probed(state.image_BND, probes[i, "image"]),
                    )
                for module in blocks[last + 1 :]:
                    state = family.run_block(module, state, context)
                other_BNC = family.end(teacher, state, context)
                measured[at] += (other_BNC - velocity_BNC).square().mean() / len(TIMES)
    estimated = torch.tensor([analysis.damages[block] for block in merged])
    found = {
        "spans": len(merged),
        "spearman": round(float(spearmanr(estimated, measured).statistic), 3),
        "log_ratio_sd": round(float((estimated / measured).log().std()), 3),
        "analysis_s": round(seconds, 2),
        "measuring_every_span_s": round(time.perf_counter() - started, 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
