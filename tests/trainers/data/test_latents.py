from __future__ import annotations

from itertools import count, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainers.small import small_latents
from trainers.data.latents import LatentBatch, training_inputs
from trainers.data.sources import DataError


def same(a: LatentBatch, b: LatentBatch) -> bool:
    return torch.equal(a.clean_BNC, b.clean_BNC) and torch.equal(a.embeds_BMD, b.embeds_BMD)


@given(start=st.integers(0, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 50))
def test_a_batch_depends_on_seed_and_step_alone(start: int, batch_size: int, seed: int):
    latents = small_latents()
    straight = next(islice(latents.batches(seed, batch_size), start, None))
    resumed = next(latents.batches(seed, batch_size, numbers=count(start)))
    assert straight.step == resumed.step == start
    assert same(straight, resumed)
    (inputs, noise), (inputs_again, noise_again) = (
        training_inputs(batch, seed) for batch in (straight, resumed)
    )
    assert torch.equal(noise, noise_again)
    assert torch.equal(inputs.timestep_B, inputs_again.timestep_B)


def test_another_seed_or_step_gives_other_pictures_times_and_noise():
    latents = small_latents()
    first, second = islice(latents.batches(0, 8), 2)
    other = next(latents.batches(1, 8))
    assert not same(first, second)
    assert not same(first, other)
    assert not torch.equal(training_inputs(first, 0)[1], training_inputs(second, 0)[1])
    assert not torch.equal(training_inputs(first, 0)[1], training_inputs(first, 1)[1])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_step_of_one_process(world):
    latents = small_latents()
    whole = next(latents.batches(3, 8, numbers=[5]))
    inputs, noise = training_inputs(whole, 3)
    shares = [next(latents.batches(3, 8, rank, world, numbers=[5])) for rank in range(world)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert torch.equal(torch.cat([s.clean_BNC for s in shares]), whole.clean_BNC)
    shared = [training_inputs(s, 3) for s in shares]
    assert torch.equal(torch.cat([n for _, n in shared]), noise)
    assert torch.equal(torch.cat([i.noisy_BNC for i, _ in shared]), inputs.noisy_BNC)


def test_an_epoch_shows_every_training_picture_once_and_no_held_out_one():
    latents = small_latents(pictures=20, held_out=4)
    everything = latents.batch(range(20)).clean_BNC
    seen = torch.cat([batch.clean_BNC for batch in islice(latents.batches(0, 4), 4)])
    counts = [(everything[i] == seen).flatten(1).all(1).sum().item() for i in range(20)]
    assert [i for i, count in enumerate(counts) if count == 0] == list(latents.held_out)
    assert set(counts) == {0, 1}


def test_text_is_padded_to_the_longest_of_the_batch_and_masked():
    latents = small_latents()
    batch = latents.batch(range(20))
    assert batch.mask_BM is not None
    lengths = batch.mask_BM.sum(1)
    assert batch.embeds_BMD.shape[1] == lengths.max()
    assert (batch.embeds_BMD[~batch.mask_BM] == 0).all()
    assert latents.batch([0]).mask_BM is None
    assert latents.captions([0, 19]) == ["picture 0", "picture 19"]


def test_what_cannot_be_shared_or_held_out_is_refused():
    with pytest.raises(DataError, match="at least 3"):
        next(small_latents().batches(0, 2, 0, 3))
    with pytest.raises(DataError, match="held_out"):
        small_latents(pictures=4, held_out=4)
