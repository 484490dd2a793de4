"""The width-cut Qwen-Image transformer: narrower or linear FFNs, projected or shared text.

Blocks that only have a narrower FFN stay the stock class; the others are `PrunedQwenImageBlock`.
Modules keep the stock names wherever they do the stock work, so weights move by name.
Shapes: B batch, N image tokens, M text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import (
    QwenImageTransformerBlock,
    apply_rotary_emb_qwen,
)
from torch import Tensor, nn

from trainers.students.families.base import Inputs
from trainers.students.families.parts import BlockShape, ffn_or_map, narrow_ffn
from trainers.students.families.qwen_image import QwenImageFamily

Rope = tuple[Tensor, Tensor]


def make_block(dim: int, heads: int, head_dim: int, shape: BlockShape) -> nn.Module:
    """A block with uninitialised weights."""
    if not shape.stock:
        return PrunedQwenImageBlock(dim, heads, head_dim, shape)
    block = QwenImageTransformerBlock(
        dim=dim, num_attention_heads=heads, attention_head_dim=head_dim
    )
    assert shape.ffn is not None
    for name in ("img_mlp", "txt_mlp"):
        if getattr(block, name).net[2].in_features != shape.ffn:
            setattr(block, name, narrow_ffn(dim, shape.ffn))
    return block


class PrunedQwenImageBlock(nn.Module):
    """A block whose FFNs are linear, or whose text has no branch of its own.

    `txt_proj` (projected text) maps what attention reads of the text, `txt_map` the held text
    state at the end of a run; both are residual. A linear FFN, also residual, reads the state
    after attention as it is, without norm, modulation or gate.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        per_stream = (3 if shape.ffn is None else 6) * dim
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, per_stream))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(
            query_dim=dim,
            added_kv_proj_dim=None if shape.text == "shared" else dim,
            dim_head=head_dim,
            heads=heads,
            out_dim=dim,
            context_pre_only=None if shape.text == "shared" else False,
            bias=True,
            qk_norm="rms_norm",
            eps=1e-6,
        )
        self.img_mlp = ffn_or_map(dim, shape.ffn)
        if shape.text == "dual":
            self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, per_stream))
            self.txt_mlp = ffn_or_map(dim, shape.ffn)
        if shape.text == "projected":
            self.txt_proj = nn.Linear(dim, dim)
            if shape.text_map:
                self.txt_map = nn.Linear(dim, dim)

    def forward(
        self,
        text_BMD: Tensor,
        image_BND: Tensor,
        modulated_BMD: Tensor | None,
        mask_BM: Tensor | None,
        time_BD: Tensor,
        rope: Rope,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text and image after the block, and what projected blocks after it read of the text."""
        image_mods = self._mods(self.img_mod, time_BD)
        image_in_BND, image_gate_B1D = self._modulated(image_BND, image_mods[0])
        if self.shape.text == "projected":
            assert modulated_BMD is not None, "no block before this one has a text branch"
            text_in_BMD = modulated_BMD + self.txt_proj(modulated_BMD)
            image_out_BND, _ = self._attend(image_in_BND, text_in_BMD, mask_BM, rope)
            if self.shape.text_map:
                text_BMD = text_BMD + self.txt_map(text_BMD)
        else:
            shared = self.shape.text == "shared"
            text_mods = image_mods if shared else self._mods(self.txt_mod, time_BD)
            modulated_BMD, text_gate_B1D = self._modulated(text_BMD, text_mods[0])
            image_out_BND, text_out_BMD = self._attend(image_in_BND, modulated_BMD, mask_BM, rope)
            assert text_out_BMD is not None
            text_BMD = text_BMD + text_gate_B1D * text_out_BMD
            text_mlp = self.img_mlp if shared else self.txt_mlp
            text_BMD = self._fed_forward(text_BMD, text_mlp, text_mods[-1])
        image_BND = image_BND + image_gate_B1D * image_out_BND
        image_BND = self._fed_forward(image_BND, self.img_mlp, image_mods[-1])
        return text_BMD, image_BND, modulated_BMD

    def _mods(self, mod: nn.Module, time_BD: Tensor) -> Sequence[Tensor]:
        """Shift, scale and gate for attention, and again for the FFN unless it is linear."""
        mods: Tensor = mod(time_BD).unsqueeze(1)
        return mods.chunk(1 if self.shape.ffn is None else 2, dim=-1)

    def _modulated(self, state_BND: Tensor, mod_B1D: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = mod_B1D.chunk(3, dim=-1)
        return self.norm(state_BND) * (1 + scale) + shift, gate

    def _fed_forward(self, state_BND: Tensor, mlp: nn.Module, mod_B1D: Tensor) -> Tensor:
        if self.shape.ffn is None:
            return state_BND + cast("Tensor", mlp(state_BND))
        read_BND, gate = self._modulated(state_BND, mod_B1D)
        return state_BND + gate * cast("Tensor", mlp(read_BND))

    def _attend(
        self, image_BND: Tensor, text_BMD: Tensor, mask_BM: Tensor | None, rope: Rope
    ) -> tuple[Tensor, Tensor | None]:
        """Joint attention over [text, image]; the text's output only where something reads it."""
        attn, image_rope, text_rope = cast("Any", self.attn), *rope
        if self.shape.text == "shared":
            text_qkv = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        else:
            text_qkv = (
                attn.add_q_proj, attn.add_k_proj, attn.add_v_proj,
                attn.norm_added_q, attn.norm_added_k,
            )  # fmt: skip
        image_qkv = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        text = _queries_keys_values(text_BMD, attn.heads, text_qkv, text_rope)
        image = _queries_keys_values(image_BND, attn.heads, image_qkv, image_rope)
        mask = None
        if mask_BM is not None:
            seen_BN = mask_BM.new_ones(image_BND.shape[:2])
            mask = torch.cat([mask_BM, seen_BN], dim=1)[:, None, None, :]
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        joint = dispatch_attention_fn(query, key, value, attn_mask=mask).flatten(2).to(query.dtype)
        text_out, image_out = joint.split([text_BMD.shape[1], image_BND.shape[1]], dim=1)
        projected_BND = attn.to_out[0](image_out)
        if self.shape.text == "projected":
            return projected_BND, None
        out = attn.to_out[0] if self.shape.text == "shared" else attn.to_add_out
        return projected_BND, out(text_out)


class PrunedQwenImageTransformer2DModel(QwenImageTransformer2DModel):
    """QwenImageTransformer2DModel whose block i has the shape `block_shapes[i]`.

    Loads from a pipeline directory after `import trainers`; saves and runs as the stock class does.
    """

    # What diffusers writes into model_index.json and, on loading, finds the class by.
    __module__ = "trainers"

    # The signature is spelled out because diffusers reads it to know what a config may hold.
    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
        block_shapes: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
            zero_cond_t=zero_cond_t,
            use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope,
        )
        if block_shapes is None:
            return
        if len(block_shapes) != num_layers:
            raise ValueError(
                f"block_shapes has {len(block_shapes)} entries; give one for each of the "
                f"{num_layers} blocks"
            )
        sizes = (num_attention_heads * attention_head_dim, num_attention_heads, attention_head_dim)
        for i, shape in enumerate(block_shapes):
            self.transformer_blocks[i] = make_block(*sizes, BlockShape(**shape))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        timestep: Tensor,
        img_shapes: list[list[tuple[int, int, int]]],
        guidance: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The stock forward pass, for one picture size a batch and no guidance embedding."""
        family = QwenImageFamily()
        _, rows, columns = img_shapes[0][0]
        state, context = family.begin(
            self,
            Inputs(
                noisy_BNC=hidden_states,
                timestep_B=timestep,
                embeds_BMD=encoder_hidden_states,
                mask_BM=encoder_hidden_states_mask,
                grid=(rows, columns),
            ),
        )
        for block in self.transformer_blocks:
            state = family.run_block(block, state, context)
        velocity_BNC = family.end(self, state, context)
        return Transformer2DModelOutput(sample=velocity_BNC) if return_dict else (velocity_BNC,)


def _queries_keys_values(
    state_BND: Tensor, heads: int, layers: tuple[nn.Module, ...], rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, tokens, heads, channels of a head] each; queries and keys normalised and rotated."""
    to_query, to_key, to_value, norm_query, norm_key = layers
    query, key, value = (
        cast("Tensor", layer(state_BND)).unflatten(-1, (heads, -1))
        for layer in (to_query, to_key, to_value)
    )
    query = apply_rotary_emb_qwen(norm_query(query), rope, use_real=False)
    key = apply_rotary_emb_qwen(norm_key(key), rope, use_real=False)
    return query, key, value
