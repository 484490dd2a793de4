"""The command `espalier`.

    espalier sweep examples/miniature.yaml

Commands import what they need when they run, so that help is there at once.
"""

from __future__ import annotations

import typer

from cluster.cli import best, gc, models, run, show

app = typer.Typer(
    name="espalier",
    help=(
        "Prunes and trains large text-to-image diffusion transformers into small ones.\n\n"
        "A sweep goes through stages, each also a command: encode, measure, analyse, library, "
        "search, recover, publish, report. A stage that is done is skipped, one that was cut off "
        "resumes."
    ),
    epilog=(
        "Examples:\n\n"
        "  espalier sweep examples/miniature.yaml\n\n"
        "  espalier sweep sweep.yaml --set storage=s3://bucket/runs --set 'budgets=[10B, 6B]'\n\n"
        "  espalier status sweep.yaml\n\n"
        "  espalier generate runs/best/50pct --prompt 'a red circle' --out circle.png\n\n"
        "Exit codes: 0 done, 1 wrong input, 2 wrong usage, 3 a stage failed, 130 interrupted."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.register(app)
show.register(app)
models.register(app)
best.register(app)
gc.register(app)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
