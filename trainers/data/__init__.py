"""Pictures and captions in, latents and text embeddings out."""
