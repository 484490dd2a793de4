from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.flow import grid_timesteps, noised, pack, sample_timesteps, shifted, velocity_target


def test_the_path_runs_from_data_to_noise_at_the_target_velocity():
    clean, noise = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    assert torch.equal(noised(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(noised(clean, noise, torch.ones(3)), noise)
    t, later = torch.tensor([0.1, 0.4, 0.5]), torch.tensor([0.2, 0.5, 0.6])
    moved = noised(clean, noise, later) - noised(clean, noise, t)
    torch.testing.assert_close(moved, 0.1 * velocity_target(clean, noise), atol=1e-5, rtol=1e-4)


def test_packing_is_the_pipelines():
    from diffusers import QwenImagePipeline

    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(pack(latents), QwenImagePipeline._pack_latents(latents, 2, 16, 8, 12))


@given(count=st.integers(1, 64), seed=st.integers(0, 100))
def test_every_stratum_gets_one_time(count: int, seed: int):
    t = sample_timesteps(count, torch.Generator().manual_seed(seed))
    assert (t * count).long().clamp(max=count - 1).sort().values.tolist() == list(range(count))


def test_shift_is_the_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unshifted = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(shifted(unshifted.sigmas, 3.0), scheduler.sigmas)


def test_the_grid_is_even_and_inside():
    assert grid_timesteps(4).tolist() == [0.125, 0.375, 0.625, 0.875]
