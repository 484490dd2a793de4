"""Training a miniature on a sample of a large picture's tokens (examples/default_size.py)."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from examples.default_size import (
    GRID,
    REACH,
    TILE,
    TOKENS,
    Scenes,
    alike,
    middle,
    one_of_every,
    only_tokens,
    sample_tokens,
    things,
)
from trainers.tasks.shapes.grammar import COLOURS, SHAPES, parse

TEXT = 5
Run = Callable[[Tensor], Tensor]


@pytest.fixture
def transformer() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return model.requires_grad_(False)


@pytest.fixture
def run(transformer: QwenImageTransformer2DModel) -> Run:
    text = 10 * torch.randn(1, TEXT, 16)

    def velocity(tokens_BND: Tensor) -> Tensor:
        out: Tensor = transformer(
            hidden_states=tokens_BND,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=torch.tensor([[True] * (TEXT - 1) + [False]]),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, GRID, GRID)]],
            return_dict=False,
        )[0]
        return out

    return velocity


def picture() -> Tensor:
    """One token everywhere: what any query gathers is the same over a sample as over all."""
    return torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).expand(1, GRID**2, 64)


def test_all_tokens_are_the_plain_pass(transformer: QwenImageTransformer2DModel, run: Run) -> None:
    tokens_BND = torch.randn(1, GRID**2, 64)
    plain = run(tokens_BND)
    with only_tokens(transformer, torch.arange(GRID**2), torch.ones(GRID**2)):
        sampled = run(tokens_BND)
    torch.testing.assert_close(sampled, plain)


def test_a_sample_has_one_token_of_every_cell() -> None:
    cells = one_of_every(4, torch.Generator().manual_seed(2))
    rows, columns = cells // GRID, cells % GRID
    assert (rows // 4 == torch.arange(GRID // 4).view(-1, 1)).all()
    assert (columns // 4 == torch.arange(GRID // 4)).all()
    assert set((rows % 4).flatten().tolist()) == {0, 1, 2, 3}
    assert set((columns % 4).flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("places", [["centre"], ["top left", "bottom right"]])
def test_a_sample_is_finer_where_shapes_lie(places: list[str]) -> None:
    seen, weights = sample_tokens(places, 2, torch.Generator().manual_seed(2))
    fine = torch.zeros(GRID, GRID, dtype=torch.bool)
    for row, column in map(middle, places):
        fine[row - REACH : row + REACH, column - REACH : column + REACH] = True
    assert len(set(seen.tolist())) == len(seen)
    assert torch.equal(weights == 4, fine.flatten()[seen])
    assert weights.sum() == GRID**2


@pytest.mark.parametrize("cell", [4, 2, 1])
def test_a_sample_stands_for_the_whole_picture(
    transformer: QwenImageTransformer2DModel, run: Run, cell: int
) -> None:
    """Unweighted, text would be a fourteenth of what a query gathers, and not an 800th."""
    whole = run(picture())
    seen, weights = sample_tokens(["centre"], cell, torch.Generator().manual_seed(2))
    with only_tokens(transformer, seen, weights):
        sampled = run(picture()[:, seen])
    assert (sampled - whole[:, seen]).abs().max() < 0.005 * whole.std()


def test_pictures_of_a_batch_have_shapes_at_the_same_places() -> None:
    batches = alike(4, torch.Generator().manual_seed(2), random.Random(2))
    for wanted, seen, _ in islice(batches, 20):
        assert len({frozenset(place for _, _, place in things(w)) for w in wanted}) == 1
        assert (len(wanted) - 1) * len(seen) < TOKENS <= len(wanted) * len(seen)


def test_afterwards_the_transformer_is_as_before(
    transformer: QwenImageTransformer2DModel, run: Run
) -> None:
    before = run(picture())
    with only_tokens(transformer, torch.arange(16), torch.ones(16)):
        run(picture()[:, :16])
    torch.testing.assert_close(run(picture()), before, atol=0, rtol=0)


def test_a_scene_shows_each_thing_at_its_place(tmp_path: Path) -> None:
    names = list(product(SHAPES, COLOURS))
    marked = torch.arange(1.0, 1 + len(names)).view(-1, 1, 1, 1).expand(-1, TILE, TILE, 64)
    stored = {"shapes": marked.contiguous(), "empty": torch.zeros(TILE, TILE, 64)}
    save_file(stored, tmp_path / "tiles.safetensors")
    scenes = Scenes(None, tmp_path / "tiles.safetensors")

    def seen(caption: str, row: int, column: int) -> tuple[str, str] | None:
        mark = int(scenes.latents(parse(caption)).view(GRID, GRID, 64)[row, column, 0])
        return names[mark - 1] if mark else None

    side = GRID // 4
    caption = "a red circle above a blue square"
    column = side if seen(caption, side, side) else 3 * side
    assert seen(caption, side, column) == ("circle", "red")
    assert seen(caption, 3 * side, column) == ("square", "blue")
    assert seen(caption, side, GRID - column) is None
    assert seen("a cross in the centre", 2 * side, 2 * side) == ("cross", "cyan")
    assert seen(caption, 0, 0) is None
