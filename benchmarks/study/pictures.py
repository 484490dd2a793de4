"""Draws the same captions from the same noise with several models: a row a model.

    python -m benchmarks.study.pictures --out docs/recipes.png \\
        "teacher=examples/miniature" "PPCL, 50%=runs/ppcl/best/50pct"

Captions are of combinations that training never showed, --per-family of each family; a green frame
says that the judge finds what was asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from cluster.cli.models import load, local_model, made_for
from trainers.evaluate import generate
from trainers.tasks import TASKS

RIGHT, WRONG = "#2a9d5c", "#d9d9d9"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("models", nargs="+", metavar="NAME=MODEL")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--per-family", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=20)
    options = arguments.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    task = TASKS["shapes"]
    captions = task.held_out_captions(options.per_family, 0)
    named = [model.partition("=")[::2] for model in options.models]
    size = (1.1 * len(captions), 1.25 * len(named) + 0.5)
    drawn, axes = pyplot.subplots(len(named), len(captions), figsize=size, squeeze=False)
    for row, (name, model) in zip(axes, named, strict=True):
        folder = local_model(model)
        pictures = generate(load(folder), captions, 0, options.steps, made_for(folder))
        for ax, picture, caption in zip(row, pictures, captions, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            right = task.judge(picture, caption)
            for side in ax.spines.values():
                side.set(color=RIGHT if right else WRONG, linewidth=2.5 if right else 1)
        row[0].set_ylabel(name, fontsize=8)
    for ax, caption in zip(axes[0], captions, strict=True):
        words = caption.split()
        half = (len(words) + 1) // 2
        ax.set_title(f"{' '.join(words[:half])}\n{' '.join(words[half:])}", fontsize=5.5)
    drawn.tight_layout(pad=0.4)
    drawn.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()
