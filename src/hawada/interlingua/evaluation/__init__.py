"""How well questions are answered from latents, and what latents cost, compared with text and other baselines."""
