"""Qwen-Image: dual-stream blocks of diffusers' QwenImageTransformer2DModel, plain text-to-image.

Shapes: B batch, N image tokens, M text tokens, D width, C latent channels of a packed token.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from trainers.students.families.base import (
    Config,
    Context,
    FamilyError,
    Inputs,
    MapPair,
    State,
)
from trainers.students.plan import BlockPlan, Plan, Text

if TYPE_CHECKING:
    import torch
    from diffusers import QwenImageTransformer2DModel
    from diffusers.models.attention import FeedForward
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
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


class BlockShape(NamedTuple):
    """What a student block is made of, apart from the width."""

    ffn: int | None
    """Hidden channels of each FFN; None for a linear map in its place."""
    text: Text
    text_map: bool

    @property
    def stock(self) -> bool:
        """Whether the stock class holds it, with other FFNs at most."""
        return self.ffn is not None and self.text == "dual"


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
        d, shape = sizes.width, self._shape(config, block)
        attention = 4 * _linear(d, d) + 2 * sizes.head_dim
        if shape.ffn is None:
            branch = _linear(d, 3 * d) + _linear(d, d)
        else:
            branch = _linear(d, 6 * d) + _linear(d, shape.ffn) + _linear(shape.ffn, d)
        match shape.text:
            case "dual":
                return 2 * (attention + branch)
            case "projected":  # the text's attention layers stay, its output's unread (as PPCL's)
                return 2 * attention + branch + (1 + shape.text_map) * _linear(d, d)
            case "shared":
                return attention + branch

    def ffn_width(self, config: Config, fraction: float) -> int:
        return max(1, round(fraction * FFN_MULTIPLE * _Sizes.of(config).width))

    def _shape(self, config: Config, block: BlockPlan) -> BlockShape:
        ffn = None if block.ffn == "linear" else self.ffn_width(config, block.ffn)
        return BlockShape(ffn, block.text, block.text_map)

    def student_config(self, config: Config, plan: Plan) -> dict[str, Any]:
        from diffusers import QwenImageTransformer2DModel

        known = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
        own = {key: value for key, value in config.items() if key in known}
        own |= {"_class_name": self.student_class(plan)[1], "num_layers": len(plan.blocks)}
        if not plan.depth_only:
            own["block_shapes"] = [self._shape(config, b)._asdict() for b in plan.blocks]
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

        from trainers.students.families.pruned_qwen_image import make_block

        sizes, shape = _Sizes.of(config), self._shape(config, block)
        with init_empty_weights():
            built = make_block(sizes.width, sizes.heads, sizes.head_dim, shape)
        return _materialise(built, device, dtype)

    def block_tensors(self, block: BlockPlan, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(whole)
        if block.ffn == "linear":
            tensors = {k: t for k, t in tensors.items() if "_mlp." not in k}
            for stream in ("img", "txt"):  # what is left of the modulation is attention's half
                for kind in ("weight", "bias"):
                    name = f"{stream}_mod.1.{kind}"
                    tensors[name] = tensors[name].chunk(2)[0]
        if block.text != "dual":
            tensors = {k: t for k, t in tensors.items() if not k.startswith(("txt_mod", "txt_mlp"))}
        if block.text == "shared":
            tensors = {k: t for k, t in tensors.items() if ".add_" not in k and "_add" not in k}
        return tensors

    def maps(self, block: BlockPlan) -> tuple[str, ...]:
        ffns = ("img_mlp", *(["txt_mlp"] if block.text == "dual" else []))
        return (
            *(ffns if block.ffn == "linear" else ()),
            *(["txt_proj"] if block.text == "projected" else []),
            *(["txt_map"] if block.text_map else []),
        )

    def map_pairs(
        self, block: nn.Module, state: State, context: Context
    ) -> tuple[State, dict[str, MapPair]]:
        stock = cast("QwenImageTransformerBlock", block)
        with _read_by(stock.img_norm2) as image, _read_by(stock.txt_norm2) as text:
            after = self.run_block(block, state, context)
        image_BND, text_BMD = image[0], text[0]
        pairs = {
            "img_mlp": MapPair(image_BND, after.image_BND - image_BND, text=False),
            "txt_mlp": MapPair(text_BMD, after.text_BMD - text_BMD, text=True),
            "txt_map": MapPair(state.text_BMD, after.text_BMD - state.text_BMD, text=True),
        }
        if state.modulated_BMD is not None and after.modulated_BMD is not None:
            change_BMD = after.modulated_BMD - state.modulated_BMD
            pairs["txt_proj"] = MapPair(state.modulated_BMD, change_BMD, text=True)
        return after, pairs

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
        from trainers.students.families.pruned_qwen_image import PrunedQwenImageBlock

        if isinstance(block, PrunedQwenImageBlock):
            return State(*block(*state, context.mask_BM, context.time_BD, context.rope))
        attn = cast("QwenImageTransformerBlock", block).attn
        with _read_by(attn, "encoder_hidden_states") as modulated:
            text_BMD, image_BND = block(
                hidden_states=state.image_BND,
                encoder_hidden_states=state.text_BMD,
                encoder_hidden_states_mask=context.mask_BM,
                temb=context.time_BD,
                image_rotary_emb=context.rope,
            )
        return State(text_BMD, image_BND, modulated[0])

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


@contextlib.contextmanager
def _read_by(module: nn.Module, keyword: str | None = None) -> Iterator[list[Tensor]]:
    """Collects what a module is called with: its first argument, or a keyword's.

    A hook, because a sharded block has its weights only inside its own `forward`.
    """
    read: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        read.append(keywords[keyword] if keyword else arguments[0])

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


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
