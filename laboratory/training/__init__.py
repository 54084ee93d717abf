"""The demo model's training: data, VAE, autoregressive model, few-step student, export, evaluation. See README.md."""
