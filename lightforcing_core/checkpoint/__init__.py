"""Published checkpoints of every layout as one state dict."""
