"""FP8 checkpoints and linear layers."""
