"""A training of the examples that was cut off goes on as if it had not been."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from examples.unfinished import EVERY, Unfinished


def train(file: Path, steps: int) -> tuple[nn.Module, nn.Module]:
    """A linear map towards noise, and the average of its weights."""
    torch.manual_seed(0)
    trained = nn.Linear(3, 3)
    average = copy.deepcopy(trained).requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    unfinished = Unfinished(file, [trained, average, optimizer], generator)
    for step in range(unfinished.resume(), steps):
        x_BD, y_BD = torch.randn(2, 4, 3, generator=generator)
        optimizer.zero_grad()
        (trained(x_BD) - y_BD).square().mean().backward()
        optimizer.step()
        for kept, new in zip(average.parameters(), trained.parameters(), strict=True):
            kept.lerp_(new.detach(), 0.1)
        unfinished.keep(step + 1)
    return trained, average


def test_a_training_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    steps = 2 * EVERY + 5
    whole = train(tmp_path / "whole.pt", steps)
    train(tmp_path / "cut.pt", EVERY + 7)  # seven of its steps are done again
    resumed = train(tmp_path / "cut.pt", steps)
    for expected, found in zip(whole, resumed, strict=True):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, found.state_dict()[name]), name
