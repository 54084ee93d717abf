"""Rollouts from flat arguments, as short as a test wants them."""

from dataclasses import fields

import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import Guidance, NoiseOptions, Recipe
from lightforcing.lightforcing_core.rollout.runtime import Runtime

# Blocks small enough for frames of a few tokens, in plain PyTorch.
FINE = AttentionOptions(backend="reference", block=(16, 16), keep_frames=3, sink_frames=1, near_frames=1)


TEXT = 32  # the width of a text


def text(seed, tokens=7):
    """The embedding of a text, one for each seed."""
    return torch.randn(1, tokens, TEXT, generator=torch.Generator().manual_seed(seed))


def _taken(kind, options):
    """The part of `options` that names fields of `kind`, taken out of it."""
    taken = {field.name: options.pop(field.name, None) for field in fields(kind)}
    return {name: value for name, value in taken.items() if value is not None}


def recipe_of(**options):
    """A Recipe whose grouped fields are given flat, with FINE attention."""
    guidance, noise = Guidance(**_taken(Guidance, options)), NoiseOptions(**_taken(NoiseOptions, options))
    return Recipe(guidance=guidance, noise_options=noise, **{"attention": FINE, **options})


def roll(dit, context, finished=(), begun=None, **options):
    """`rollout` with the fields of Recipe and Runtime given flat."""
    runtime = Runtime(**_taken(Runtime, options))
    return rollout(dit, recipe_of(context=context, **options), runtime, finished, begun)


def video(chunks):
    """The latents of all chunks."""
    return torch.cat([chunk.latents for chunk in chunks], dim=2)
