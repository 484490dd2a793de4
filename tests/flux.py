"""A FluxPipeline that is real in every part and tiny in each."""

from __future__ import annotations

import string
from pathlib import Path


def save_tiny_flux(folder: Path) -> Path:
    """A FluxPipeline folder: 3 dual and 3 single blocks of width 16, random weights, guided.

    64-pixel pictures are latents [16, 8, 8], as the tiny Qwen-Image's; text is 12 wide, and pooled
    10 wide.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    torch.manual_seed(0)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    clip_words = [*letters, *(f"{letter}</w>" for letter in letters)]
    clip_vocab = {w: i for i, w in enumerate([*clip_words, "<|startoftext|>", "<|endoftext|>"])}
    clip = CLIPTextConfig(
        vocab_size=len(clip_vocab),
        hidden_size=10,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=clip_vocab["<|startoftext|>"],
        eos_token_id=clip_vocab["<|endoftext|>"],
    )
    t5_vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -2.0) for w in "▁" + letters)]
    t5 = T5Config(
        vocab_size=len(t5_vocab) + 2, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15,
            shift=3.0, use_dynamic_shifting=True,
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=CLIPTokenizer(clip_vocab, [], model_max_length=77),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=T5Tokenizer(t5_vocab, extra_ids=2, model_max_length=512),
        transformer=FluxTransformer2DModel(
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
