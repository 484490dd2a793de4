"""The benchmark of training, on sizes that a CPU takes in a second."""

from __future__ import annotations

import gc
import json
import weakref
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import raytrain, train
from trainers.estimate import Gpu, Pictures
from trainers.schedule import StepConfig
from trainers.students.counts import plan_parameters
from trainers.students.plan import identity_plan

CPU = torch.device("cpu")
TINY = {**train.SMALL, "attention_head_dim": 8, "axes_dims_rope": [4, 2, 2]}


def test_memory_of_span_phases_is_flat() -> None:
    few, many = train.memory_rows(TINY, (4, 8), side=8)
    assert few["span_mib"] == many["span_mib"] > 0
    assert few["velocity_mib"] < many["velocity_mib"]


@pytest.mark.parametrize("loss", ["span", "velocity"])
def test_a_phase_is_measured_on_one_device(loss: str) -> None:
    phase = next(phase for phase in train.phases(batch=2) if phase.loss == loss)
    step, gpu = StepConfig(micro_batch=1, checkpointing=True), Gpu(1.0, 0.5)
    row = train.step_row(TINY, 4, phase, step, Pictures(16, 4), CPU, gpu, repeats=1)
    assert (row["teacher_blocks"], row["student_blocks"]) == (4, 2)
    assert row["tokens_per_s"] == pytest.approx(2 * 20 / row["seconds_per_step"], rel=0.02)
    assert row["mfu"] == pytest.approx(row["tflops"] / 0.5, abs=0.1)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_row_is_left_where_the_next_one_has_to_fit(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor of one that ran out of memory in its second step, with gradients and moments there."""
    phase, step = train.phases(batch=2)[0], StepConfig(micro_batch=1)
    train_step, left = train.train_step, [1 if fails else 99]
    seen: list[weakref.ref[Any]] = []

    def failing(
        student: Any, teacher: Any, example: Any, phase: Any, optimizer: Any, mean: Any
    ) -> float:
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        weights = [*student.parameters(), *teacher.parameters()]
        held = [student, teacher, optimizer, example.clean_BNC, *weights, *moments]
        seen.extend(map(weakref.ref, held))
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no room for 2 GiB")
        return train_step(student, teacher, example, phase, optimizer, mean)

    monkeypatch.setattr(train, "train_step", failing)
    measure = partial(train.step_row, TINY, 4, phase, step, Pictures(16, 4), CPU, None, 1)
    gc.disable()  # only what the benchmark itself collects
    try:
        row = train.attempted({"part": "gpu"}, measure, CPU)
        assert [type(found()).__name__ for found in seen if found() is not None] == []
    finally:
        gc.enable()
    assert len(seen) > 100
    assert row.get("failed") == ("OutOfMemoryError: no room for 2 GiB" if fails else None)


def test_a_row_that_fails_leaves_the_others_and_shows_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"gone": (TINY, identity_plan("flux", 12)), "half": (TINY, train.halved(12))}
    rows = train.latency_rows(models, (64,), CPU, text_tokens=4)
    monkeypatch.setattr(train, "gpu_rows", lambda: rows)
    monkeypatch.setattr("sys.argv", ["train", "--only", "gpu"])
    with pytest.raises(SystemExit, match="1"):
        train.main()
    gone, half = map(json.loads, capsys.readouterr().out.splitlines())
    assert gone.keys() == {"part", "model", "resolution", "failed"}
    assert half["ms"] > 0


def test_as_many_blocks_as_fit() -> None:
    phase, step, pictures = train.phases(batch=1)[0], StepConfig(), Pictures(16, 4)
    few, more = (train.fitting(TINY, phase, step, pictures, most) for most in (2**22, 2**23))
    assert 2 <= few < more <= TINY["num_layers"]


def test_latency_has_a_row_a_model_and_resolution() -> None:
    models = {"teacher": (TINY, identity_plan("qwen_image", 12)), "half": (TINY, train.halved(12))}
    rows = list(train.latency_rows(models, (64, 128), CPU, text_tokens=4))
    assert [(row["model"], row["resolution"]) for row in rows] == [
        ("teacher", 64), ("teacher", 128), ("half", 64), ("half", 128)
    ]  # fmt: skip
    assert all(row["ms"] > 0 for row in rows)


def test_the_papers_shapes_have_their_sizes() -> None:
    sizes = {name: plan_parameters(plan, config) for name, (config, plan) in train.shapes().items()}
    assert sizes["teacher"] == 20_430_401_088
    assert sizes["PPCL-10B"] == 10_575_332_416
    assert sizes["Amber-6B"] == 6_837_149_248
    assert sizes["PPCL-10B"] > sizes["Amber-10B"] > sizes["Amber-6B"]


def test_a_step_that_a_pause_cuts_in_two_counts_in_both_turns_by_its_parts() -> None:
    # The third step begins half a second before the pause, and ends as long after it.
    ends = [10.0, 10.5, 11.5, 20.5, 21.5, 22.0]
    assert raytrain.steps_by_turn(ends, [(10.0, 12.0), (20.0, 22.0)]) == pytest.approx([2.5, 2.5])


def test_without_a_gpu_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(train.gpu_rows()) == [{"part": "gpu", "skipped": "no CUDA GPU here"}]
