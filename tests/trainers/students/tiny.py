"""A tiny teacher of each family: six blocks of width 16, which every test of families shares.

A FLUX.1 teacher's first three blocks are dual, the others single, so spans end at the third block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from trainers.students.families import FAMILIES
from trainers.students.families.base import Config, Family, Inputs
from trainers.students.plan import BlockPlan, Plan, Start, identity_plan

BLOCKS = 6
SPANS = ((0, 2), (3, 5))


@dataclass(frozen=True)
class Tiny:
    """A family, and the transformer config of its tiny teacher."""

    family: Family
    config: Config = field(repr=False)
    masked: bool
    """Whether the family takes a mask of padded text."""

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def identity(self) -> Plan:
        return identity_plan(self.name, BLOCKS)

    @property
    def cut(self) -> Plan:
        """One block of half FFN width, and one without a cut."""
        return self.plan(BlockPlan(span=(0, 2), ffn=0.5), BlockPlan(span=(3, 5)))

    def plan(self, *blocks: BlockPlan) -> Plan:
        return Plan(family=self.name, teacher_blocks=BLOCKS, blocks=blocks)

    def merged(self, *spans: tuple[int, int], start: Start = "first") -> Plan:
        return self.plan(*(BlockPlan(span=span, start=start) for span in spans))

    def model(self, plan: Plan | None = None) -> nn.Module:
        """A teacher, or a student, with random weights."""
        torch.manual_seed(0)
        model = self.family.build(self.config, plan or self.identity)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model.requires_grad_(False)

    def inputs(self, padded: bool = True) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        return Inputs(
            noisy_BNC=torch.randn(2, 6, 64, generator=generator),
            timestep_B=torch.tensor([0.2, 0.9]),
            embeds_BMD=torch.randn(2, 5, 12, generator=generator),
            mask_BM=mask if padded and self.masked else None,
            grid=(2, 3),
            pooled_BP=torch.randn(2, 10, generator=generator),
        )


QWEN_IMAGE = Tiny(
    FAMILIES["qwen_image"],
    {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": 8,
        "axes_dims_rope": [4, 2, 2],
        "joint_attention_dim": 12,
        "num_attention_heads": 2,
        "num_layers": 6,
    },
    masked=True,
)

FLUX = Tiny(
    FAMILIES["flux"],
    {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 8,
        "axes_dims_rope": [4, 2, 2],
        "guidance_embeds": True,
        "joint_attention_dim": 12,
        "num_attention_heads": 2,
        "num_layers": 3,
        "num_single_layers": 3,
        "pooled_projection_dim": 10,
    },
    masked=False,
)

FAMILY_TEACHERS = (QWEN_IMAGE, FLUX)


@st.composite
def plans(draw: st.DrawFn, tiny: Tiny = QWEN_IMAGE) -> Plan:
    """Any valid plan."""

    def fits(block: BlockPlan) -> bool:
        return tiny.family.refusal(tiny.config, block) is None

    cuts = draw(st.sets(st.integers(1, BLOCKS - 1)))
    if not fits(BlockPlan(span=(0, BLOCKS - 1))):
        cuts.add(SPANS[1][0])
    blocks = []
    for u, v in itertools.pairwise([0, *sorted(cuts), BLOCKS]):
        texts = ["dual", "projected", "shared"] if u else ["dual", "shared"]
        widths = [1.0, 0.75, 0.5, 0.3, 0.01, "linear"]
        starts = ["first", "middle", "average", "library"]
        block = BlockPlan(
            span=(u, v - 1),
            start=draw(st.sampled_from(starts)),
            ffn=draw(st.sampled_from(widths)),
            text=draw(st.sampled_from(texts)),
        )
        blocks.append(block if fits(block) else BlockPlan(span=block.span, ffn=0.3))
    return tiny.plan(*blocks)


def run_blocks(family: Family, model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The velocity, block by block."""
    state, context = family.begin(model, inputs)
    for block in family.block_modules(model):
        state = family.run_block(block, state, context)
    return family.end(model, state, context)


def stock_forward(tiny: Tiny, model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The velocity by the stock class's own forward pass, called as its pipeline calls it."""
    import diffusers

    rows, columns = inputs.grid
    called: dict[str, Any]
    if tiny.name == "flux":
        pipeline = diffusers.FluxPipeline
        called = {
            "pooled_projections": inputs.pooled_BP,
            "img_ids": pipeline._prepare_latent_image_ids(2, rows, columns, "cpu", torch.float32),
            "txt_ids": torch.zeros(inputs.embeds_BMD.shape[1], 3),
            "guidance": torch.full([1], 3.5).expand(2),
            "joint_attention_kwargs": None,
        }
    else:
        called = {
            "encoder_hidden_states_mask": inputs.mask_BM,
            "img_shapes": [[(1, rows, columns)]] * 2,
        }
    stock = getattr(diffusers, tiny.config["_class_name"])
    return stock.forward(
        model,
        hidden_states=inputs.noisy_BNC,
        encoder_hidden_states=inputs.embeds_BMD,
        timestep=inputs.timestep_B,
        return_dict=False,
        **called,
    )[0]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
