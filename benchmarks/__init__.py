"""Measurements of attention, a forward and a rollout, as tables and raw JSON."""
