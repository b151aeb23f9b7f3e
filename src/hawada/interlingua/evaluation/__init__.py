"""What latents carry and what they cost, beside text and other baselines."""
