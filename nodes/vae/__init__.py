"""Nodes that decode and encode."""
