"""Measurements of attention, a forward, a rollout and memory: table and raw JSON."""
