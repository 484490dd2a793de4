"""Qwen-Image: dual-stream blocks of diffusers' QwenImageTransformer2DModel, plain text-to-image.

Shapes: B batch, N image tokens, M text tokens, D width, C latent channels of a packed token.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from trainers.students.families.base import Config, Context, FamilyError, Inputs, State
from trainers.students.plan import BlockPlan, Plan

if TYPE_CHECKING:
    import torch
    from diffusers import QwenImageTransformer2DModel
    from diffusers.models.attention import FeedForward
    from torch import Tensor, nn

FFN_MULTIPLE = 4
"""Hidden channels of a stock block's FFN per channel of width; fixed in diffusers."""

TIMESTEP_CHANNELS = 256
"""Sinusoidal channels that the timestep embedding reads; fixed in diffusers."""


@dataclass(frozen=True)
class _Sizes:
    """The sizes in a config, with the stock class's values for keys it leaves out."""

    blocks: int
    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    patch: int
    text_width: int

    @classmethod
    def of(cls, config: Config) -> Self:
        in_channels = config.get("in_channels", 64)
        return cls(
            blocks=config.get("num_layers", 60),
            heads=config.get("num_attention_heads", 24),
            head_dim=config.get("attention_head_dim", 128),
            in_channels=in_channels,
            out_channels=config.get("out_channels", 16) or in_channels,
            patch=config.get("patch_size", 2),
            text_width=config.get("joint_attention_dim", 3584),
        )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class _Context(NamedTuple):
    time_BD: Tensor
    rope: tuple[Tensor, Tensor]
    mask_BM: Tensor | None


class QwenImageFamily:
    """See trainers.students.families.base.Family."""

    name = "qwen_image"

    def check(self, config: Config, where: str) -> None:
        # Editing variants feed extra conditions through the blocks.
        for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(key):
                raise FamilyError(
                    f"{where}: {key} is set, which makes this an editing or guidance-distilled "
                    "variant of Qwen-Image; give a text-to-image teacher"
                )

    def blocks(self, config: Config) -> int:
        return _Sizes.of(config).blocks

    def outside_parameters(self, config: Config) -> int:
        sizes = _Sizes.of(config)
        d = sizes.width
        time = _linear(TIMESTEP_CHANNELS, d) + _linear(d, d)
        text = sizes.text_width + _linear(sizes.text_width, d)
        image = _linear(sizes.in_channels, d)
        out = _linear(d, 2 * d) + _linear(d, sizes.patch**2 * sizes.out_channels)
        return time + text + image + out

    def block_parameters(self, config: Config, block: BlockPlan) -> int:
        sizes = _Sizes.of(config)
        d, hidden = sizes.width, self.ffn_width(config, block.ffn)
        attention = 8 * _linear(d, d) + 4 * sizes.head_dim
        modulation = 2 * _linear(d, 6 * d)
        ffns = 2 * (_linear(d, hidden) + _linear(hidden, d))
        return attention + modulation + ffns

    def ffn_width(self, config: Config, fraction: float) -> int:
        return max(1, round(fraction * FFN_MULTIPLE * _Sizes.of(config).width))

    def student_config(self, config: Config, plan: Plan) -> dict[str, Any]:
        from diffusers import QwenImageTransformer2DModel

        known = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
        own = {key: value for key, value in config.items() if key in known}
        own |= {"_class_name": self.student_class(plan)[1], "num_layers": len(plan.blocks)}
        if not plan.depth_only:
            own["ffn_widths"] = [self.ffn_width(config, block.ffn) for block in plan.blocks]
        return own

    def student_class(self, plan: Plan) -> tuple[str, str]:
        if plan.depth_only:
            return "diffusers", "QwenImageTransformer2DModel"
        return "trainers", "PrunedQwenImageTransformer2DModel"

    def build(
        self,
        config: Config,
        plan: Plan,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        import diffusers
        from accelerate import init_empty_weights

        own = self.student_config(config, plan)
        own.pop("_class_name")
        # Only parameters go to the meta device: the rotary tables, no buffers, must stay real.
        with init_empty_weights():
            if plan.depth_only:
                model = diffusers.QwenImageTransformer2DModel(**own)
            else:
                import trainers

                model = trainers.PrunedQwenImageTransformer2DModel(**own)
        return _materialise(model, device, dtype)

    def build_block(
        self,
        config: Config,
        block: BlockPlan,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        from accelerate import init_empty_weights
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

        from trainers.students.families.pruned_qwen_image import set_ffn_width

        sizes = _Sizes.of(config)
        with init_empty_weights():
            built = QwenImageTransformerBlock(
                dim=sizes.width,
                num_attention_heads=sizes.heads,
                attention_head_dim=sizes.head_dim,
            )
            set_ffn_width(built, self.ffn_width(config, block.ffn))
        return _materialise(built, device, dtype)

    def block_modules(self, model: nn.Module) -> nn.ModuleList:
        return cast("QwenImageTransformer2DModel", model).transformer_blocks

    def block_prefix(self) -> str:
        return "transformer_blocks."

    def begin(self, model: nn.Module, inputs: Inputs) -> tuple[State, Context]:
        from diffusers.models.transformers.transformer_qwenimage import (
            compute_text_seq_len_from_mask,
        )

        transformer = cast("QwenImageTransformer2DModel", model)
        image_BND = transformer.img_in(inputs.noisy_BNC)
        text_BMD = transformer.txt_in(transformer.txt_norm(inputs.embeds_BMD))
        tokens, _, mask_BM = compute_text_seq_len_from_mask(text_BMD, inputs.mask_BM)
        time_BD = transformer.time_text_embed(inputs.timestep_B.to(image_BND.dtype), image_BND)
        rope = transformer.pos_embed(
            _picture_shapes(inputs), max_txt_seq_len=tokens, device=image_BND.device
        )
        return State(text_BMD, image_BND), _Context(time_BD, rope, mask_BM)

    def run_block(self, block: nn.Module, state: State, context: Context) -> State:
        text_BMD, image_BND = block(
            hidden_states=state.image_BND,
            encoder_hidden_states=state.text_BMD,
            encoder_hidden_states_mask=context.mask_BM,
            temb=context.time_BD,
            image_rotary_emb=context.rope,
        )
        return State(text_BMD, image_BND)

    def end(self, model: nn.Module, state: State, context: Context) -> Tensor:
        transformer = cast("QwenImageTransformer2DModel", model)
        normed_BND = transformer.norm_out(state.image_BND, context.time_BD)
        return cast("Tensor", transformer.proj_out(normed_BND))

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        velocity_BNC = model(
            hidden_states=inputs.noisy_BNC,
            encoder_hidden_states=inputs.embeds_BMD,
            encoder_hidden_states_mask=inputs.mask_BM,
            timestep=inputs.timestep_B,
            img_shapes=_picture_shapes(inputs),
            return_dict=False,
        )[0]
        return cast("Tensor", velocity_BNC)

    def ffns(self, block: nn.Module) -> dict[str, nn.Module]:
        return {name: getattr(block, attribute) for name, attribute in _FFNS.items()}

    def ffn_importance(self, ffn: nn.Module) -> Tensor:
        read, write = _ffn_layers(ffn)
        return read.weight.float().norm(dim=1) * write.weight.float().norm(dim=0)

    def ffn_tensors(self, name: str, ffn: nn.Module, kept: Tensor) -> dict[str, Tensor]:
        read, write = _ffn_layers(ffn)
        prefix = f"{_FFNS[name]}.net"
        return {
            f"{prefix}.0.proj.weight": read.weight[kept],
            f"{prefix}.0.proj.bias": read.bias[kept],
            f"{prefix}.2.weight": write.weight[:, kept],
            f"{prefix}.2.bias": write.bias,
        }


_FFNS = {"image": "img_mlp", "text": "txt_mlp"}


def _ffn_layers(ffn: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The layer into the hidden channels and the one out of them."""
    net = cast("FeedForward", ffn).net
    return cast("nn.Linear", net[0].proj), cast("nn.Linear", net[2])


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _picture_shapes(inputs: Inputs) -> list[list[tuple[int, int, int]]]:
    return [[(1, *inputs.grid)]] * len(inputs.noisy_BNC)


def _materialise(
    module: nn.Module, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Module:
    import torch

    if dtype is not None:
        module = module.to(dtype)
    return module if torch.device(device).type == "meta" else module.to_empty(device=device)
