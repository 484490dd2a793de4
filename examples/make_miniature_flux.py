"""Trains examples/miniature-flux, a small but genuine FluxPipeline, from nothing.

    python -m examples.make_miniature_flux --out examples/miniature-flux

The pictures, captions and training are those of examples/make_miniature.py; the parts are FLUX.1's
own classes: CLIP and T5 text encoders, `AutoencoderKL`, and a guided `FluxTransformer2DModel` with
eight dual and eight single blocks of width 64. The T5 tokenizer pads captions to 16 tokens, where
FLUX.1-dev has 512. Every stage leaves its output in --work, and a second call resumes after it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from examples.make_miniature import (
    BATCH,
    HEADS,
    PICTURES,
    SHIFT,
    VAE_BATCH,
    WIDTH,
    draw_pictures,
    to_signal,
    train,
    varied_scenes,
)
from trainers.students.families.flux import text_tokens
from trainers.tasks.shapes.grammar import FAMILIES, compose, requests, sample_training_request

DUAL_BLOCKS = SINGLE_BLOCKS = 8
POOLED = 32
TEXT_TOKENS = 16
VAE_STEPS = 2_000
STEPS = 4_000
GUIDANCE = 3.5
"""The pipeline's default. A guided FLUX reads it; pictures here do not depend on it."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=Path("examples/miniature-flux"))
    arguments.add_argument("--work", type=Path, default=Path("build/miniature-flux"))
    arguments.add_argument("--steps", type=int, default=STEPS, help="steps of the transformer")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    work, rng = options.work, random.Random(options.seed)  # drawn from alike by every call
    varied = draw_pictures(work / "varied.safetensors", list(varied_scenes(rng)))
    vae = train_vae(work / "vae", varied)
    wanted = [sample_training_request(rng) for _ in range(PICTURES)]
    composed = [compose(request, rng) for request in wanted]
    pictures = draw_pictures(work / "pictures.safetensors", composed)
    latents = encode_pictures(work / "latents.safetensors", vae, pictures)
    pipeline = make_pipeline(options.seed, vae)
    train_transformer(options, pipeline, latents, [request.caption for request in wanted])
    pipeline.save_pretrained(options.out)
    (options.out / "espalier.json").write_text('{"resolution": 64}\n')


def every_caption() -> list[str]:
    return [request.caption for family in FAMILIES for request in requests(family)]


def clip_tokenizer() -> CLIPTokenizer:
    """Byte pairs in which every word of the captions is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(every_caption(), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(model["vocab"], merges, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """One piece for every word of the captions, and one for every letter."""
    words = sorted({word for caption in every_caption() for word in caption.split()})
    letters = sorted({letter for word in words for letter in word} | {"▁"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    pieces += [(letter, -20.0) for letter in letters]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def train_vae(folder: Path, pictures: Tensor) -> AutoencoderKL:
    """The autoencoder: reconstruction and a light KL term, then latents measured for its config."""
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder)
    torch.manual_seed(0)  # every stage seeds itself, so that a resumed call draws the same
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        norm_num_groups=8,
        layers_per_block=1,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, VAE_STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    started = time.monotonic()
    for step in range(VAE_STEPS):
        chosen = torch.randint(len(pictures), (VAE_BATCH,), generator=generator)
        x_BCHW = to_signal(pictures[chosen])
        posterior = vae.encode(x_BCHW).latent_dist
        z_BCHW = posterior.sample()
        # Generated latents are never exact: a little noise teaches the decoder to forgive.
        z_BCHW = z_BCHW + 0.05 * z_BCHW.detach().std() * torch.randn_like(z_BCHW)
        out_BCHW = vae.decode(z_BCHW).sample
        error = F.mse_loss(out_BCHW, x_BCHW) + 0.2 * F.l1_loss(out_BCHW, x_BCHW)
        loss = error + 1e-5 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 50 == 0 or step == VAE_STEPS - 1:
            seconds = time.monotonic() - started
            print(f"vae {step:5d}  error {error.item():.5f}  {seconds:.0f} s", flush=True)
    vae.requires_grad_(False)
    sample = encode(vae, pictures[:2048])
    vae.register_to_config(
        shift_factor=float(sample.mean()), scaling_factor=float(1 / sample.std())
    )
    vae.save_pretrained(folder)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Mean latents [N, 16, 8, 8], not yet normalised."""
    batches = [vae.encode(to_signal(batch)).latent_dist.mode() for batch in pictures.split(64)]
    return torch.cat(batches)


def encode_pictures(file: Path, vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Normalised, packed latents [PICTURES, 16 tokens, 64], as the transformer reads them."""
    if not file.exists():
        normal = (encode(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
        packed = FluxPipeline._pack_latents(normal, *normal.shape)
        save_file({"latents": packed.contiguous()}, file)
    return load_file(file)["latents"]


def make_pipeline(seed: int, vae: AutoencoderKL) -> FluxPipeline:
    """The whole pipeline, its transformer and text encoders not yet trained."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        num_layers=DUAL_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    # Every block starts as the identity (adaLN-zero).
    modulations = [b.norm for b in transformer.single_transformer_blocks]
    modulations += [b.norm1 for b in transformer.transformer_blocks]
    modulations += [b.norm1_context for b in transformer.transformer_blocks]
    for zero in (*(norm.linear for norm in modulations), transformer.proj_out):
        torch.nn.init.zeros_(zero.weight)
        torch.nn.init.zeros_(zero.bias)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=16, base_shift=math.log(SHIFT), max_image_seq_len=8192,
            max_shift=math.log(SHIFT), shift_terminal=0.02, use_dynamic_shifting=True,
        ),
        vae=vae,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip), hidden_size=POOLED, intermediate_size=2 * POOLED,
                num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77,
                bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
            )
        ),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5), d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=2 * WIDTH,
                num_layers=2, num_heads=HEADS, dropout_rate=0.0,
            )
        ),
        tokenizer_2=t5,
        transformer=transformer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_transformer(
    options: argparse.Namespace, pipeline: FluxPipeline, latents: Tensor, captions: list[str]
) -> None:
    """Flow matching on velocity; the text encoders learn along and are frozen from then on."""
    transformer = pipeline.transformer
    image_ids = FluxPipeline._prepare_latent_image_ids(BATCH, 4, 4, "cpu", torch.float32)
    guidance_B = torch.full((BATCH,), GUIDANCE)

    def velocity(captions: list[str], noisy_BND: Tensor, t_B: Tensor) -> Tensor:
        embeds_BMD, pooled_BP, text_ids = pipeline.encode_prompt(
            captions, max_sequence_length=text_tokens(pipeline)
        )
        return transformer(
            hidden_states=noisy_BND,
            encoder_hidden_states=embeds_BMD,
            pooled_projections=pooled_BP,
            timestep=t_B,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=guidance_B,
            return_dict=False,
        )[0]

    trained = torch.nn.ModuleDict(
        {
            "transformer": transformer,
            "clip": pipeline.text_encoder,
            "t5": pipeline.text_encoder_2,
        }
    )
    train(options, pipeline, trained, velocity, latents, captions)


if __name__ == "__main__":
    main()
