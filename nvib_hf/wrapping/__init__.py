"""Puts NVIB into a model of Transformers: finds its attention, converts it, and saves the result."""
