"""A training of the examples that was cut off goes on as if it had not been."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline
from torch import nn

from examples.unfinished import EVERY, Unfinished, save


def train(folder: Path, steps: int, until: int | None = None) -> tuple[nn.Module, nn.Module]:
    """A linear map towards noise, and the average of its weights; cut off before step `until`."""
    torch.manual_seed(0)
    trained = nn.Linear(3, 3)
    average = copy.deepcopy(trained).requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    unfinished = Unfinished(folder, [trained, average, optimizer], generator, steps)
    for step in range(unfinished.resume(), until or steps):
        x_BD, y_BD = torch.randn(2, 4, 3, generator=generator)
        optimizer.zero_grad()
        (trained(x_BD) - y_BD).square().mean().backward()
        optimizer.step()
        for kept, new in zip(average.parameters(), trained.parameters(), strict=True):
            kept.lerp_(new.detach(), 0.1)
        unfinished.keep(step + 1)
    return trained, average


def assert_same(one: tuple[nn.Module, nn.Module], other: tuple[nn.Module, nn.Module]) -> None:
    for expected, found in zip(one, other, strict=True):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, found.state_dict()[name]), name


def test_a_training_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    steps = 2 * EVERY + 5
    whole = train(tmp_path / "whole", steps)
    train(tmp_path / "cut", steps, until=EVERY + 7)  # seven of its steps are done again
    assert_same(whole, train(tmp_path / "cut", steps))


@pytest.mark.parametrize("other", [EVERY, 2 * EVERY + 7])
def test_a_training_of_another_length_begins_anew(other: int, tmp_path: Path) -> None:
    train(tmp_path / "model", 2 * EVERY + 5)
    assert_same(train(tmp_path / "new", other), train(tmp_path / "model", other))


def test_what_was_saved_leaves_nothing_to_go_on_from(tmp_path: Path, tiny_pipeline: Path) -> None:
    first = train(tmp_path / "model", EVERY)
    save(QwenImagePipeline.from_pretrained(tiny_pipeline), tmp_path / "model")
    assert (tmp_path / "model" / "model_index.json").exists()
    assert not (tmp_path / "model.pt").exists()
    assert_same(first, train(tmp_path / "model", EVERY))
