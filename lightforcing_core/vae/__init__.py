"""Streaming VAEs: Wan, LightVAE and TAE."""
