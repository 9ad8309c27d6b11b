"""What the encoder's output becomes: latents, and new ones from old, from the prior, and on the way between two."""
