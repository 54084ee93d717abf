"""One of four ranks: makes a video with the others, and then sees each way of losing one. Arguments: rank, folder."""

import os
import sys
import time
from pathlib import Path

import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.parallel.group import RankLost, process_group
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import Recipe
from lightforcing.lightforcing_core.rollout.runtime import Runtime

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dit = wan_from_state_dict(random_state_dict(dim=512, ffn_dim=64, layers=2, text_dim=8), dtype=torch.float64)
recipe = Recipe(
    latent_shape=(1, 16, 9, 6, 14),
    frames_per_chunk=3,
    sigmas=(1.0, 0.5, 0.0),
    context=torch.ones(1, 4, 8),
    growth=(0.0, 0.5),
    attention=AttentionOptions("reference", (16, 16)),
)
alone = list(rollout(dit, recipe))


def lost(chunks, finished):
    """The seconds until the loss of a rank is an error; `finished` then holds the chunks before it."""
    try:
        for chunk in chunks:
            finished.append(chunk)
            start = time.monotonic()
    except RankLost:
        return time.monotonic() - start
    raise AssertionError("nothing was lost")


def die():
    os._exit(9)


def fail():
    raise ValueError("of this rank")


faults = {4: None, 3: die, 2: fail, 1: lambda: time.sleep(8)}
for last, fault in faults.items():
    size, finished = last if fault is None else last + 1, []
    if rank >= size:
        break
    with process_group(f"file://{folder}/{last}", rank, size, seconds=4.0) as group:
        assert group.agree(True)
        assert not group.agree(rank > 0)
        if fault is None:
            chunks = list(rollout(dit, recipe, Runtime(exchange=group)))
            assert all(torch.equal(one.latents, other.latents) for one, other in zip(chunks, alone, strict=True))
            continue
        chunks = rollout(dit, recipe, Runtime(exchange=group))
        if rank == last:
            finished.append(next(chunks))
            try:
                fault()
            except ValueError:
                chunks.close()
            break
        seconds = lost(chunks, finished)
        assert len(finished) == 1
        assert seconds < 30
    rest = list(rollout(dit, recipe, finished=finished))
    assert torch.equal(rest[-1].latents, alone[-1].latents)
(folder / f"ended.{rank}").touch()
