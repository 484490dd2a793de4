"""What tests of every room share: a pipeline that is real in every part and tiny in each."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainers.small import local_ray
from trainers.teacher import Teacher, open_teacher

# A shell script that runs the tests in the background lets them ignore it, and with them all the
# processes that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.hub", "tests.postgres", "tests.s3"]


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_tiny_pipeline`. Read it, never change it."""
    return make_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


def make_tiny_pipeline(folder: Path) -> Path:
    """A QwenImagePipeline folder in this one: 6 blocks of width 16, random weights.

    64-pixel pictures are latents [16, 8, 8], 16 packed tokens of 64 channels; text is 64 wide.
    """
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLForConditionalGeneration

    from examples.make_miniature import make_tokenizer, text_encoder_config

    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "made" / "tokenizer")
    transformer = QwenImageTransformer2DModel(
        num_layers=6,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 2, 2),
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9,
            shift_terminal=0.02, use_dynamic_shifting=True,
        ),
        vae=AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text_encoder_config(len(tokenizer))),
        tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="session")
def teacher(tiny_pipeline: Path) -> Teacher:
    """The tiny pipeline, opened."""
    return open_teacher(tiny_pipeline)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A local Ray of a module's own."""
    with local_ray():
        yield
