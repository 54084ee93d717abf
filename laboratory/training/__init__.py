"""Trains the demo model: data, VAE, autoregressive model, few-step student, export, evaluation. See README.md."""
