"""FLUX.1: dual-stream, then single-stream blocks of diffusers' FluxTransformer2DModel.

Blocks are numbered through: the dual ones first. A single block runs its FFN beside attention, over
text and image in one sequence, and one layer writes for both. Shapes: B batch, N image tokens,
M text tokens, D width, C latent channels of a packed token.
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
    KEPT_HIDDEN,
    KEPT_SINGLE,
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
    from diffusers import DiffusionPipeline, FluxTransformer2DModel
    from diffusers.models.transformers.transformer_flux import (
        FluxSingleTransformerBlock,
        FluxTransformerBlock,
    )
    from torch import Tensor, nn

GUIDANCE = 3.5
"""Guidance at which a guidance-distilled teacher is read, as FLUX.1-dev is used."""

FLUX_1_DEV: Config = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "out_channels": None,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
"""transformer/config.json of black-forest-labs/FLUX.1-dev."""

_NAMES = DualNames(
    image_mod="norm1.linear",
    text_mod="norm1_context.linear",
    image_ffn="ff",
    text_ffn="ff_context",
)


@dataclass(frozen=True)
class _Sizes:
    """The sizes in a config, with the stock class's values for keys it leaves out."""

    dual: int
    single: int
    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    patch: int
    text_width: int
    pooled_width: int
    guided: bool

    @classmethod
    def of(cls, config: Config) -> Self:
        in_channels = config.get("in_channels", 64)
        return cls(
            dual=config.get("num_layers", 19),
            single=config.get("num_single_layers", 38),
            heads=config.get("num_attention_heads", 24),
            head_dim=config.get("attention_head_dim", 128),
            in_channels=in_channels,
            out_channels=config.get("out_channels") or in_channels,
            patch=config.get("patch_size", 1),
            text_width=config.get("joint_attention_dim", 4096),
            pooled_width=config.get("pooled_projection_dim", 768),
            guided=config.get("guidance_embeds", False),
        )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def is_single(self, block: BlockPlan) -> bool:
        return block.span[0] >= self.dual

    def dual_among(self, plan: Plan) -> int:
        """How many of the student's blocks are dual."""
        return sum(not self.is_single(block) for block in plan.blocks)


class _Context(NamedTuple):
    time_BD: Tensor
    rope: tuple[Tensor, Tensor]


class FluxFamily:
    """See trainers.students.families.base.Family.

    FLUX reads padding as text, so `Inputs.mask_BM` is None; `Inputs.pooled_BP` is needed.
    """

    name = "flux"

    published = FLUX_1_DEV

    def check(self, config: Config, where: str) -> None:
        sizes = _Sizes.of(config)
        if sizes.in_channels != sizes.out_channels:
            raise FamilyError(
                f"{where}: in_channels is {sizes.in_channels} and out_channels "
                f"{sizes.out_channels}, which makes this a variant of FLUX.1 that reads another "
                "picture; give a text-to-image teacher"
            )

    def blocks(self, config: Config) -> int:
        sizes = _Sizes.of(config)
        return sizes.dual + sizes.single

    def width(self, config: Config) -> int:
        return _Sizes.of(config).width

    def outside_parameters(self, config: Config) -> int:
        sizes = _Sizes.of(config)
        d, linear = sizes.width, linear_parameters
        time = linear(TIMESTEP_CHANNELS, d) + linear(d, d)
        pooled = linear(sizes.pooled_width, d) + linear(d, d)
        read = linear(sizes.text_width, d) + linear(sizes.in_channels, d)
        out = linear(d, 2 * d) + linear(d, sizes.patch**2 * sizes.out_channels)
        return (1 + sizes.guided) * time + pooled + read + out

    def block_parameters(self, config: Config, block: BlockPlan) -> int:
        sizes = _Sizes.of(config)
        d, shape, linear = sizes.width, BlockShape.of(sizes.width, block), linear_parameters
        if not sizes.is_single(block):
            return dual_block_parameters(d, sizes.head_dim, shape)
        assert shape.ffn is not None, "refused"
        attention = 3 * linear(d, d) + 2 * sizes.head_dim
        return linear(d, 3 * d) + attention + linear(d, shape.ffn) + linear(d + shape.ffn, d)

    def block_work(self, config: Config, block: BlockPlan) -> Work:
        sizes = _Sizes.of(config)
        width, shape = sizes.width, BlockShape.of(sizes.width, block)
        if not sizes.is_single(block):
            return dual_block_work(width, shape)
        assert shape.ffn is not None, "refused"
        weights = 4 * width**2 + 2 * width * shape.ffn
        kept = round(KEPT_SINGLE * width) + KEPT_HIDDEN * shape.ffn
        return Work(weights, weights, kept, kept)

    def ffn_width(self, config: Config, fraction: float) -> int:
        return ffn_width(_Sizes.of(config).width, fraction)

    def refusal(self, config: Config, block: BlockPlan) -> str | None:
        sizes = _Sizes.of(config)
        dual, last = sizes.dual, sizes.dual + sizes.single - 1
        span = f"span [{block.span[0]}, {block.span[1]}]"
        if block.span[0] < dual <= block.span[1]:
            return (
                f"{span} crosses the border between the dual blocks, 0 to {dual - 1}, and the "
                f"single blocks, {dual} to {last}; only blocks of one kind can be merged"
            )
        if not sizes.is_single(block):
            return None
        if block.ffn == "linear":
            return (
                f"{span}: ffn linear is for the dual blocks, 0 to {dual - 1}; a single block's "
                "FFN runs beside its attention, so give a fraction to keep"
            )
        if block.text != "dual":
            return (
                f"{span}: text {block.text} is for the dual blocks, 0 to {dual - 1}; a single "
                "block has no text branch to give up"
            )
        return None

    def student_config(self, config: Config, plan: Plan) -> dict[str, Any]:
        from diffusers import FluxTransformer2DModel

        sizes = _Sizes.of(config)
        known = inspect.signature(FluxTransformer2DModel.__init__).parameters
        own = {key: value for key, value in config.items() if key in known}
        own |= {
            "_class_name": self.student_class(plan)[1],
            "num_layers": sizes.dual_among(plan),
            "num_single_layers": len(plan.blocks) - sizes.dual_among(plan),
        }
        if not plan.depth_only:
            own["block_shapes"] = [BlockShape.of(sizes.width, b)._asdict() for b in plan.blocks]
        return own

    def teacher_config(self, config: Config, plan: Plan) -> Config:
        dual = sum(block.length for block in plan.blocks[: _Sizes.of(config).dual])
        return {**config, "num_layers": dual, "num_single_layers": plan.teacher_blocks - dual}

    def student_class(self, plan: Plan) -> tuple[str, str]:
        if plan.depth_only:
            return "diffusers", "FluxTransformer2DModel"
        return "trainers", "PrunedFluxTransformer2DModel"

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
        with init_empty_weights():
            if plan.depth_only:
                model = diffusers.FluxTransformer2DModel(**own)
            else:
                import trainers

                model = trainers.PrunedFluxTransformer2DModel(**own)
        return materialise(model, device, dtype)

    def build_block(
        self,
        config: Config,
        block: BlockPlan,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        from accelerate import init_empty_weights

        from trainers.students.families.pruned_flux import make_dual_block, make_single_block

        sizes = _Sizes.of(config)
        make = make_single_block if sizes.is_single(block) else make_dual_block
        with init_empty_weights():
            built = make(
                sizes.width, sizes.heads, sizes.head_dim, BlockShape.of(sizes.width, block)
            )
        return materialise(built, device, dtype)

    def block_tensors(self, block: BlockPlan, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _NAMES.kept(block, whole)

    def maps(self, block: BlockPlan) -> tuple[str, ...]:
        return _NAMES.maps(block)

    def map_pairs(
        self, block: nn.Module, state: State, context: Context
    ) -> tuple[State, dict[str, MapPair]]:
        if _is_single(block):
            return self.run_block(block, state, context), {}
        stock = cast("FluxTransformerBlock", block)
        with read_by(stock.norm2) as image, read_by(stock.norm2_context) as text:
            after = self.run_block(block, state, context)
        return after, _NAMES.map_pairs(state, after, image[0], text[0])

    def block_modules(self, model: nn.Module) -> nn.ModuleList:
        from torch import nn

        transformer = cast("FluxTransformer2DModel", model)
        return nn.ModuleList(
            [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        )

    def block_prefixes(self, config: Config, plan: Plan) -> tuple[str, ...]:
        dual = _Sizes.of(config).dual_among(plan)
        return (
            *(f"transformer_blocks.{i}." for i in range(dual)),
            *(f"single_transformer_blocks.{i}." for i in range(len(plan.blocks) - dual)),
        )

    def encode_pictures(self, vae: nn.Module, signal_BCHW: Tensor) -> Tensor:
        autoencoder = cast("Any", vae)
        raw_BCHW = autoencoder.encode(signal_BCHW).latent_dist.mode().float()
        shift, scale = autoencoder.config.shift_factor, autoencoder.config.scaling_factor
        return cast("Tensor", (raw_BCHW - shift) * scale)

    def encode_texts(self, pipeline: DiffusionPipeline, captions: Sequence[str]) -> Texts:
        embeds_BMD, pooled_BP, _ = pipeline.encode_prompt(
            list(captions), max_sequence_length=text_tokens(pipeline)
        )
        return Texts(embeds_BMD, pooled_BP=pooled_BP)

    def begin(self, model: nn.Module, inputs: Inputs) -> tuple[State, Context]:
        return begin_stock(model, **_arguments(model, inputs))

    def run_block(self, block: nn.Module, state: State, context: Context) -> State:
        from trainers.students.families.pruned_flux import PrunedFluxBlock

        if isinstance(block, PrunedFluxBlock):
            return State(*block(*state, context.time_BD, context.rope))
        stock = {
            "hidden_states": state.image_BND,
            "encoder_hidden_states": state.text_BMD,
            "temb": context.time_BD,
            "image_rotary_emb": context.rope,
        }
        if _is_single(block):
            return State(*block(**stock))
        attn = cast("FluxTransformerBlock", block).attn
        after, modulated_BMD = call_reading(block, attn, "encoder_hidden_states", stock)
        text_BMD, image_BND = after
        return State(text_BMD, image_BND, modulated_BMD)

    def end(self, model: nn.Module, state: State, context: Context) -> Tensor:
        transformer = cast("FluxTransformer2DModel", model)
        normed_BND = transformer.norm_out(state.image_BND, context.time_BD)
        return cast("Tensor", transformer.proj_out(normed_BND))

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        return cast("Tensor", model(**_arguments(model, inputs), return_dict=False)[0])

    def ffns(self, block: nn.Module) -> dict[str, nn.Module]:
        return {"joint": block} if _is_single(block) else _NAMES.ffns(block)

    def ffn_importance(self, ffn: nn.Module) -> Tensor:
        if not _is_single(ffn):
            return ffn_importance(ffn)
        block = cast("FluxSingleTransformerBlock", ffn)
        read, write = block.proj_mlp.weight, block.proj_out.weight[:, _attended(block) :]
        return cast("Tensor", read.float().norm(dim=1) * write.float().norm(dim=0))

    def ffn_tensors(self, name: str, ffn: nn.Module, kept: Tensor) -> dict[str, Tensor]:
        if name != "joint":
            return _NAMES.ffn_tensors(name, ffn, kept)
        import torch

        block = cast("FluxSingleTransformerBlock", ffn)
        attended = torch.arange(_attended(block), device=kept.device)
        columns = torch.cat([attended, len(attended) + kept])
        return {
            "proj_mlp.weight": block.proj_mlp.weight[kept],
            "proj_mlp.bias": block.proj_mlp.bias[kept],
            "proj_out.weight": block.proj_out.weight[:, columns],
            "proj_out.bias": block.proj_out.bias,
        }


def text_tokens(pipeline: Any) -> int:
    """The length that captions are padded to: the T5 tokenizer's, 512 for FLUX.1-dev."""
    return min(512, int(pipeline.tokenizer_2.model_max_length))


def begin_stock(
    model: nn.Module,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None,
) -> tuple[State, Context]:
    """Everything before the first block, from the arguments of the stock forward pass."""
    import torch

    transformer = cast("FluxTransformer2DModel", model)
    image_BND = transformer.x_embedder(hidden_states)
    # The stock class counts time and guidance in thousandths, in the dtype of its states.
    conditions = [c.to(image_BND.dtype) * 1000 for c in (timestep, guidance) if c is not None]
    time_BD = transformer.time_text_embed(*conditions, pooled_projections)
    text_BMD = transformer.context_embedder(encoder_hidden_states)
    rope = transformer.pos_embed(torch.cat([txt_ids, img_ids]))
    return State(text_BMD, image_BND), _Context(time_BD, rope)


def _arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What the stock forward pass takes. Text is at position 0, image tokens at theirs."""
    import torch

    assert inputs.mask_BM is None, "FLUX reads padding as text"
    assert inputs.pooled_BP is not None, "FLUX reads a pooled text embedding"
    device = inputs.noisy_BNC.device
    rows, columns = inputs.grid
    places = torch.zeros(rows, columns, 3, device=device)
    places[..., 1] = torch.arange(rows, device=device)[:, None]
    places[..., 2] = torch.arange(columns, device=device)
    guided = cast("FluxTransformer2DModel", model).config.guidance_embeds
    return {
        "hidden_states": inputs.noisy_BNC,
        "encoder_hidden_states": inputs.embeds_BMD,
        "pooled_projections": inputs.pooled_BP,
        "timestep": inputs.timestep_B,
        "img_ids": places.flatten(0, 1),
        "txt_ids": torch.zeros(inputs.embeds_BMD.shape[1], 3, device=device),
        "guidance": torch.full_like(inputs.timestep_B, GUIDANCE) if guided else None,
    }


def _is_single(block: nn.Module) -> bool:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    return isinstance(block, FluxSingleTransformerBlock)


def _attended(block: FluxSingleTransformerBlock) -> int:
    """Columns of `proj_out` that read attention; those of the FFN follow."""
    return cast("int", block.proj_out.in_features - block.proj_mlp.out_features)
