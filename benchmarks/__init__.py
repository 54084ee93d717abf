"""Measurements of attention, one forward, a rollout and memory, each as a table and raw JSON."""
