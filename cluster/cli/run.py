"""`espalier sweep` and the stages as commands of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from cluster.cli.common import (
    ConfigFile,
    Json,
    Settings,
    StageError,
    command_line,
    endings,
    open_config,
)

if TYPE_CHECKING:
    from cluster.live import View
    from search.stages import Stage
    from search.sweep import Sweep
    from search.tracking.track import Trackers

RUN, STAGE = "Run", "One stage of a sweep"

STAGE_HELP = {
    "encode": "Pictures and captions to latents and text embeddings, in shards.",
    "measure": "Measure latency and memory of blocks, for budgets and objectives that need it.",
    "analyse": "Measure which blocks are redundant, and nominate the spans worth replacing.",
    "library": "Make every nominated replacement that the storage does not hold yet, trained or "
    "cut from the teacher, and measure each.",
    "search": "Assemble and score plans; find the best for every budget.",
    "recover": "Distil the finalists of every budget, racing schedules.",
    "publish": "Judge the finalists and publish the best of every budget as a diffusers model.",
}


def register(app: typer.Typer) -> None:
    app.command("sweep", rich_help_panel=RUN)(sweep)
    for name, text in STAGE_HELP.items():
        app.command(
            name,
            help=f"{text}\n\nExample: espalier {name} sweep.yaml",
            rich_help_panel=STAGE,
        )(_stage_command(name))


def sweep(config: ConfigFile, settings: Settings = [], as_json: Json = False) -> None:  # noqa: B006  # typer copies it
    """Compress the teacher into every wanted size: all stages, from where they stand.

    Examples:

      espalier sweep examples/miniature.yaml

      espalier sweep sweep.yaml --set storage=s3://bucket/runs --set accelerator=gpu

      espalier sweep sweep.yaml --json | tee sweep.jsonl
    """
    with endings(command_line("sweep", config, settings)):
        opened = open_config(config, settings)
        from search.stages import stages_of
        from search.stages.recover import check_all_came_through

        run_stages(opened, stages_of(opened), as_json)
        _say_results(opened, as_json)
        check_all_came_through(opened)


def _stage_command(name: str) -> Callable[..., None]:
    def command(config: ConfigFile, settings: Settings = [], as_json: Json = False) -> None:  # noqa: B006  # typer copies it
        with endings(command_line(name, config, settings)):
            opened = open_config(config, settings)
            from search.stages import STAGES, require_earlier, stage_named
            from search.stages.recover import RECOVER, check_all_came_through

            stage = stage_named(name)
            require_earlier(STAGES, stage, opened)
            run_stages(opened, [stage], as_json)
            if stage is RECOVER:
                check_all_came_through(opened)

    return command


def run_stages(opened: Sweep, stages: Sequence[Stage], as_json: bool) -> None:
    """Runs those of the stages that are not done, on one Ray for all of them."""
    from cluster.connect import connected, core_kept_quiet
    from cluster.live import choose_mode, live_view
    from search.stages import run_stage, skip_stage
    from search.tracking.track import Trackers
    from storage import layout
    from storage.lease import holding

    trackers = Trackers(opened)
    due = [stage for stage in stages if stage.state(opened) != "done"]
    for stage in due:
        if stage.check is not None:
            with explained(stage.name):
                stage.check(opened)
    opened.claim()
    joined = ran = False
    with ExitStack() as stack:
        if due:
            place = layout.leases(opened.name)
            stack.enter_context(holding(opened.store, place, f"sweep {opened.name}"))
        names = [stage.name for stage in stages]
        view = stack.enter_context(live_view(choose_mode(as_json), names))
        for stage in stages:
            if stage.state(opened) == "done":
                view.finish(stage.name, skip_stage(stage, opened).summary, None)
                continue
            progress = view.stage(stage.name)
            with explained(stage.name), stopping(stage.name, view):
                if stage.needs_cluster(opened) and not joined:
                    stack.enter_context(core_kept_quiet())
                    stack.enter_context(connected(opened.config.accelerator))
                    for later in due:
                        if later.check_cluster is not None:
                            later.check_cluster(opened)
                    joined = True
                record = run_stage(stage, opened, progress)
            view.finish(stage.name, record.summary, record.seconds)
            ran = True
            _track(trackers, view)
        if not ran:
            # What they could not be told when it was found.
            _track(trackers, view)


def _track(trackers: Trackers, view: View) -> None:
    """Tells the trackers; what they did not take is said, and no reason to stop."""
    for warning in trackers.write():
        view.warn(warning)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns a stage's error that is not the user's into StageError."""
    from storage.errors import EspalierError

    try:
        yield
    except EspalierError:
        raise
    except Exception as error:
        raise StageError(f"{name}: failed: {_first_line(error)}") from error


@contextmanager
def stopping(name: str, view: View) -> Iterator[None]:
    """Shows that the stage has not come to its end."""
    try:
        yield
    except KeyboardInterrupt:
        view.stop(name, "interrupted")
        raise
    except Exception:
        view.stop(name, "failed")
        raise


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray's errors are tracebacks as text: the last line is the worker's own error.
    return lines[-1] if lines else type(error).__name__


def _say_results(opened: Sweep, as_json: bool) -> None:
    from search.stages.results import results

    found = results(opened)
    if as_json:
        print(json.dumps({"event": "results", **found}))
        return
    for student in found["students"]:
        score = "" if student["judge_score"] is None else f", judge {student['judge_score']:.3f}"
        cost = ""
        if student["latency_us"] is not None:
            from search.report import words

            cost = f"{words.latency(student['latency_us'])} a pass, "
            cost += f"{words.memory(student['memory_bytes'])}, "
        print(
            f"{student['budget']:>8}  {student['parameters']:,} parameters, {cost}"
            f"fidelity loss {student['fidelity_loss']:.4g}{score}  {student['url']}"
        )
    print(f"  report  {found['report']}")
