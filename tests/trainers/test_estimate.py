"""What formulas say of memory, held against real tensors; of work, against real products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import PeakMemory
from tests.trainers.students.tiny import FLUX, QWEN_IMAGE, Tiny
from trainers.data.latents import Latents, Shard
from trainers.distilled import Distilled, Observed
from trainers.estimate import (
    Pictures,
    Run,
    activations,
    block_flops,
    estimate,
    held_memory,
    library_memory,
    step_flops,
)
from trainers.library.config import TrainingConfig
from trainers.library.train import train_replacements
from trainers.optimizer import make_optimizer
from trainers.recovery import Example, backward, held_tensors, set_trainable
from trainers.schedule import PLAIN, Phase, Schedule, StepConfig
from trainers.students.families.base import Inputs
from trainers.students.plan import BlockPlan, Plan, identity_plan

SPAN = Phase(loss="span", steps=1, lr=1e-3, batch_size=2)
VELOCITY = Phase(loss="velocity", train="all", steps=1, lr=1e-3, batch_size=2)
HALF = torch.bfloat16


def sized(tiny: Tiny, heads: int, blocks: int) -> Tiny:
    """A teacher wide enough for a block to outweigh what is beside it."""
    config = {
        **tiny.config, "attention_head_dim": 32, "num_attention_heads": heads,
        "axes_dims_rope": [8, 12, 12], "num_layers": blocks,
    }  # fmt: skip
    if tiny is FLUX:
        config |= {"num_layers": blocks // 2, "num_single_layers": blocks // 2}
    return replace(tiny, config=config)


def model(tiny: Tiny, plan: Plan) -> torch.nn.Module:
    torch.manual_seed(0)
    built = tiny.family.build(tiny.config, plan)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return built.to(HALF)


def batch(tiny: Tiny, pictures: Pictures) -> Example:
    side = round(pictures.image_tokens**0.5)
    noisy, clean, noise = torch.randn(3, 2, side * side, 64).to(HALF)
    embeds = torch.randn(2, pictures.text_tokens, 12).to(HALF)
    pooled = torch.randn(2, 10).to(HALF) if tiny.name == "flux" else None
    times = torch.tensor([0.2, 0.9]).to(HALF)
    return Example(Inputs(noisy, times, embeds, None, (side, side), pooled), clean, noise)


def pairs(tiny: Tiny, blocks: int, **variant: object) -> Plan:
    made = tuple(
        BlockPlan(span=(i, i + 1), **variant if i else {})  # type: ignore[arg-type]
        for i in range(0, blocks, 2)
    )
    return Plan(family=tiny.name, teacher_blocks=blocks, blocks=made)


def run_of(tiny: Tiny, plan: Plan, step: StepConfig, pictures: Pictures) -> Run:
    return Run(tiny.config, plan, step, pictures, workers=1, shard_teacher=False, tflops=1.0)


@pytest.mark.parametrize("phase", [SPAN, VELOCITY], ids=["span", "velocity"])
@pytest.mark.parametrize(
    "step",
    [PLAIN, StepConfig(micro_batch=1), StepConfig(checkpointing=True)],
    ids=["plain", "micro-batches", "checkpointing"],
)
@pytest.mark.parametrize(
    ("tiny", "blocks", "pictures", "variant"),
    [
        (sized(QWEN_IMAGE, 4, 4), 4, Pictures(1024, 32), {}),
        (sized(QWEN_IMAGE, 8, 8), 8, Pictures(256, 128), {}),
        (sized(QWEN_IMAGE, 4, 8), 8, Pictures(256, 32), {"text": "projected"}),
        (sized(QWEN_IMAGE, 4, 8), 8, Pictures(256, 32), {"ffn": "linear"}),
        (sized(QWEN_IMAGE, 4, 8), 8, Pictures(256, 32), {"text": "shared", "ffn": 0.5}),
        (sized(FLUX, 4, 8), 8, Pictures(576, 64), {}),
    ],
    ids=["many tokens", "deep", "projected", "linear", "shared", "flux"],
)
def test_activations_take_what_the_formula_says(
    tiny: Tiny,
    blocks: int,
    pictures: Pictures,
    variant: dict[str, object],
    step: StepConfig,
    phase: Phase,
) -> None:
    """Within a sixth, of all that a pass holds beside weights and gradients."""
    plan = pairs(tiny, blocks, **variant)
    student = Distilled(tiny.family, model(tiny, plan), plan, step)
    teacher = Observed(tiny.family, model(tiny, identity_plan(tiny.name, blocks)))
    set_trainable(student, phase)
    example = batch(tiny, pictures)
    backward(student, teacher, example, phase, lambda value: value)  # makes the gradients
    with PeakMemory() as memory:
        backward(student, teacher, example, phase, lambda value: value)
    expected = activations(run_of(tiny, plan, step, pictures), phase)
    assert expected == pytest.approx(memory.peak, rel=1 / 6)


def few_latents(tiny: Tiny, pictures: Pictures) -> Latents:
    side, count = round(pictures.image_tokens**0.5), 8
    shard = Shard(
        torch.randn(count, 16, 2 * side, 2 * side).to(HALF),
        torch.randn(count, pictures.text_tokens, 12).to(HALF),
        torch.ones(count, pictures.text_tokens, dtype=torch.bool),
        tuple(map(str, range(count))),
        torch.randn(count, 10).to(HALF) if tiny.name == "flux" else None,
    )
    return Latents([shard], held_out=1)


def replacements(*spans: tuple[int, int], **variant: object) -> list[BlockPlan]:
    return [BlockPlan(span=span, start="library", **variant) for span in spans]  # type: ignore[arg-type]


SINGLE = [(i, i) for i in range(1, 7)]
PAIRS = [(i, i + 1) for i in range(6)]


@pytest.mark.parametrize("micro_batch", [None, 1], ids=["whole", "micro-batches"])
@pytest.mark.parametrize(
    ("tiny", "pictures", "group"),
    [
        (sized(QWEN_IMAGE, 4, 4), Pictures(1024, 32), replacements((0, 1))),
        (sized(QWEN_IMAGE, 8, 8), Pictures(256, 128), replacements(*PAIRS)),
        (sized(QWEN_IMAGE, 4, 8), Pictures(256, 32), replacements(*SINGLE, ffn="linear")),
        (sized(QWEN_IMAGE, 4, 8), Pictures(256, 32), replacements(*SINGLE, text="projected")),
        (sized(QWEN_IMAGE, 4, 8), Pictures(256, 32), replacements(*PAIRS, text="shared", ffn=0.5)),
        (sized(FLUX, 4, 8), Pictures(576, 64), replacements((0, 1), (4, 6))),
    ],
    ids=["one", "many", "linear", "projected", "shared", "flux"],
)
def test_a_librarys_worker_takes_what_the_formula_says(
    tiny: Tiny, pictures: Pictures, group: list[BlockPlan], micro_batch: int | None
) -> None:
    """Within a sixth, of all that it holds beside the teacher."""
    blocks = int(tiny.config["num_layers"]) + int(tiny.config.get("num_single_layers", 0))
    teacher = model(tiny, identity_plan(tiny.name, blocks)).requires_grad_(False)
    config = TrainingConfig(steps=2, batch_size=4, warmup=1, fit_batches=1)
    latents = few_latents(tiny, pictures)
    with PeakMemory() as memory:
        train_replacements(teacher, tiny.family, group, latents, config, 0, micro_batch=micro_batch)
    found = library_memory(tiny.family, tiny.config, group, 4, micro_batch, pictures)
    assert sum(found.values()) - found["teacher"] == pytest.approx(memory.peak, rel=1 / 6)
    assert found["teacher"] == sum(p.nbytes for p in teacher.parameters())


@pytest.mark.parametrize("phase", [SPAN, VELOCITY], ids=["span", "velocity"])
def test_weights_gradients_and_moments_take_what_the_formula_says(phase: Phase) -> None:
    tiny, pictures, step = QWEN_IMAGE, Pictures(16, 4), StepConfig(average=0.9)
    plan = tiny.cut
    student = Distilled(tiny.family, tiny.model(plan), plan, step)
    teacher = Observed(tiny.family, tiny.model())
    set_trainable(student, phase)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", trained, 1e-3)
    example = batch(tiny, pictures)
    inputs = replace(
        example.inputs,
        noisy_BNC=example.inputs.noisy_BNC.float(), embeds_BMD=example.inputs.embeds_BMD.float(),
    )  # fmt: skip
    backward(student, teacher, replace(example, inputs=inputs), phase, lambda value: value)
    optimizer.step()
    student.follow(1)
    found = held_memory(run_of(tiny, plan, step, pictures), phase)
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    kinds = ("exp_avg", "exp_avg_sq")
    moments = sum(state[k].nbytes for state in optimizer.state.values() for k in kinds)
    assert student.average is not None
    assert found["weights"] == sum(p.nbytes for p in student.parameters())
    assert found["average"] == sum(tensor.nbytes for tensor in student.average.values())
    assert found["gradients"] == sum(p.nbytes for p in trained)
    # The last block's text leads nowhere, so a few of its weights have no gradient.
    assert 0.8 * found["gradients"] < gradients <= found["gradients"]
    assert moments == 2 * gradients
    (saved,) = estimate(run_of(tiny, plan, step, pictures), Schedule(phases=(phase,)))
    tensors = sum(tensor.nbytes for tensor in held_tensors(student, optimizer).values())
    assert 0 <= saved.checkpoint - tensors < 0.1 * tensors
    assert found["moments"] == 2 * found["gradients"]
    assert found["teacher"] == sum(p.nbytes for p in teacher.parameters()) / 2  # in half precision


@pytest.mark.parametrize("tiny", [QWEN_IMAGE, FLUX], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("text", ["dual", "shared", "projected"])
@pytest.mark.parametrize("ffn", [1.0, 0.5, "linear"])
def test_work_is_what_torch_counts(tiny: Tiny, text: str, ffn: float | str) -> None:
    block = BlockPlan(span=(1, 1), text=text, ffn=ffn)  # type: ignore[arg-type]
    tiny, pictures = sized(tiny, 4, 6), Pictures(256, 16)
    others = [BlockPlan(span=(i, i)) for i in range(6)]
    plan = Plan(family=tiny.name, teacher_blocks=6, blocks=(others[0], block, *others[2:]))
    whole, example = model(tiny, plan), batch(tiny, pictures)
    with torch.no_grad():
        state, context = tiny.family.begin(whole, example.inputs)
        blocks = tiny.family.block_modules(whole)
        state = tiny.family.run_block(blocks[0], state, context)
        # The counter does not know a CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tiny.family.run_block(blocks[1], state, context)
    expected = 2 * block_flops(tiny.family, tiny.config, block, pictures)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_reused_answers_save_passes_of_the_teacher() -> None:
    run = run_of(QWEN_IMAGE, identity_plan(QWEN_IMAGE.name, 6), PLAIN, Pictures(16, 4))
    once, twice = VELOCITY, VELOCITY.model_copy(update={"reuse": 2})
    # Of a student like its teacher a step is one pass of the teacher, three of its own.
    assert step_flops(run, twice) == pytest.approx(step_flops(run, once) * 3.5 / 4)


def test_more_gpus_take_less_each_and_less_time() -> None:
    plan = QWEN_IMAGE.merged((0, 1), (2, 3), (4, 5))
    schedule = Schedule(phases=(SPAN.model_copy(update={"batch_size": 32}), VELOCITY))
    runs = [
        replace(
            run_of(QWEN_IMAGE, plan, PLAIN, Pictures(16, 4)), workers=workers, shard_teacher=True
        )
        for workers in (1, 8)
    ]
    for alone, shared in zip(*(estimate(run, schedule) for run in runs), strict=True):
        assert shared.seconds == pytest.approx(alone.seconds / 8)
        for part in ("weights", "gradients", "moments", "teacher"):
            assert shared.memory[part] == pytest.approx(alone.memory[part] / 8, rel=0.01)
