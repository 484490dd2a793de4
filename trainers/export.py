"""Writes a student as a diffusers pipeline folder, with its plan, and loads such folders."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from storage.errors import EspalierError
from trainers.students.plan import Plan
from trainers.teacher import Teacher, check_pipeline, load_folder

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

SHARD_SIZE = "5GB"


class ExportError(EspalierError):
    """A student that cannot be written where it was asked for."""


def export_student(
    teacher: Teacher,
    model: nn.Module,
    plan: Plan,
    folder: Path,
    card: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the folder whole or not at all; it must be absent or empty.

    The transformer is the student's, in `dtype` or as it is; every other part is copied from the
    teacher. plan.json lies beside model_index.json, and README.md when there is a card. `model` is
    not changed and must not be sharded.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: already holds something; remove it or give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        whole = Path(scratch) / "pipeline"
        _write(teacher, model, plan, whole, dtype)
        if card is not None:
            (whole / "README.md").write_text(card, encoding="utf-8")
        whole.replace(folder)


def load_pipeline(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> DiffusionPipeline:
    """A student's or teacher's pipeline, frozen. TeacherError names a missing or damaged file."""
    check_pipeline(folder)
    return load_folder(folder, dtype, device)


def _write(
    teacher: Teacher, model: nn.Module, plan: Plan, folder: Path, dtype: torch.dtype | None
) -> None:
    folder.mkdir()
    index_file = teacher.folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for part, value in index.items():
        if isinstance(value, list) and value[0] is not None and part != "transformer":
            shutil.copytree(teacher.folder / part, folder / part)
    index["transformer"] = list(teacher.family.student_class(plan))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")

    # Built anew from the plan, so that class and config are right whatever `model` came from; the
    # tensors are shared with it unless their dtype changes.
    student = teacher.family.build(teacher.config, plan, "meta")
    tensors = {
        name: tensor.detach().to(dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    student.load_state_dict(tensors, assign=True)
    cast("Any", student).save_pretrained(folder / "transformer", max_shard_size=SHARD_SIZE)
