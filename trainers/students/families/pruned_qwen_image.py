"""The width-cut Qwen-Image transformer: the stock one with a narrower FFN in some blocks."""

from __future__ import annotations

from diffusers import QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock


class PrunedQwenImageTransformer2DModel(QwenImageTransformer2DModel):
    """QwenImageTransformer2DModel whose block i has `ffn_widths[i]` hidden channels in both FFNs.

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
        ffn_widths: list[int] | None = None,
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
        if ffn_widths is None:
            return
        if len(ffn_widths) != num_layers:
            raise ValueError(
                f"ffn_widths has {len(ffn_widths)} entries; give one for each of the "
                f"{num_layers} blocks"
            )
        for block, width in zip(self.transformer_blocks, ffn_widths, strict=True):
            set_ffn_width(block, width)


def set_ffn_width(block: QwenImageTransformerBlock, width: int) -> None:
    """Gives both streams new FFNs of `width` hidden channels, unless they have that already."""
    for name in ("img_mlp", "txt_mlp"):
        if getattr(block, name).net[2].in_features != width:
            ffn = FeedForward(
                dim=block.dim, dim_out=block.dim, inner_dim=width, activation_fn="gelu-approximate"
            )
            setattr(block, name, ffn)
