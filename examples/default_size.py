"""Teaches the miniature the size that the stock pipeline asks for when it is given none.

`pipeline(prompt=…)` asks any Qwen-Image for 1024 × 1024 pixels, 4,096 tokens. A step on so many
takes seconds on a CPU. So at this size every caption has one picture, always the same: what a token
shows then follows from the caption and its position, and can be learned from a sample of the
tokens, one of every small cell where the picture's shapes lie and one of every larger cell
elsewhere. (Where places varied, tokens had to agree on them, which a sample does not teach:
pictures came out as coloured specks.) A sampled token's attention logit is raised by the log of how
many it stands for, so that what a query gathers from the sample stands for what it gathers from the
whole picture. Scenes are put together in latent space from encoded shapes. The text encoder rests,
and every step also repeats the size learnt first.
"""

from __future__ import annotations

import copy
import random
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.unfinished import Unfinished
from trainers.data.single_frame import for_single_frames
from trainers.tasks.shapes.draw import BACKGROUND, CENTRES, RADIUS, coverage
from trainers.tasks.shapes.grammar import (
    COLOURS,
    SHAPES,
    Request,
    compose,
    sample_training_request,
)

SIZE = 1024
GRID = SIZE // 16
"""Tokens a side."""
SCALE = SIZE / 64
"""Of lengths that trainers/tasks/shapes/draw.py gives for pictures of 64 pixels."""
TILE = 26
"""Tokens a side of an encoded shape: the shape and a margin."""
SHIFT = 20.0
"""Of training's noise and of the sampler's at this size; more tokens drown in more noise."""
REACH = TILE // 2 - 1
"""Tokens from a shape's middle to the end of what is shown of its tile: the tile's own border is
left out, which the autoencoder marks."""
FAR = 4
"""Tokens a side of the cells outside the tiles, of each of which one is seen."""
TOKENS = 4096
"""Seen in a step, over all of its pictures."""
SMALL_BATCH = 32


@dataclass(frozen=True)
class Course:
    """So many steps, each on one token of every cell of some pictures."""

    steps: int
    cell: int
    """Tokens a side of the cells inside the tiles; a divisor of FAR."""
    rate: float


COURSES = (
    Course(steps=700, cell=4, rate=1e-3),
    Course(steps=1800, cell=4, rate=2e-3),
    Course(steps=2000, cell=2, rate=2e-3),
)


def teach_default_size(
    pipeline: QwenImagePipeline,
    work: Path,
    small_latents: Tensor,
    small_captions: list[str],
    small_shift: float,
    course: Course,
) -> None:
    """Trains the pipeline's transformer at both sizes and leaves the average of its weights in it.

    `small_latents` [pictures, 16, 64] and their captions are those of the first training. Encoded
    shapes and the course's state are kept in `work`.
    """
    scenes = Scenes(pipeline, work / "tiles.safetensors")
    transformer = pipeline.transformer.requires_grad_(True)
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizers = make_optimizers(transformer, course.rate)
    generator = torch.Generator().manual_seed(5)
    batches = alike(course.cell, torch.Generator().manual_seed(6), random.Random(5))

    def loss(latents_BND: Tensor, captions: list[str], side: int, shift: float) -> Tensor:
        noise_BND = torch.randn(latents_BND.shape, generator=generator)
        u_B = torch.rand(len(captions), generator=generator)
        t_B = shift * u_B / (1 + (shift - 1) * u_B)
        t_B11 = t_B.view(-1, 1, 1)
        velocity_BND = transformer(
            hidden_states=(1 - t_B11) * latents_BND + t_B11 * noise_BND,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=t_B,
            img_shapes=[[(1, side, side)]] * len(captions),
            return_dict=False,
        )[0]
        return F.mse_loss(velocity_BND, noise_BND - latents_BND)

    unfinished = Unfinished(
        work / f"course-{COURSES.index(course)}",
        [transformer, average, *optimizers],
        generator,
        course.steps,
    )
    done = unfinished.resume()
    batches = islice(batches, done, None)
    started, recent = time.monotonic(), [0.0, 0.0]
    for step in range(done, course.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / 20)
                group["lr"] = course.rate * warm * (1 - step / course.steps)
            optimizer.zero_grad()
        chosen = torch.randint(len(small_latents), (SMALL_BATCH,), generator=generator)
        captions = [small_captions[i] for i in chosen.tolist()]
        with torch.no_grad():
            embeds, mask = pipeline.encode_prompt(captions)
        small = loss(small_latents[chosen], captions, 4, small_shift)
        small.backward()

        wanted, seen, weights = next(batches)
        latents_BND = torch.stack([scenes.latents(w) for w in wanted])
        captions = [w.caption for w in wanted]
        with torch.no_grad():
            embeds, mask = pipeline.encode_prompt(captions)
        with only_tokens(transformer, seen, weights):
            large = loss(latents_BND[:, seen], captions, GRID, SHIFT)
            large.backward()

        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            pairs = list(average.parameters()), list(transformer.parameters())
            torch._foreach_lerp_(*pairs, 1 - decay)
        unfinished.keep(step + 1)
        newest = small.item(), large.item()
        recent = [0.95 * r + 0.05 * new for r, new in zip(recent, newest, strict=True)]
        if step % 20 == 19:
            seconds = time.monotonic() - started
            print(
                f"size {step:5d}  loss {recent[0]:.4f} at 64, {recent[1]:.4f} at {SIZE}"
                f"  {seconds:.0f} s",
                flush=True,
            )
    transformer.load_state_dict(average.state_dict())
    transformer.requires_grad_(False)


def make_optimizers(
    transformer: QwenImageTransformer2DModel, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = [p for p in transformer.transformer_blocks.parameters() if p.dim() == 2]
    inside = {id(matrix) for matrix in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in inside]
    return (
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    )


def alike(
    cell: int, generator: torch.Generator, rng: random.Random
) -> Iterator[tuple[list[Request], Tensor, Tensor]]:
    """Batches of requests whose pictures have shapes at the same places, of which the same tokens
    are seen; with these, as `sample_tokens` gives them."""
    waiting = defaultdict[frozenset[str], list[Request]](list)
    while True:
        request = sample_training_request(rng)
        places = frozenset(place for _, _, place in things(request))
        waiting[places].append(request)
        seen, weights = sample_tokens(places, cell, generator)
        if len(waiting[places]) * len(seen) >= TOKENS:
            yield waiting.pop(places), seen, weights


def sample_tokens(
    places: Collection[str], cell: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Positions of one token of every cell, and how many each stands for; cells are `cell` ×
    `cell` around the places and FAR × FAR elsewhere."""
    near = torch.zeros(GRID // FAR, GRID // FAR, dtype=torch.bool)
    for row, column in (middle(place) for place in places):
        rows, columns = ((at - REACH) // FAR for at in (row, column))
        side = -(-2 * REACH // FAR)
        near[rows : rows + side, columns : columns + side] = True
    fine = one_of_every(cell, generator)
    inside = near.repeat_interleave(FAR // cell, 0).repeat_interleave(FAR // cell, 1)
    shapes, rest = fine[inside], one_of_every(FAR, generator)[~near]
    weights = [
        torch.full((len(some),), float(w)) for some, w in ((shapes, cell**2), (rest, FAR**2))
    ]
    return torch.cat([shapes, rest]), torch.cat(weights)


def one_of_every(cell: int, generator: torch.Generator) -> Tensor:
    """The position of a token of every cell of `cell` × `cell`, [GRID / cell, GRID / cell]."""
    cells = GRID // cell
    inside = torch.randint(cell, (2, cells, cells), generator=generator)
    corner = torch.arange(cells) * cell
    return (corner[:, None] + inside[0]) * GRID + corner + inside[1]


@contextmanager
def only_tokens(
    transformer: QwenImageTransformer2DModel, seen: Tensor, weights: Tensor
) -> Iterator[None]:
    """Runs the transformer on a sample of a picture's tokens: at the positions `seen`, each with
    the weight in attention of as many tokens as it stands for; both [tokens]."""
    positions, attend = transformer.pos_embed.forward, F.scaled_dot_product_attention

    def some_positions(*args: object, **named: object) -> tuple[Tensor, Tensor]:
        image, text = positions(*args, **named)
        return image[seen], text

    def weighted(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **named: object
    ) -> Tensor:
        bias_K = torch.zeros(key.shape[-2])
        bias_K[-len(seen) :] = weights.log()
        bias = bias_K.view(1, 1, 1, -1)
        if attn_mask is not None:
            bias = bias.masked_fill(~attn_mask, float("-inf"))
        bias = bias.expand(query.shape[0], 1, 1, -1)
        return attend(query, key, value, attn_mask=bias, **named)

    transformer.pos_embed.forward = some_positions
    F.scaled_dot_product_attention = weighted
    try:
        yield
    finally:
        del transformer.pos_embed.forward
        F.scaled_dot_product_attention = attend


class Scenes:
    """Normalised, packed latents of whole scenes, put together from encoded shapes."""

    def __init__(self, pipeline: QwenImagePipeline, file: Path) -> None:
        self.names = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        if not file.exists():
            empty = np.full((TILE * 16, TILE * 16, 3), BACKGROUND, dtype=np.uint8)
            tiles = torch.cat([encode(pipeline, tile(*name)) for name in self.names])
            save_file({"shapes": tiles, "empty": encode(pipeline, empty)[0].contiguous()}, file)
        stored = load_file(file)
        self.shapes = stored["shapes"]
        self.empty = background(stored["empty"])

    def latents(self, request: Request) -> Tensor:
        """[4096, 64]: the one picture of a request."""
        picture = self.empty.clone()
        for shape, colour, place in things(request):
            rows, columns = (slice(at - REACH, at + REACH) for at in middle(place))
            tile = self.shapes[self.names.index((shape, colour))]
            picture[rows, columns] = tile[1:-1, 1:-1]
        return picture.view(GRID * GRID, -1)


def things(request: Request) -> list[tuple[str, str, str]]:
    """Shape, colour and place of all that is in the one picture of a request."""
    scene = compose(request, random.Random(0))
    return [(thing.shape, thing.colour or "", thing.place or "centre") for thing in scene.things]


def middle(place: str) -> tuple[int, int]:
    """Row and column, in tokens."""
    row, column = CENTRES[place]
    return int(row), int(column)


def tile(shape: str, colour: str) -> np.ndarray:
    """One shape in the middle of the background, [TILE * 16, TILE * 16, 3] uint8."""
    side = TILE * 16
    cover = coverage(shape, side / 2, side / 2, sum(RADIUS) / 2 * SCALE, side)[..., None]
    mixed = np.array(BACKGROUND) * (1 - cover) + cover * np.array(COLOURS[colour])
    return mixed.round().astype(np.uint8)


def background(empty: Tensor) -> Tensor:
    """An empty picture [GRID, GRID, 64] from an empty tile: its border, and its middle repeated."""
    middle = TILE // 2
    ends = torch.full((GRID,), middle)
    ends[0], ends[-1] = 0, TILE - 1
    return empty[ends][:, ends].clone()


@torch.no_grad()
def encode(pipeline: QwenImagePipeline, picture: np.ndarray) -> Tensor:
    """Packed, normalised latents, [1, height / 16, width / 16, 64]."""
    vae = for_single_frames(pipeline.vae)
    x_BCHW = torch.from_numpy(picture)[None].permute(0, 3, 1, 2).float() / 127.5 - 1
    raw = vae.encode(x_BCHW.unsqueeze(2)).latent_dist.mode().squeeze(2)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
    count, channels, height, width = raw.shape
    packed = QwenImagePipeline._pack_latents((raw - mean) / std, count, channels, height, width)
    return packed.view(count, height // 2, width // 2, -1)
