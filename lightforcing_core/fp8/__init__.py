"""FP8 products, calibration and checkpoints."""
