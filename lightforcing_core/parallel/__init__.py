"""One video on several devices: each holds some tokens of every frame, and some heads of the KV cache."""
