"""Nodes that load and patch a model."""
