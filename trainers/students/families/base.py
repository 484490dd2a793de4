"""What a model family tells the rest: its blocks, their sizes, and how to run them one by one.

Shapes: B batch, N image tokens, M text tokens, D width, C latent channels of a packed token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from storage.errors import EspalierError
from trainers.students.plan import BlockPlan, Plan, PlanError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

Config = Mapping[str, Any]
"""A transformer's config.json, parsed."""

Context = Any
"""What every block of one forward pass shares (conditioning, positions, mask); the family's own."""


class FamilyError(EspalierError):
    """A model of an architecture that no family knows."""


class State(NamedTuple):
    """What flows from block to block."""

    text_BMD: Tensor
    image_BND: Tensor
    modulated_BMD: Tensor | None = None
    """What the last block with a text branch fed its attention of the text; None before the first.
    Blocks with projected text read it."""

    def rows(self, rows: slice) -> State:
        """The state of a part of the batch."""
        return State(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]  # only modulated_BMD is ever None


class MapPair(NamedTuple):
    """What a linear map reads and what it should add, [B, tokens, D] each."""

    read: Tensor
    added: Tensor
    text: bool
    """Whether the tokens are the text's, of which some may be padding."""


class Texts(NamedTuple):
    """Captions as a pipeline's text encoders read them; see Inputs."""

    embeds_BMD: Tensor
    mask_BM: Tensor | None = None
    pooled_BP: Tensor | None = None


class Work(NamedTuple):
    """What a block costs for each token, attention between tokens apart."""

    image_weights: int
    """Weights that an image token is multiplied with."""
    text_weights: int
    image_kept: int
    """Bytes that autograd keeps for an image token where a state has two bytes a channel."""
    text_kept: int


@dataclass(frozen=True)
class Inputs:
    """One batch as the transformer reads it."""

    noisy_BNC: Tensor
    """Packed latents on the way from picture (t = 0) to noise (t = 1)."""
    timestep_B: Tensor
    """In [0, 1]."""
    embeds_BMD: Tensor
    """Text embeddings, in the text encoder's width; padding at the end."""
    mask_BM: Tensor | None
    """bool, true for real text tokens; None when all are."""
    grid: tuple[int, int]
    """Rows and columns of image tokens; N is their product."""
    pooled_BP: Tensor | None = None
    """One embedding of each whole text, in the width of the encoder that pools it; None where the
    family reads no such thing."""

    def rows(self, rows: slice) -> Inputs:
        """A part of the batch."""
        mask_BM, pooled_BP = self.mask_BM, self.pooled_BP
        return Inputs(
            noisy_BNC=self.noisy_BNC[rows],
            timestep_B=self.timestep_B[rows],
            embeds_BMD=self.embeds_BMD[rows],
            mask_BM=None if mask_BM is None else mask_BM[rows],
            grid=self.grid,
            pooled_BP=None if pooled_BP is None else pooled_BP[rows],
        )


class Runs(Protocol):
    """How a whole model is run."""

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The model's own forward pass: velocity_BNC."""


class Family(Runs, Protocol):
    """One architecture. Stateless; one instance per family in FAMILIES.

    `config` is always the *teacher's* transformer config, and `model` a teacher or student built
    from it. Methods that need torch or diffusers import them when called.
    """

    @property
    def name(self) -> str: ...

    @property
    def published(self) -> Config:
        """The transformer config of the family's best-known model."""

    def check(self, config: Config, where: str) -> None:
        """FamilyError when the config asks for what this family cannot take apart."""

    def blocks(self, config: Config) -> int:
        """Number of blocks."""

    def width(self, config: Config) -> int:
        """Channels of a state."""

    def outside_parameters(self, config: Config) -> int:
        """Parameters before, after and beside the blocks."""

    def block_parameters(self, config: Config, block: BlockPlan) -> int:
        """Parameters of one student block."""

    def block_work(self, config: Config, block: BlockPlan) -> Work:
        """What one student block costs."""

    def ffn_width(self, config: Config, fraction: float) -> int:
        """Hidden channels of a feed-forward network of which `fraction` is kept; at least 1."""

    def refusal(self, config: Config, block: BlockPlan) -> str | None:
        """Why no student can have this block, as a clause; None when one can."""

    def student_config(self, config: Config, plan: Plan) -> dict[str, Any]:
        """The student's own config, with the name of its class under `_class_name`."""

    def teacher_config(self, config: Config, plan: Plan) -> Config:
        """The sizes of the teacher by the config of a student of this plan."""

    def student_class(self, plan: Plan) -> tuple[str, str]:
        """Library and class as model_index.json names them."""

    def build(
        self,
        config: Config,
        plan: Plan,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The student with uninitialised weights, of the stock class when only depth changes.

        PlanError when the plan is not for a teacher with this config.
        """

    def build_block(
        self,
        config: Config,
        block: BlockPlan,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """One student block with uninitialised weights."""

    def block_modules(self, model: nn.Module) -> nn.ModuleList:
        """The blocks of a model, in order."""

    def block_prefixes(self, config: Config, plan: Plan) -> tuple[str, ...]:
        """What the names of each student block's parameters begin with, the dot included."""

    def encode_pictures(self, vae: nn.Module, signal_BCHW: Tensor) -> Tensor:
        """What the transformer learns to draw, of pictures in [-1, 1]: the mean of the
        autoencoder's posterior, normalised, float32 [B, channels, rows, columns], not packed."""

    def encode_texts(self, pipeline: DiffusionPipeline, captions: Sequence[str]) -> Texts:
        """What the transformer reads of captions."""

    def begin(self, model: nn.Module, inputs: Inputs) -> tuple[State, Context]:
        """Everything before the first block."""

    def run_block(self, block: nn.Module, state: State, context: Context) -> State:
        """One block; the context comes from any model with the same outside."""

    def end(self, model: nn.Module, state: State, context: Context) -> Tensor:
        """Everything after the last block: velocity_BNC."""

    def block_tensors(self, block: BlockPlan, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A teacher block's weights without what the student block does not have.

        `whole` may have narrowed FFNs already; the block's `maps` come on top.
        """

    def maps(self, block: BlockPlan) -> tuple[str, ...]:
        """Names, in the student block, of the linear maps that no teacher block has; each is an
        `nn.Linear` of the model's width, whose output is added to its input."""

    def map_pairs(
        self, block: nn.Module, state: State, context: Context
    ) -> tuple[State, dict[str, MapPair]]:
        """Runs a teacher block; with the state after it, what each map should learn from it."""

    def ffns(self, block: nn.Module) -> dict[str, nn.Module]:
        """The feed-forward networks whose width may be cut, by name ("image", "text"); the block
        itself where its only one is fused with attention."""

    def ffn_importance(self, ffn: nn.Module) -> Tensor:
        """Importance of each hidden channel [hidden], from the weights alone."""

    def ffn_tensors(self, name: str, ffn: nn.Module, kept: Tensor) -> dict[str, Tensor]:
        """The weights of ffns(block)[name] on the hidden channels `kept`, by name in the block."""


def check_plan(family: Family, config: Config, plan: Plan) -> None:
    """PlanError, naming what is wrong, when the plan is not for a teacher with this config."""
    blocks = family.blocks(config)
    if blocks != plan.teacher_blocks:
        raise PlanError(
            f"the plan is for a teacher of {plan.teacher_blocks} blocks, this one has {blocks}; "
            "give the teacher that the plan was made for"
        )
    for i, block in enumerate(plan.blocks):
        refusal = family.refusal(config, block)
        if refusal is not None:
            raise PlanError(f"block {i}: {refusal}")
