"""What tests of recovery recover: a teacher of four blocks, a plan, and drawn pictures."""

from __future__ import annotations

import torch
from torch import nn

from trainers.data.latents import Latents, Shard
from trainers.students.families import family_named
from trainers.students.plan import BlockPlan, Plan

FAMILY = family_named("qwen_image")
PLAN = Plan(
    family="qwen_image",
    teacher_blocks=4,
    blocks=(BlockPlan(span=(0, 0)), BlockPlan(span=(1, 2)), BlockPlan(span=(3, 3), ffn=0.5)),
)


def make_teacher() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 2, 2),
    )


def make_latents() -> Latents:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 5, (12,), generator=generator)
    shard = Shard(
        latents=torch.randn(12, 16, 4, 4, generator=generator),
        embeds=torch.randn(12, 4, 12, generator=generator),
        mask=torch.arange(4) < lengths[:, None],
        captions=tuple(map(str, range(12))),
    )
    return Latents([shard], held_out=2)
