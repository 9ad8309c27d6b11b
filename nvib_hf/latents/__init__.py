"""Latents: made from the encoder's output, drawn from the prior, changed, merged, and interpolated."""
