"""What a student is and how it is trained.

`import trainers` before loading a width-cut student with diffusers: its model_index.json names this
package, and diffusers looks here, among what is already imported, for the student's class.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.students.families.pruned_flux import PrunedFluxTransformer2DModel
    from trainers.students.families.pruned_qwen_image import PrunedQwenImageTransformer2DModel

__all__ = ["PrunedFluxTransformer2DModel", "PrunedQwenImageTransformer2DModel"]

_HOMES = {
    "PrunedFluxTransformer2DModel": "trainers.students.families.pruned_flux",
    "PrunedQwenImageTransformer2DModel": "trainers.students.families.pruned_qwen_image",
    # diffusers learns how to load a class from the base that the class's own library names.
    "ModelMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    # Late, because all of them need diffusers, whose import takes seconds.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
