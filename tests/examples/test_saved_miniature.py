"""What a saved pipeline tells of the machine that it was made on: nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import QwenImagePipeline

from examples.make_miniature import forget_origin


def test_a_saved_pipeline_does_not_tell_where_it_was_made(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    opened = shutil.copytree(tiny_pipeline, tmp_path / "opened-here")
    saved = tmp_path / "saved"
    QwenImagePipeline.from_pretrained(opened).save_pretrained(saved)
    files = sorted(saved.rglob("*.json"))
    assert any("opened-here" in file.read_text() for file in files)

    forget_origin(saved)
    assert not [file for file in files if "opened-here" in file.read_text()]
    assert not [file for file in files if "is_local" in json.loads(file.read_text())]
    again = QwenImagePipeline.from_pretrained(saved)
    assert again.transformer.config.num_layers == 6
