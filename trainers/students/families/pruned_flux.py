"""The width-cut FLUX.1 transformer: narrower or linear FFNs, projected or shared text.

Blocks that only have a narrower FFN stay the stock classes; the others are `PrunedFluxBlock`.
Modules keep the stock names wherever they do the stock work, so weights move by name.
Shapes: B batch, N image tokens, M text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from trainers.students.families.flux import FluxFamily, begin_stock
from trainers.students.families.parts import BlockShape, ffn_or_map, narrow_ffn

Rope = tuple[Tensor, Tensor]


def make_dual_block(dim: int, heads: int, head_dim: int, shape: BlockShape) -> nn.Module:
    """A dual block, or what is left of one, with uninitialised weights."""
    if not shape.stock:
        return PrunedFluxBlock(dim, heads, head_dim, shape)
    block = FluxTransformerBlock(dim=dim, num_attention_heads=heads, attention_head_dim=head_dim)
    assert shape.ffn is not None
    for name in ("ff", "ff_context"):
        if getattr(block, name).net[2].in_features != shape.ffn:
            setattr(block, name, narrow_ffn(dim, shape.ffn))
    return block


def make_single_block(dim: int, heads: int, head_dim: int, shape: BlockShape) -> nn.Module:
    """A single block with uninitialised weights."""
    assert shape.ffn is not None
    return FluxSingleTransformerBlock(
        dim=dim,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        # The stock class multiplies and rounds down: half a channel keeps it from losing one.
        mlp_ratio=(shape.ffn + 0.5) / dim,
    )


class PrunedFluxBlock(nn.Module):
    """A dual block whose FFNs are linear, or whose text has no branch of its own.

    `txt_proj` (projected text) maps what attention reads of the text, `txt_map` the held text
    state at the end of a run; both are residual. A linear FFN, also residual, reads the state
    after attention as it is, without norm, modulation or gate.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        modulated = AdaLayerNormZeroSingle if shape.ffn is None else AdaLayerNormZero
        self.norm1 = modulated(dim)
        self.attn = FluxAttention(
            query_dim=dim,
            added_kv_proj_dim=None if shape.text == "shared" else dim,
            dim_head=head_dim,
            heads=heads,
            out_dim=dim,
            context_pre_only=None if shape.text == "shared" else False,
            bias=True,
            eps=1e-6,
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = ffn_or_map(dim, shape.ffn)
        if shape.text == "dual":
            self.norm1_context = modulated(dim)
            self.ff_context = ffn_or_map(dim, shape.ffn)
        if shape.text == "projected":
            self.txt_proj = nn.Linear(dim, dim)
            if shape.text_map:
                self.txt_map = nn.Linear(dim, dim)

    def forward(
        self,
        text_BMD: Tensor,
        image_BND: Tensor,
        modulated_BMD: Tensor | None,
        time_BD: Tensor,
        rope: Rope,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text and image after the block, and what projected blocks after it read of the text."""
        image_in_BND, *image_mods = self.norm1(image_BND, emb=time_BD)
        if self.shape.text == "projected":
            assert modulated_BMD is not None, "no block before this one has a text branch"
            text_in_BMD = modulated_BMD + self.txt_proj(modulated_BMD)
            image_out_BND, _ = self._attend(image_in_BND, text_in_BMD, rope)
            if self.shape.text_map:
                text_BMD = text_BMD + self.txt_map(text_BMD)
        else:
            shared = self.shape.text == "shared"
            norm, ffn = (self.norm1, self.ff) if shared else (self.norm1_context, self.ff_context)
            modulated_BMD, *text_mods = norm(text_BMD, emb=time_BD)
            image_out_BND, text_out_BMD = self._attend(image_in_BND, modulated_BMD, rope)
            text_BMD = self._after_attention(text_BMD, text_out_BMD, ffn, *text_mods)
        image_BND = self._after_attention(image_BND, image_out_BND, self.ff, *image_mods)
        return text_BMD, image_BND, modulated_BMD

    def _attend(self, image_BND: Tensor, text_BMD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Joint attention over [text, image]; image and text of it."""
        if self.shape.text != "shared":
            image_out_BND, text_out_BMD = self.attn(
                hidden_states=image_BND, encoder_hidden_states=text_BMD, image_rotary_emb=rope
            )
            return image_out_BND, text_out_BMD
        joint = torch.cat([text_BMD, image_BND], dim=1)
        # Without a second stream the stock attention leaves its output layer to the caller.
        out = self.attn.to_out[0](self.attn(hidden_states=joint, image_rotary_emb=rope))
        text_out_BMD, image_out_BND = out.split([text_BMD.shape[1], image_BND.shape[1]], dim=1)
        return image_out_BND, text_out_BMD

    def _after_attention(
        self, state_BND: Tensor, out_BND: Tensor, ffn: nn.Module, gate_BD: Tensor, *ffn_mods: Tensor
    ) -> Tensor:
        """Adds what attention gave, then what the FFN makes of it."""
        state_BND = state_BND + gate_BD.unsqueeze(1) * out_BND
        if self.shape.ffn is None:
            added_BND: Tensor = ffn(state_BND)
            return state_BND + added_BND
        shift_B1D, scale_B1D, ffn_gate_B1D = (mod_BD.unsqueeze(1) for mod_BD in ffn_mods)
        written_BND: Tensor = ffn(self.norm2(state_BND) * (1 + scale_B1D) + shift_B1D)
        return state_BND + ffn_gate_B1D * written_BND


class PrunedFluxTransformer2DModel(FluxTransformer2DModel):
    """FluxTransformer2DModel whose block i, the single ones counted on, is `block_shapes[i]`.

    Loads from a pipeline directory after `import trainers`; saves and runs as the stock class does.
    """

    # What diffusers writes into model_index.json and, on loading, finds the class by.
    __module__ = "trainers"

    # The signature is spelled out because diffusers reads it to know what a config may hold.
    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        block_shapes: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        if block_shapes is None:
            return
        if len(block_shapes) != num_layers + num_single_layers:
            raise ValueError(
                f"block_shapes has {len(block_shapes)} entries; give one for each of the "
                f"{num_layers} dual and {num_single_layers} single blocks"
            )
        sizes = (num_attention_heads * attention_head_dim, num_attention_heads, attention_head_dim)
        shapes = [BlockShape(**shape) for shape in block_shapes]
        for i, shape in enumerate(shapes[:num_layers]):
            self.transformer_blocks[i] = make_dual_block(*sizes, shape)
        for i, shape in enumerate(shapes[num_layers:]):
            self.single_transformer_blocks[i] = make_single_block(*sizes, shape)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The stock forward pass, without adapters and ControlNets."""
        family = FluxFamily()
        state, context = begin_stock(
            self,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
        )
        for block in family.block_modules(self):
            state = family.run_block(block, state, context)
        velocity_BNC = family.end(self, state, context)
        return Transformer2DModelOutput(sample=velocity_BNC) if return_dict else (velocity_BNC,)
