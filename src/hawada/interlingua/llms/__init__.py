"""The frozen language models that read latents, their tokenizers, and tiny ones that are trained here."""
