"""The model families that can be pruned, a file each."""

from __future__ import annotations

from trainers.students.families.base import Config, Family, FamilyError
from trainers.students.families.flux import FluxFamily
from trainers.students.families.qwen_image import QwenImageFamily

FAMILIES: dict[str, Family] = {"qwen_image": QwenImageFamily(), "flux": FluxFamily()}

_CLASSES = {"QwenImageTransformer2DModel": "qwen_image", "FluxTransformer2DModel": "flux"}


def family_named(name: str) -> Family:
    """The family that a plan names."""
    if name not in FAMILIES:
        raise FamilyError(f"family {name!r} is unknown; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(transformer_config: Config, where: str = "transformer/config.json") -> Family:
    """The family of a transformer by its config; `where` names the file in errors."""
    name = transformer_config.get("_class_name")
    if name not in _CLASSES:
        raise FamilyError(
            f"{where}: no family takes transformers of class {name}; known are "
            f"{', '.join(_CLASSES)}"
        )
    family = FAMILIES[_CLASSES[name]]
    family.check(transformer_config, where)
    return family
