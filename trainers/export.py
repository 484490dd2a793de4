"""Writes a student as a diffusers pipeline folder, with its plan, and loads such folders.

Weights pass one tensor at a time, from a model or from where a recovery stored them, so that memory
does not grow with the student.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from storage.errors import EspalierError
from storage.manifest import Body
from storage.shards import TensorFile
from trainers.students.plan import Plan
from trainers.teacher import Teacher, check_pipeline, load_folder

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

SHARD_BYTES = 5 * 10**9
"""Most bytes of one file of weights, but for a tensor that is larger alone."""
_WEIGHTS = "diffusion_pytorch_model"


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
    weights = model.state_dict()
    files = pipeline_files(teacher, plan, weights, weights.__getitem__, dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: already holds something; remove it or give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        whole = Path(scratch) / "pipeline"
        for name, body in files.items():
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            _write(whole / name, body)
        if card is not None:
            (whole / "README.md").write_text(card, encoding="utf-8")
        whole.replace(folder)


def load_pipeline(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> DiffusionPipeline:
    """A student's or teacher's pipeline, frozen. TeacherError names a missing or damaged file."""
    check_pipeline(folder)
    return load_folder(folder, dtype, device)


def pipeline_files(
    teacher: Teacher,
    plan: Plan,
    like: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Body]:
    """Every file of a student's pipeline folder, by name.

    `like` says of the student's weights what they are like, on any device; `read` brings one when
    its turn comes. ExportError when they are not the plan's.
    """
    index = json.loads((teacher.folder / "model_index.json").read_text(encoding="utf-8"))
    files: dict[str, Body] = {}
    for part, value in index.items():
        if isinstance(value, list) and value[0] is not None and part != "transformer":
            for file in sorted((teacher.folder / part).rglob("*")):
                if file.is_file():
                    files[file.relative_to(teacher.folder).as_posix()] = file
    index["transformer"] = list(teacher.family.student_class(plan))
    files["model_index.json"] = f"{json.dumps(index, indent=2)}\n".encode()
    files["plan.json"] = plan.to_json().encode()

    # Built anew from the plan, so that class and config are right whatever the weights came from.
    student = teacher.family.build(teacher.config, plan, "meta")
    wanted = {name: tensor.shape for name, tensor in student.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in like.items()}:
        differ = sorted(wanted.keys() ^ like.keys()) or [
            name for name, shape in wanted.items() if shape != like[name].shape
        ]
        raise ExportError(f"plan {plan.digest}: these are not its weights, see {differ[0]}")
    files["transformer/config.json"] = cast("Any", student).to_json_string().encode()
    shards = _shards(like, dtype)
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file_name = f"{_WEIGHTS}{of}.safetensors"
        part_of_like = {name: like[name] for name in shard}
        files[f"transformer/{file_name}"] = partial(_open_weights, part_of_like, dtype, read)
        names |= dict.fromkeys(shard, file_name)
    if len(shards) > 1:
        total = sum(_bytes(like[name], dtype) for name in names)
        listed = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        content = f"{json.dumps(listed, indent=2)}\n".encode()
        files[f"transformer/{_WEIGHTS}.safetensors.index.json"] = content
    return files


def _open_weights(
    like: Mapping[str, Tensor], dtype: torch.dtype | None, read: Callable[[str], Tensor]
) -> BinaryIO:
    return cast("BinaryIO", TensorFile(like, dtype, read=read, metadata={"format": "pt"}))


def _shards(like: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[list[str]]:
    """Names file by file, in the model's order."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in like.items():
        size = _bytes(tensor, dtype)
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    cast_to = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    return tensor.numel() * cast_to.itemsize


def _write(file: Path, body: Body) -> None:
    if isinstance(body, Path):
        shutil.copyfile(body, file)
        return
    content = body if isinstance(body, bytes) else body()
    if isinstance(content, bytes):
        file.write_bytes(content)
        return
    with file.open("wb") as target, content:
        shutil.copyfileobj(content, target, 16 * 2**20)
