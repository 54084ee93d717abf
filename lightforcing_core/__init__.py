"""Light Forcing in plain PyTorch."""
