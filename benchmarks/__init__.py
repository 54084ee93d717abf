"""Side-by-side measurements: attention, one forward, a rollout, memory. Each prints a table and writes raw JSON."""
