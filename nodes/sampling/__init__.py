"""Nodes that sample a video chunk by chunk."""
