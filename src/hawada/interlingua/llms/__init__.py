"""The frozen language models that read latents, their tokenizers, and tiny models that are trained here."""
