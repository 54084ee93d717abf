"""Checkpoint files of every published layout, loaded as one state dict."""
