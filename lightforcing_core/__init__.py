"""The method, the model and the rollout in plain PyTorch."""
