"""What a student is and how it is trained.

`import trainers` before loading a width-cut student with diffusers: its model_index.json names this
package, and diffusers looks here, among what is already imported, for the student's class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.students.families.pruned_qwen_image import PrunedQwenImageTransformer2DModel

__all__ = ["PrunedQwenImageTransformer2DModel"]


def __getattr__(name: str) -> Any:
    # Late, because both need diffusers, whose import takes seconds.
    if name == "PrunedQwenImageTransformer2DModel":
        from trainers.students.families.pruned_qwen_image import PrunedQwenImageTransformer2DModel

        return PrunedQwenImageTransformer2DModel
    if name == "ModelMixin":
        # diffusers learns how to load a class from the base that the class's own library names.
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
