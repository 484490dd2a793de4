"""The sums of the analysis: of parts they are those of the whole, and their solutions are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from search.redundancy import wanted_maps
from search.space import candidates
from search.statistics import STREAMS, Statistics, cosine_influence, gather, memory
from tests.trainers.small import load_transformer, padded, same_sums, small_latents
from trainers.data.latents import generator_at, make_inputs
from trainers.students.families import FAMILIES
from trainers.students.families.base import Inputs
from trainers.students.fits import MapSums, least_squares, solve_maps, trained_probe

FAMILY = FAMILIES["qwen_image"]
OFFERED = candidates(6, 3, (1.0, "linear"), ("dual", "projected"))
TOKENS = 12


@pytest.fixture(scope="module")
def teacher(tiny_pipeline: Path) -> nn.Module:
    return load_transformer(tiny_pipeline)


@pytest.fixture(scope="module")
def batches() -> list[Inputs]:
    latents = small_latents()
    made = []
    for index in range(4):
        batch = latents.batch(latents.training[2 * index : 2 * index + 2])
        generator = generator_at(0, index, "test")
        noise = torch.randn(batch.clean_BNC.shape, generator=generator)
        made.append(make_inputs(batch, torch.rand(2, generator=generator), noise))
    return made


def gathered(teacher: nn.Module, batches: list[Inputs], numbers: range) -> Statistics:
    wanted = wanted_maps(FAMILY, dict(teacher.config), OFFERED)
    total = Statistics()
    for number in numbers:
        gather(total, teacher, FAMILY, batches[number], number, wanted, TOKENS, seed=3)
    return total


def test_four_parts_give_what_one_whole_gives(teacher: nn.Module, batches: list[Inputs]) -> None:
    whole = gathered(teacher, batches, range(4))
    parts = [gathered(teacher, batches, range(n, n + 1)) for n in (2, 0, 3, 1)]
    total = Statistics()
    for part in parts:
        total.add(part)
    assert total.maps.keys() == whole.maps.keys()
    for key, sums in whole.probes.items():
        torch.testing.assert_close(
            total.probes[key].probe().weight, sums.probe().weight, rtol=1e-6, atol=1e-6
        )
    fits, others = solve_maps(whole.maps).fits, solve_maps(total.maps).fits
    for i, tensors in fits.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(others[i][name], tensor, rtol=1e-6, atol=1e-6)
    for stream in STREAMS:
        for ours, theirs in zip(total.samples(stream), whole.samples(stream), strict=True):
            assert torch.equal(ours, theirs)


def test_padding_is_neither_summed_up_nor_sampled(
    teacher: nn.Module, batches: list[Inputs]
) -> None:
    bare = gathered(teacher, batches, range(4))
    found = gathered(teacher, [padded(batch) for batch in batches], range(4))
    same_sums(found.maps, bare.maps)
    same_sums(found.probes, bare.probes)
    for stream in STREAMS:
        for ours, theirs in zip(found.samples(stream), bare.samples(stream), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_everything_comes_from_one_pass_of_the_teacher(
    teacher: nn.Module, batches: list[Inputs]
) -> None:
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    hook = FAMILY.block_modules(teacher)[5].register_forward_hook(count)
    try:
        gathered(teacher, batches, range(4))
    finally:
        hook.remove()
    assert passes == 4


def test_the_real_teachers_statistics_stay_under_40_gib() -> None:
    config = FAMILY.published
    depth = wanted_maps(FAMILY, config, candidates(60, 10, (1.0, 0.5)))
    assert 30e9 < memory(config, FAMILY, depth, tokens=1024) < 40 * 2**30


def test_memory_counts_what_is_held(teacher: nn.Module, batches: list[Inputs]) -> None:
    config = dict(teacher.config)
    wanted = wanted_maps(FAMILY, config, OFFERED)
    held = gathered(teacher, batches, range(4))
    sums = [*held.maps.values(), *held.probes.values()]
    matrices = sum(t.numel() * t.element_size() for s in sums for t in (s.gram_DD, s.cross_DD))
    samples = [t for stream in STREAMS for t in held.samples(stream)]
    states = sum(tensor.numel() * tensor.element_size() for tensor in samples)
    tokens = len(held.samples("image")[0])
    # Short captions have fewer tokens than are asked for, which the estimate does not know.
    missing = tokens - len(held.samples("text")[0])
    unknown = (FAMILY.blocks(config) + 1) * missing * FAMILY.width(config) * 4
    assert memory(config, FAMILY, wanted, tokens) == matrices + states + unknown


def test_least_squares_is_that_of_the_full_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=generator), torch.randn(200, 4, generator=generator)
    found = least_squares(x.T @ x, x.T @ y)
    assert not found.ridged
    torch.testing.assert_close(found.weight, torch.linalg.lstsq(x, y).solution)
    ones = torch.cat([x, torch.ones(200, 1)], dim=1)
    expected = torch.linalg.lstsq(ones, y).solution
    sums = MapSums.of(x, y)
    weight, bias, ridged = sums.solved()
    assert not ridged
    torch.testing.assert_close(weight, expected[:-1].T)
    torch.testing.assert_close(bias, expected[-1])
    left = y - ones @ expected
    relative = left.square().sum() / (y - y.mean(0)).square().sum()
    assert sums.error() == pytest.approx(float(relative), rel=1e-4)


def test_the_probe_of_least_squares_has_no_gradient_left_to_train_on() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(300, 5, generator=generator), torch.randn(300, 5, generator=generator)
    weight = least_squares(x.T @ x, x.T @ y).weight.requires_grad_()
    (x @ weight - y).square().mean().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-6


def test_training_a_probe_lowers_its_error_and_leaves_the_best_one_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(300, 5, generator=generator), torch.randn(300, 5, generator=generator)
    sums = MapSums.of(x, y)

    def error(weight: torch.Tensor) -> float:
        return float((x @ weight - y).square().mean())

    start = torch.zeros(5, 5)
    errors = [error(trained_probe(start, sums, steps)) for steps in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4
    best = sums.probe().weight
    torch.testing.assert_close(trained_probe(best, sums, 3), best, rtol=1e-4, atol=1e-5)
    few = MapSums.of(x[:3], y[:3])
    assert few.probe().ridged
    ridged = few.probe().weight
    trained = trained_probe(ridged, few, 4)
    assert (x[:3] @ trained - y[:3]).norm() <= (x[:3] @ ridged - y[:3]).norm()


def test_a_singular_system_is_ridged_and_says_so() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    found = least_squares(x.T @ x, x.T @ x)
    assert found.ridged
    assert torch.isfinite(found.weight).all()
    torch.testing.assert_close(x @ found.weight, x, atol=1e-2, rtol=1e-2)
    assert least_squares(torch.zeros(4, 4), torch.zeros(4, 4)).ridged


def test_influence_is_how_far_tokens_turn() -> None:
    states = [torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])]
    torch.testing.assert_close(cosine_influence(states), torch.tensor([0.0, 1.0]))
