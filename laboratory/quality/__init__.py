"""The effect of sparsity on the demo model's videos, measured. See ../README.md."""
