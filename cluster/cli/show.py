"""`espalier status`, `report`, `plan` and `config`: what there is, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.common import (
    ConfigFile,
    Json,
    Settings,
    command_line,
    endings,
    open_config,
    print_json,
)
from cluster.cli.training import describe_training, print_training
from storage.errors import EspalierError
from trainers.estimate import GPUS, MFU

if TYPE_CHECKING:
    from trainers.students.plan import Plan

PANEL = "Look"


class TeacherSizesError(EspalierError):
    """A plan whose teacher's sizes are not known."""


def register(app: typer.Typer) -> None:
    app.command("status", rich_help_panel=PANEL)(status)
    app.command("report", rich_help_panel=PANEL)(report)
    app.command("plan", rich_help_panel=PANEL)(plan)
    app.command("config", rich_help_panel=PANEL)(config)


def status(config: ConfigFile, settings: Settings = [], as_json: Json = False) -> None:  # noqa: B006  # typer copies it
    """Show how far a sweep is, and the best students so far.

    Example: espalier status examples/miniature.yaml --json
    """
    with endings():
        opened = open_config(config, settings)
        from search.stages.results import status as status_of

        found = status_of(opened)
        if as_json:
            print_json(found)
            return
        _print_status(found)


def report(
    config: ConfigFile,
    settings: Settings = [],  # noqa: B006  # typer copies it
    out: Annotated[
        Path | None,
        typer.Option(help="Also write page and pictures into this folder.", show_default=False),
    ] = None,
) -> None:
    """Render the report of a sweep from what it has so far, and print where the page is.

    Example: espalier report examples/miniature.yaml --out build/report
    """
    with endings(command_line("report", config, settings)):
        opened = open_config(config, settings)
        from search.stages.report import render

        print(render(opened, out))


def plan(
    path: Annotated[
        Path,
        typer.Argument(
            help="A plan (JSON or YAML), a recipe (YAML), or a student's folder.",
            show_default=False,
            metavar="PLAN_OR_RECIPE",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Folder of the teacher, or its name on the hub, also owner/model@revision; by "
            "default the recipe's where it is a folder here, else Qwen-Image or FLUX.1-dev, for "
            "plans of their 60 and 57 blocks.",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        bool,
        typer.Option(
            "--train",
            help="Also what training it takes: memory of each GPU, and time. A recipe's "
            "`library`, `workers`, `recover` and `data.resolution` say how it is trained.",
        ),
    ] = False,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: " + ", ".join(GPUS) + ".")] = "H100-80GB",
    gpus: Annotated[
        int | None,
        typer.Option(
            help="How many; by default the recipe's `workers` for the library, and the most of "
            "`recover.workers` for the rest.",
            min=1,
            show_default=False,
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="GiB of each, in place of the kind's.", min=0.1, show_default=False),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of a caption.", min=1)] = 256,
    mfu: Annotated[
        float, typer.Option(help="Share of the GPU's peak that training reaches.", min=0.01, max=1)
    ] = MFU,
    as_json: Json = False,
) -> None:
    """Print a plan's blocks, parameters and memory; nothing is loaded or built.

    Examples:

      espalier plan runs/best/50pct

      espalier plan examples/recipes/ppcl-qwen-image-10b.yaml --train --gpu H100-80GB --gpus 8
    """
    with endings():
        from trainers.students.plan import load_plan

        student = load_plan(path / "plan.json" if path.is_dir() else path)
        config, assumed = sizes_of(student, path, teacher)
        described = {**describe(student, config), "assumed": assumed}
        if train:
            described["training"] = describe_training(
                student, config, path, gpu, gpus, gpu_memory, text_tokens, mfu
            )
        if as_json:
            print_json(described)
            return
        _print_plan(described)
        if train:
            print_training(described["training"])


def config() -> None:
    """Print every key that a sweep's YAML file may have, its default and what it means.

    Example: espalier config | less
    """
    import textwrap

    from cluster.configfile import keys_of
    from search.config import SweepConfig

    for key in keys_of(SweepConfig):
        value = "  (required)" if key.required else f" {json.dumps(key.default)}"
        print(f"{key.path}:" + ("" if key.section else value))
        print(textwrap.indent(textwrap.fill(key.text, 92), "    "))


def sizes_of(
    student: Plan, path: Path, teacher: str | None
) -> tuple[Mapping[str, Any], str | None]:
    """The teacher's transformer config: as given, by the student's own folder, by the recipe's
    teacher, or the published; with what is assumed of it, in a sentence."""
    from trainers.students.families import family_named

    family = family_named(student.family)
    if teacher is not None:
        return _checked_sizes(student, teacher, f"--teacher {teacher}"), None
    if path.is_dir():
        return family.teacher_config(transformer_config(str(path)), student), None
    named = recipe_teacher(path)
    if named is not None and Path(named).expanduser().is_dir():
        return _checked_sizes(student, named, f"{path}: teacher {named}"), None
    if student.teacher_blocks == family.blocks(family.published):
        return family.published, None
    if named is not None:
        # A teacher that another recipe makes: it has fewer blocks, of the published sizes.
        return family.teacher_config(family.published, student), (
            f"its teacher {named} is no folder here: counted with {student.teacher_blocks} blocks "
            f"as large as those of the published {family.name}; --teacher says others"
        )
    raise TeacherSizesError(
        f"{path}: its teacher has {student.teacher_blocks} blocks, of unknown size; say which with "
        "--teacher"
    )


def _checked_sizes(student: Plan, teacher: str, where: str) -> Mapping[str, Any]:
    """The teacher's transformer config, of the family and the number of blocks that the plan is
    for; `where` begins the sentence when it is not."""
    from trainers.students.families import family_named, family_of

    family = family_named(student.family)
    config = transformer_config(teacher)
    found = family_of(config, f"{teacher}: transformer/config.json")
    if found is not family:
        raise TeacherSizesError(
            f"{where}: is of family {found.name}, and the plan is for {family.name}; give the "
            "teacher that the plan was made for"
        )
    blocks = family.blocks(config)
    if blocks != student.teacher_blocks:
        raise TeacherSizesError(
            f"{where}: has {blocks} blocks, and the plan is for a teacher of "
            f"{student.teacher_blocks}; give the teacher that the plan was made for"
        )
    return config


def recipe_teacher(path: Path) -> str | None:
    """The teacher that a recipe names; None of a plan alone."""
    from cluster.configfile import read_yaml

    teacher = read_yaml(path).get("teacher")
    return None if teacher is None else str(teacher)


def transformer_config(name: str) -> dict[str, Any]:
    """transformer/config.json of a folder, of a pipeline in a store, or of a hub repository as
    `open_teacher` takes its name; no weights are fetched."""
    if "://" in name:
        return _config_of(f"{name}/transformer/config.json", _stored_config(name))
    file = Path(name).expanduser() / "transformer" / "config.json"
    if not Path(name).expanduser().is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        from trainers.teacher import HUB_NAME

        known = HUB_NAME.fullmatch(name)
        if known is None or Path(name).expanduser().parent.exists():
            raise TeacherSizesError(
                f"teacher {name}: no such folder; give a diffusers pipeline folder or a name on "
                "the Hugging Face hub such as Qwen/Qwen-Image"
            )
        model, revision = known.groups()
        try:
            file = Path(hf_hub_download(model, "transformer/config.json", revision=revision))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise TeacherSizesError(
                f"teacher {name}: neither a folder nor to be had from the Hugging Face hub; check "
                "the name, the network and your access"
            ) from error
    try:
        return _config_of(str(file), file.read_bytes())
    except OSError as error:
        raise TeacherSizesError(f"{file}: cannot be read ({error})") from error


def _stored_config(url: str) -> bytes:
    from storage.errors import MissingKey
    from storage.store import open_store

    root, _, prefix = url.rstrip("/").rpartition("/")
    try:
        with open_store(root).read(f"{prefix}/transformer/config.json") as stream:
            return stream.read()
    except MissingKey as error:
        raise TeacherSizesError(
            f"teacher {url}: no transformer/config.json there; give the URL of a pipeline"
        ) from error


def _config_of(where: str, content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise TeacherSizesError(f"{where}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise TeacherSizesError(f"{where}: must hold a JSON object")
    return config


def describe(student: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """A plan in numbers; memory in bytes, for bfloat16 weights."""
    from trainers.students.counts import memory, plan_parameters
    from trainers.students.families import family_named
    from trainers.students.plan import identity_plan

    family = family_named(student.family)
    teacher = plan_parameters(identity_plan(student.family, student.teacher_blocks), config)
    parameters = plan_parameters(student, config)
    held, held_by_teacher = memory(parameters), memory(teacher)
    return {
        "digest": student.digest,
        "family": student.family,
        "blocks": [
            {
                "block": i,
                "span": list(block.span),
                "start": "teacher" if block.untouched else block.start,
                "ffn": block.ffn,
                "text": f"{block.text}, mapped" if block.text_map else block.text,
                "parameters": family.block_parameters(config, block),
            }
            for i, block in enumerate(student.blocks)
        ],
        "outside_parameters": family.outside_parameters(config),
        "parameters": parameters,
        "memory": {"weights": held.weights, "training": held.training},
        "teacher": {
            "blocks": student.teacher_blocks,
            "parameters": teacher,
            "memory": {"weights": held_by_teacher.weights, "training": held_by_teacher.training},
        },
    }


def _print_plan(described: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from search.report.words import memory

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (
        ("block", "right"), ("teacher blocks", "left"), ("start", "left"), ("ffn", "right"),
        ("text", "left"), ("parameters", "right"),
    ):  # fmt: skip
        table.add_column(name, justify="right" if justify == "right" else "left")
    for row in described["blocks"]:
        first, last = row["span"]
        table.add_row(
            str(row["block"]),
            str(first) if first == last else f"{first}–{last}",
            row["start"],
            row["ffn"] if row["ffn"] == "linear" else f"{row['ffn']:g}",
            row["text"],
            f"{row['parameters']:,}",
        )
    table.add_row("", "outside", "teacher", "", "", f"{described['outside_parameters']:,}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    teacher, student = described["teacher"], described["parameters"]
    console.print(
        f"\n{described['family']} {described['digest']}: "
        f"{len(described['blocks'])} blocks from {teacher['blocks']}, {student:,} parameters "
        f"from {teacher['parameters']:,} ({student / teacher['parameters']:.1%})"
    )
    if described["assumed"] is not None:
        console.print(described["assumed"])
    console.print(
        f"memory in bfloat16: {memory(described['memory']['weights'])} to hold it "
        f"(teacher {memory(teacher['memory']['weights'])}), "
        f"{memory(described['memory']['training'])} to train all of it with AdamW; activations "
        "come on top"
    )


def _print_status(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from cluster.live import describe, duration

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"sweep {found['sweep']} of {found['teacher']} in {found['storage']}")
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in found["stages"]:
        took = duration(row["seconds"]) if row["seconds"] else ""
        share = f"{row['done']}/{row['total']}  {describe(row['facts'])}" if row["total"] else ""
        table.add_row(row["stage"], row["state"], took, row["summary"] or share)
    console.print(table)
    for best in found["best_trials"]:
        console.print(
            f"best trial at {best['budget']}: fidelity loss {best['fidelity_loss']:.4g}, "
            f"{best['parameters']:,} parameters, of {best['trials']} trials"
        )
    for entry in found["registry"]:
        score = "" if entry["judge_score"] is None else f", judge {entry['judge_score']:.3f}"
        console.print(
            f"published at {entry['budget']}: fidelity loss {entry['fidelity_loss']:.4g}{score}, "
            f"{entry['parameters']:,} parameters, by sweep {entry['sweep']}"
        )
