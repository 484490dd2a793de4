from __future__ import annotations

from pathlib import Path

import torch

from trainers.data.single_frame import for_single_frames


@torch.no_grad()
def test_one_frame_encodes_and_decodes_to_the_same_sums(tiny_pipeline: Path):
    from diffusers import AutoencoderKLQwenImage

    stock = AutoencoderKLQwenImage.from_pretrained(tiny_pipeline, subfolder="vae").eval()
    ours = AutoencoderKLQwenImage.from_pretrained(tiny_pipeline, subfolder="vae").eval()
    for_single_frames(ours)
    picture = torch.rand(2, 3, 1, 64, 64) * 2 - 1
    latents = stock.encode(picture).latent_dist.mode()
    torch.testing.assert_close(ours.encode(picture).latent_dist.mode(), latents)
    torch.testing.assert_close(ours.decode(latents).sample, stock.decode(latents).sample)
    assert ours.state_dict().keys() == stock.state_dict().keys()


@torch.no_grad()
def test_several_frames_still_take_the_long_way(tiny_pipeline: Path):
    from diffusers import AutoencoderKLQwenImage

    stock = AutoencoderKLQwenImage.from_pretrained(tiny_pipeline, subfolder="vae").eval()
    film = torch.rand(1, 3, 5, 16, 16)
    expected = stock.encode(film).latent_dist.mode()
    for_single_frames(stock)
    torch.testing.assert_close(stock.encode(film).latent_dist.mode(), expected)
