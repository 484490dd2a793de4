"""The lines that load a student, for the report and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainers.students.plan import Plan


def loading(plan: Plan, url: str, sampling: Mapping[str, int | float], caption: str) -> str:
    """A Python snippet that draws `caption` with the student at `url`.

    A student in a remote store is copied first: diffusers reads folders.
    """
    folder, copy = url.removeprefix("file://"), ""
    if folder.startswith("s3://"):
        folder, copy = "student", f"# first: aws s3 sync {url} student\n"
    arguments = ", ".join(f"{name}={value}" for name, value in sampling.items())
    # JSON's quotes are Python's too, and double like those of the other lines.
    prompt, where = (json.dumps(text, ensure_ascii=False) for text in (caption, folder))
    # diffusers imports no library that a model names; the narrowed class must be there already.
    needs = (
        ""
        if plan.depth_only
        else "import trainers  # pip install -e . in a clone of Espalier; has the narrower FFNs\n"
    )
    return (
        f"{copy}{needs}from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({where})\n"
        f"picture = pipeline(\n    {prompt},\n"
        + (f"    {arguments},\n" if arguments else "")
        + ').images[0]\npicture.save("picture.png")\n'
    )
