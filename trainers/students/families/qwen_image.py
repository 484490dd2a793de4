"""Qwen-Image: dual-stream blocks of diffusers' QwenImageTransformer2DModel, plain text-to-image.

Shapes: B batch, N image tokens, M text tokens, D width, C latent channels of a packed token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from trainers.students.families.base import (
    Config,
    Context,
    FamilyError,
    Inputs,
    MapPair,
    State,
    Texts,
    Work,
    check_plan,
)
from trainers.students.families.parts import (
    TIMESTEP_CHANNELS,
    BlockShape,
    DualNames,
    call_reading,
    dual_block_parameters,
    dual_block_work,
    ffn_importance,
    ffn_width,
    linear_parameters,
    materialise,
    read_by,
)
from trainers.students.plan import BlockPlan, Plan

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
    from torch import Tensor, nn

QWEN_IMAGE: Config = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
"""transformer/config.json of Qwen/Qwen-Image."""

_NAMES = DualNames(
    image_mod="img_mod.1", text_mod="txt_mod.1", image_ffn="img_mlp", text_ffn="txt_mlp"
)


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

    published = QWEN_IMAGE

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

    def width(self, config: Config) -> int:
        return _Sizes.of(config).width

    def outside_parameters(self, config: Config) -> int:
        sizes = _Sizes.of(config)
        d, linear = sizes.width, linear_parameters
        time = linear(TIMESTEP_CHANNELS, d) + linear(d, d)
        text = sizes.text_width + linear(sizes.text_width, d)
        image = linear(sizes.in_channels, d)
        out = linear(d, 2 * d) + linear(d, sizes.patch**2 * sizes.out_channels)
        return time + text + image + out

    def block_parameters(self, config: Config, block: BlockPlan) -> int:
        sizes = _Sizes.of(config)
        return dual_block_parameters(sizes.width, sizes.head_dim, BlockShape.of(sizes.width, block))

    def block_work(self, config: Config, block: BlockPlan) -> Work:
        width = _Sizes.of(config).width
        return dual_block_work(width, BlockShape.of(width, block))

    def ffn_width(self, config: Config, fraction: float) -> int:
        return ffn_width(_Sizes.of(config).width, fraction)

    def refusal(self, config: Config, block: BlockPlan) -> str | None:
        return None

    def student_config(self, config: Config, plan: Plan) -> dict[str, Any]:
        from diffusers import QwenImageTransformer2DModel

        known = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
        own = {key: value for key, value in config.items() if key in known}
        own |= {"_class_name": self.student_class(plan)[1], "num_layers": len(plan.blocks)}
        if not plan.depth_only:
            width = _Sizes.of(config).width
            own["block_shapes"] = [BlockShape.of(width, b)._asdict() for b in plan.blocks]
        return own

    def teacher_config(self, config: Config, plan: Plan) -> Config:
        return {**config, "num_layers": plan.teacher_blocks}

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

        check_plan(self, config, plan)
        own = self.student_config(config, plan)
        own.pop("_class_name")
        # Only parameters go to the meta device: the rotary tables, no buffers, must stay real.
        with init_empty_weights():
            if plan.depth_only:
                model = diffusers.QwenImageTransformer2DModel(**own)
            else:
                import trainers

                model = trainers.PrunedQwenImageTransformer2DModel(**own)
        return materialise(model, device, dtype)

    def build_block(
        self,
        config: Config,
        block: BlockPlan,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        from accelerate import init_empty_weights

        from trainers.students.families.pruned_qwen_image import make_block

        sizes = _Sizes.of(config)
        shape = BlockShape.of(sizes.width, block)
        with init_empty_weights():
            built = make_block(sizes.width, sizes.heads, sizes.head_dim, shape)
        return materialise(built, device, dtype)

    def block_tensors(self, block: BlockPlan, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _NAMES.kept(block, whole)

    def maps(self, block: BlockPlan) -> tuple[str, ...]:
        return _NAMES.maps(block)

    def map_pairs(
        self, block: nn.Module, state: State, context: Context
    ) -> tuple[State, dict[str, MapPair]]:
        stock = cast("QwenImageTransformerBlock", block)
        with read_by(stock.img_norm2) as image, read_by(stock.txt_norm2) as text:
            after = self.run_block(block, state, context)
        return after, _NAMES.map_pairs(state, after, image[0], text[0])

    def block_modules(self, model: nn.Module) -> nn.ModuleList:
        return cast("QwenImageTransformer2DModel", model).transformer_blocks

    def block_prefixes(self, config: Config, plan: Plan) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{i}." for i in range(len(plan.blocks)))

    def encode_pictures(self, vae: nn.Module, signal_BCHW: Tensor) -> Tensor:
        autoencoder = cast("Any", vae)  # of video: a picture is one frame
        raw_BCHW = autoencoder.encode(signal_BCHW.unsqueeze(2)).latent_dist.mode().squeeze(2)
        raw_BCHW = raw_BCHW.float()
        mean, std = (
            raw_BCHW.new_tensor(values).view(1, -1, 1, 1)
            for values in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
        )
        return cast("Tensor", (raw_BCHW - mean) / std)

    def encode_texts(self, pipeline: DiffusionPipeline, captions: Sequence[str]) -> Texts:
        embeds_BMD, mask_BM = pipeline.encode_prompt(list(captions))
        return Texts(embeds_BMD, None if mask_BM is None else mask_BM.bool())

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
        from trainers.students.families.pruned_qwen_image import PrunedQwenImageBlock

        if isinstance(block, PrunedQwenImageBlock):
            return State(*block(*state, context.mask_BM, context.time_BD, context.rope))
        attn = cast("QwenImageTransformerBlock", block).attn
        stock = {
            "hidden_states": state.image_BND,
            "encoder_hidden_states": state.text_BMD,
            "encoder_hidden_states_mask": context.mask_BM,
            "temb": context.time_BD,
            "image_rotary_emb": context.rope,
        }
        after, modulated_BMD = call_reading(block, attn, "encoder_hidden_states", stock)
        text_BMD, image_BND = after
        return State(text_BMD, image_BND, modulated_BMD)

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
        return _NAMES.ffns(block)

    def ffn_importance(self, ffn: nn.Module) -> Tensor:
        return ffn_importance(ffn)

    def ffn_tensors(self, name: str, ffn: nn.Module, kept: Tensor) -> dict[str, Tensor]:
        return _NAMES.ffn_tensors(name, ffn, kept)


def _picture_shapes(inputs: Inputs) -> list[list[tuple[int, int, int]]]:
    return [[(1, *inputs.grid)]] * len(inputs.noisy_BNC)
