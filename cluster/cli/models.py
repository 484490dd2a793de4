"""`espalier generate` and `espalier judge`: a teacher or student at work."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.common import Json, endings, print_json, quieten_libraries
from storage.errors import EspalierError

PANEL = "Use a model"
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
Seed = Annotated[int, typer.Option(help="Fixes the noise that pictures start from.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Size = Annotated[
    int | None,
    typer.Option(
        help="Pixels a side; by default what the model was made for.", min=16, show_default=False
    ),
]


class ModelError(EspalierError):
    """A model that is not there, or cannot do what is asked."""


def register(app: typer.Typer) -> None:
    app.command("generate", rich_help_panel=PANEL)(generate)
    app.command("judge", rich_help_panel=PANEL)(judge)


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
    try:
        said = json_text.loads((folder / "espalier.json").read_text(encoding="utf-8"))
        return int(said["resolution"])
    except FileNotFoundError:
        return QWEN_IMAGE_SIZE
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'espalier.json'}: does not say a resolution") from error
