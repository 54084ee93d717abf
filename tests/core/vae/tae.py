"""The decoder of taew2_1 as a plain module tree, and random weights for it."""

import torch

from lightforcing.benchmarks.decode import random_tae


def tae_from_state_dict(weights, dtype=torch.float32):
    with torch.device("meta"):
        tae = random_tae()
    tae.load_state_dict({name: weights[name].to(dtype) for name in tae.state_dict()}, assign=True)
    return tae.requires_grad_(False)


def random_tae_state_dict(seed=0):
    """A random decoder under the published names whose frames lie inside 0…1."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in random_tae().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    gains = {name: 0.05 if name.endswith("bias") else shape[1:].numel() ** -0.5 for name, shape in shapes.items()}
    made = {name: gains[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["decoder.22.weight"] *= 0.2
    made["decoder.22.bias"] += 0.5
    return made
