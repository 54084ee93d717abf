"""Plots and text pages of a run."""
