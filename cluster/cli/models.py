"""`espalier generate`, `judge`, `plug` and `seal`: a teacher or student at work, made larger again,
or made one that sweeps open in a bucket."""

from __future__ import annotations

import json as json_text
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.common import Json, endings, print_json, quieten_libraries
from storage.errors import EspalierError

PANEL = "Use a model"
MOST_SEED = 2**32 - 1
QWEN_IMAGE_SIZE = 1024
"""Pixels a side that Qwen-Image draws when a model does not say what it was made for."""

Model = Annotated[
    str,
    typer.Argument(
        help="A model folder, teacher or student, or the URL of a published one.",
        show_default=False,
        metavar="MODEL",
    ),
]
Seed = Annotated[
    int, typer.Option(help="Fixes the noise that pictures start from.", min=0, max=MOST_SEED)
]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=2)]
Size = Annotated[
    int | None,
    typer.Option(
        help="Pixels a side, a multiple of 16; by default what the model was made for.",
        min=16,
        show_default=False,
    ),
]


class ModelError(EspalierError):
    """A model that is not there, or cannot do what is asked."""


def register(app: typer.Typer) -> None:
    app.command("generate", rich_help_panel=PANEL)(generate)
    app.command("judge", rich_help_panel=PANEL)(judge)
    app.command("plug", rich_help_panel=PANEL)(plug)
    app.command("seal", rich_help_panel=PANEL)(seal)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What the picture shows.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("picture.png"),
    seed: Seed = 0,
    steps: Steps = 20,
    size: Size = None,
) -> None:
    """Draw a picture.

    Examples:

      espalier generate examples/miniature --prompt "a red circle above a blue square" --size 64

      espalier generate runs/best/50pct --prompt "three crosses" --out crosses.png
    """
    with endings():
        if out.suffix.lower() != ".png":
            raise ModelError(f"--out {out}: must end in .png")
        check_size(size)
        folder = local_model(model)
        pipeline = load(folder)
        from trainers.evaluate import generate as draw

        pixels = size or made_for(folder)
        (picture,) = draw(pipeline, [prompt], seed, steps, pixels)
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
        print(f"{out}  {pixels} × {pixels} pixels, {steps} steps, seed {seed}")


def judge(
    model: Model,
    task: Annotated[str, typer.Option(help="The task that judges.")] = "shapes",
    per_family: Annotated[int, typer.Option(help="Captions of each family.", min=1)] = 20,
    seed: Seed = 0,
    steps: Steps = 20,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Score a model's pictures on captions that training never showed, by family.

    Example: espalier judge runs/best/50pct --per-family 50
    """
    with endings():
        check_size(size)
        folder = local_model(model)
        from search.judging import JudgeConfig, captions_for, judge_model
        from trainers.tasks import TASKS

        if task not in TASKS:
            raise ModelError(f"--task {task}: no such task; known are {', '.join(TASKS)}")
        config = JudgeConfig(task=task, per_family=per_family, steps=steps, seed=seed)
        captions = captions_for(config, [])
        judged = judge_model(load(folder), config, captions, size or made_for(folder))
        if as_json:
            print_json({"model": model, "captions": len(captions), "scores": dict(judged.scores)})
            return
        for name, score in judged.scores.items():
            print(f"{name:<14} {score:.3f}")


def plug(
    student: Model,
    restore: Annotated[
        list[str],
        typer.Option(
            help="A span of teacher blocks to put back, as 3-4 or 58; as often as wanted.",
            metavar="SPAN",
            show_default=False,
        ),
    ],
    teacher: Annotated[
        str, typer.Option(help="The teacher that it was made from.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the larger student.", show_default=False)],
) -> None:
    """Put teacher blocks back into a student in place of what replaces them; nothing is trained.

    Example: espalier plug runs/best/34pct --restore 0-3 --teacher examples/miniature --out larger
    """
    with endings():
        spans = [parse_span(text) for text in restore]
        folder = local_model(student)
        quieten_libraries()
        from trainers.export import export_student, load_pipeline
        from trainers.students.counts import plan_parameters
        from trainers.students.plan import load_plan
        from trainers.students.plug import plug as put_back
        from trainers.students.plug import plugged_plan
        from trainers.teacher import open_teacher

        plan = load_plan(folder / "plan.json")
        larger = plugged_plan(plan, spans)
        source = open_teacher(teacher)
        made_from = said_of(folder).get("teacher")
        if made_from is not None and made_from != source.digest:
            raise ModelError(
                f"--teacher {teacher}: is {source.digest}, and {student} was made from "
                f"{made_from}; give that teacher"
            )
        model = put_back(load_pipeline(folder).transformer, plan, source.transformer(), larger)
        export_student(source, model, larger, out)
        said = {"resolution": made_for(folder), "teacher": source.digest}
        (out / "espalier.json").write_text(json_text.dumps(said, indent=1) + "\n", "utf-8")
        before, after = (plan_parameters(p, source.config) for p in (plan, larger))
        print(f"{out}  {len(larger.blocks)} blocks, {after:,} parameters (was {before:,})")


def check_size(size: int | None) -> None:
    """ModelError for pixels a side that a pipeline would round to whole tokens."""
    from trainers.data.sources import TOKEN

    if size is not None and size % TOKEN:
        below = size - size % TOKEN
        raise ModelError(
            f"--size {size}: must be a multiple of {TOKEN}, the pixels of a token; give {below} "
            f"or {below + TOKEN}"
        )


def parse_span(text: str) -> tuple[int, int]:
    """The span that `3-4` or `58` names."""
    if not re.fullmatch(r"[0-9]+(-[0-9]+)?", text):
        raise ModelError(f"--restore {text}: not a span; write it as 3-4, or 58 for one block")
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def local_model(model: str) -> Path:
    """The folder of a model; one in a remote store is copied to this machine first."""
    if "://" in model and not model.startswith("file://"):
        from storage.manifest import published
        from storage.store import open_store
        from trainers.cache import local_copy

        root, _, prefix = model.rstrip("/").rpartition("/")
        store = open_store(root)
        if published(store, prefix) is None:
            raise ModelError(f"{model}: no model is published there")
        return local_copy(store, prefix)
    folder = Path(model.removeprefix("file://")).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{model}: no such folder; give a model folder such as runs/best/50pct")
    return folder


def load(folder: Path) -> Any:
    """The model's pipeline, on a GPU when this machine has one."""
    quieten_libraries()
    import torch

    from trainers.export import load_pipeline

    return load_pipeline(folder, device="cuda" if torch.cuda.is_available() else "cpu")


def made_for(folder: Path) -> int:
    """Pixels a side that a model was made for, by the espalier.json beside it."""
    resolution = said_of(folder).get("resolution", QWEN_IMAGE_SIZE)
    if not isinstance(resolution, int):
        raise ModelError(f"{folder / 'espalier.json'}: does not say a resolution")
    return resolution


def said_of(folder: Path) -> dict[str, Any]:
    """What the espalier.json beside a model says of it; nothing without one."""
    file = folder / "espalier.json"
    try:
        said = json_text.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(said, dict):
        raise ModelError(f"{file}: does not say a resolution")
    return said


def seal(
    url: Annotated[str, typer.Argument(help="Where the pipeline was copied to.", metavar="URL")],
) -> None:
    """Make a pipeline that was copied into a bucket a teacher, which workers then read from there.

    After `aws s3 cp --recursive Qwen-Image s3://bucket/Qwen-Image`, say. Reads every file once and
    writes manifest.json, with their sizes and digests, beside them.

    Example: espalier seal s3://bucket/Qwen-Image
    """
    with endings():
        if "://" not in url:
            raise ModelError(f"{url}: give a URL; a folder here is a teacher as it is")
        from trainers.teacher import seal_pipeline

        manifest = seal_pipeline(url)
        size = sum(entry.size for entry in manifest.files.values())
        print(
            f"{url}  {len(manifest.files)} files, {size:,} bytes; a teacher by this URL from now on"
        )
