"""Whole rollouts on a card that is not there: every operation is asked for as on a GPU, none of them is done.

Run as a process of its own, without TRITON_INTERPRET: an interpreted kernel is not launched as a compiled one is.
Arguments are names in `MODES`, or none for all of them. One JSON row each: the traceback if it broke, warnings (a
kernel that fails is replaced with one), kernels by name, where the host waited, recorded graphs, and memory that was
given back too early. Sizes are those of the 1.3B model at 480×832, where tensors without data cost nothing.
"""

import collections
import contextlib
import functools
import json
import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from attention_stand_ins import attention_stand_ins
from card_faults import FAULTS, found
from card_launches import Launches
from fake_card import Card, Graph, let_cuda_be_guarded
from stream_order import Impossible
from torch import Tensor, nn
from triton.runtime import JITFunction

from lightforcing.kernels import attend, block_sparse, modulation, score, selection, store, tuning
from lightforcing.lightforcing_core.attention import attention_backends
from lightforcing.lightforcing_core.attention import dispatch as attention
from lightforcing.lightforcing_core.attention import fast_path as triton_kernels
from lightforcing.lightforcing_core.attention import selection as core_selection
from lightforcing.lightforcing_core.attention.dispatch import AttentionOptions
from lightforcing.lightforcing_core.fp8 import linear as quantize
from lightforcing.lightforcing_core.model import causal as causal_wan
from lightforcing.lightforcing_core.model import cuda_capture as cuda_recorder
from lightforcing.lightforcing_core.model import cuda_graph as step_graph
from lightforcing.lightforcing_core.model import fused
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.rollout import few_step_sigmas, rollout
from lightforcing.lightforcing_core.rollout.timeline import Prompt
from lightforcing.lightforcing_core.vae import overlap
from lightforcing.lightforcing_core.vae.overlap import OverlappedDecoder
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder
from lightforcing.lightforcing_core.vae.taehv import random_tae_state_dict, tae_from_state_dict
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict

DEVICE = torch.device("cuda", 0)
TEXT_TOKENS, TEXT_DIM = 512, 256
FEW = {"keep_frames": 3, "near_frames": 1}  # so that frames are chosen from the third chunk on
PUBLISHED, UNTRAINED = AttentionOptions(**FEW), AttentionOptions(**FEW, estimator="lse", tail=True)
SPARSE = (0.0, 0.5, 0.8)
SIX_STEPS = few_step_sigmas((1000, 850, 700, 550, 400, 250))
SECOND = torch.device("cuda", 1)
# What each mode changes of a rollout of three chunks of three frames, and of the card.
MODES: dict[str, dict[str, Any]] = {
    "dense": {"growth": None},
    "published": {"latent_shape": (1, 16, 12, 60, 104), "attention": AttentionOptions()},
    "another launch wins, no graphs": {"fastest": "last", "cuda_graph": "off"},
    "untrained": {"attention": UNTRAINED},
    "untrained, another launch wins": {"attention": UNTRAINED, "fastest": "last"},
    "tiles": {"attention": AttentionOptions(**FEW, estimator="lse", tail=True, tiles=True)},
    "selections kept for two steps": {"attention": AttentionOptions(**FEW, reuse_steps=2), "sigmas": SIX_STEPS},
    "whole wide blocks": {
        "attention": AttentionOptions(**FEW, block=(128, 128), tail=True),
        "latent_shape": (1, 16, 9, 64, 96),
    },
    "int8": {"attention": UNTRAINED, "kv": KVOptions("int8")},
    "int8, dense": {"growth": None, "kv": KVOptions("int8")},
    "int8 on an older card": {"attention": UNTRAINED, "kv": KVOptions("int8"), "capability": (8, 6)},
    "fp8": {"kv": KVOptions("fp8"), "capability": (8, 9)},
    "fp8 on an older card": {"kv": KVOptions("fp8"), "capability": (8, 6), "fp8_linears": True, "dim": 128},
    "a card too old for kernels": {"dtype": torch.float16, "capability": (7, 5), "dim": 128},
    "host memory, few layers": {"kv": KVOptions(host=True)},
    "host memory, int8, sinks follow": {
        "kv": KVOptions("int8", host=True),
        "layers": 4,
        "attention": UNTRAINED,
        "window": 6,
        "sink_frames": 1,
        "sink_rope": "follow",
    },
    "window, sinks follow": {"window": 6, "sink_frames": 1, "sink_rope": "follow"},
    "window, sinks stay": {"window": 6, "sink_frames": 3, "attention": UNTRAINED},
    "prompts": {"prompts": ("hard", "blend")},
    "guided, context noise": {"cfg": 3.0, "context_noise": 100.0},
    "two videos": {"latent_shape": (2, 16, 9, 60, 104), "attention": UNTRAINED},
    "one frame per chunk": {"frames_per_chunk": 1, "latent_shape": (1, 16, 6, 60, 104)},
    "both ends given": {"initial": 4, "last": 1, "latent_shape": (1, 16, 10, 60, 104)},
    "float16": {"dtype": torch.float16, "attention": UNTRAINED},
    "float32": {"dtype": torch.float32},
    "FP8 linears": {"fp8_linears": True},
    "second card": {"device": SECOND, "attention": UNTRAINED, "fastest": "last"},
    "second card, host memory": {"device": SECOND, "kv": KVOptions(host=True), "layers": 3},
    "decode beside": {"vae": "wan"},
    "recorded run, TAE beside": {"recorder": True, "vae": "tae", "attention": UNTRAINED},
    "one head": {"dim": 128, "attention": UNTRAINED},
    "flex": {"attention": AttentionOptions("flex", **FEW), "dim": 128},
    "flex, untrained, int8": {
        "attention": AttentionOptions("flex", **FEW, estimator="lse", tail=True),
        "kv": KVOptions("int8"),
        "dim": 128,
    },
    "flash4": {"attention": AttentionOptions("flash4", **FEW, block=(128, 128)), "latent_shape": (1, 16, 9, 64, 96)},
    "without Triton": {
        "attention": AttentionOptions("reference", **FEW, estimator="lse", tail=True),
        "dim": 128,
        "latent_shape": (1, 16, 9, 16, 24),
        "triton": False,
    },
    "machine code": {"attention": UNTRAINED, "whole": True, "multiprocessors": 10_000},
}
KERNELS = [x for room in (attend, modulation, score, selection, store) for x in vars(room).values()]


class Warnings(logging.Handler):
    """Keeps what the pack warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


def forget_earlier_runs() -> None:
    """What a process remembers of its card, which is another one now."""
    for memory in (fused._failed, attention._failures, core_selection._failures, step_graph._verdicts):
        memory.clear()
    block_sparse._launches.clear()
    tuning._known.clear()
    for kernel in KERNELS:
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()
    for cached in (overlap._second_stream, cuda_recorder.capture_stream, quantize.why_not_scaled_mm):
        cached.cache_clear()


@functools.cache
def model(dim: int, layers: int, dtype: torch.dtype, device: torch.device, fp8_linears: bool) -> nn.Module:
    """A few layers of the 1.3B model, or narrower ones."""
    sizes = {"dim": dim, "ffn_dim": 8960, "layers": layers, "text_dim": TEXT_DIM}
    tree = wan_from_state_dict(random_state_dict(**sizes), dtype=dtype, device=device)
    if fp8_linears:
        quantize.quantize_linears(tree)
    return tree


@functools.cache
def decoder_tree(kind: str) -> nn.Module:
    if kind == "tae":
        return tae_from_state_dict(random_tae_state_dict(), dtype=torch.bfloat16, device=DEVICE)
    return vae_from_state_dict(random_vae_state_dict(dim=8), dtype=torch.bfloat16, device=DEVICE)


def prompt(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, TEXT_TOKENS, TEXT_DIM, device=device, dtype=dtype)


def ask_for(launches: Launches, how: dict[str, Any]) -> None:
    """One rollout, chunk by chunk, and its decode where the mode has one."""
    how = {"latent_shape": (1, 16, 9, 60, 104), "frames_per_chunk": 3, "growth": SPARSE, **how}
    how = {"attention": PUBLISHED, "sigmas": few_step_sigmas(), "device": DEVICE, **how}
    dtype, device = how.pop("dtype", torch.bfloat16), how["device"]
    launches.card.capability = how.pop("capability", (9, 0))
    launches.card.multiprocessors = how.pop("multiprocessors", 4)
    launches.fastest, launches.whole = how.pop("fastest", "first"), how.pop("whole", False)
    dit = model(how.pop("dim", 1536), how.pop("layers", 2), dtype, device, how.pop("fp8_linears", False))
    context: Any = prompt(device, dtype)
    if switches := how.pop("prompts", ()):  # as a host hands them over: in its own memory, in float32
        texts = [prompt(torch.device("cpu"), torch.float32) for _ in (None, *switches)]
        later = [Prompt(text, 1 + i, switch) for i, (text, switch) in enumerate(zip(texts[1:], switches, strict=True))]
        context = [Prompt(texts[0]), *later]
    if "cfg" in how:
        how["negative"] = prompt(device, dtype)
    for end in ("initial", "last"):
        if frames := how.pop(end, 0):
            how[f"{end}_latents"] = torch.zeros(1, 16, frames, *how["latent_shape"][3:])
    recorder = how["recorder"] = RunRecorder() if how.pop("recorder", False) else None
    kind = how.pop("vae", None)
    decoder = None
    if kind:
        taken = "normalised" if kind == "tae" else None
        decoder = OverlappedDecoder(StreamingDecoder(decoder_tree(kind), tae_latents=taken), device)
    launches.card.waits.clear()
    for chunk in rollout(dit, context, **how):
        if decoder is not None:
            decoder.put(chunk.latents)
            decoder.arrived()
    if decoder is not None:
        decoder.rest()
    if recorder is not None:
        recorder.finish()


def counted(recorded: list[None]) -> Any:
    begin = Graph.capture_begin

    def capture_begin(*arguments: Any, **options: Any) -> None:
        recorded.append(None)
        begin(*arguments, **options)

    return mock.patch.object(Graph, "capture_begin", capture_begin)


def rows(names: list[str]) -> Iterator[dict[str, Any]]:
    card = Card()
    launches = Launches(card)
    plain_forward = causal_wan._forward

    def forward(*arguments: Any) -> Tensor:
        with card.busy():
            return plain_forward(*arguments)

    def own_type(x: Any) -> type:
        # A parameter without data is of FakeTensor's type and not of its own.
        return nn.Parameter if isinstance(x, nn.Parameter) else Tensor if isinstance(x, Tensor) else type(x)

    with (
        card,
        launches.taken(),
        mock.patch.object(causal_wan, "_forward", forward),
        mock.patch.object(fused, "type", own_type, create=True),
        mock.patch.object(step_graph, "type", own_type, create=True),
        attention_stand_ins(),
    ):
        for name in names:
            yield row(name, launches)
        card.capability = (9, 0)
        for name, fault in FAULTS.items():
            yield {"fault": name, "found": found(fault, card)}


def row(name: str, launches: Launches) -> dict[str, Any]:
    """What became of one mode."""
    card, how, warnings, recorded = launches.card, dict(MODES[name]), Warnings(), []
    with_triton = how.pop("triton", True)
    absent = mock.Mock(return_value="triton is not installed", cache_clear=lambda: None)
    forget_earlier_runs()
    card.launched.clear()
    card.order.problems.clear()
    card.woken.clear()
    logging.getLogger("lightforcing").addHandler(warnings)
    error = None
    try:
        with counted(recorded), without(absent, unless=with_triton):
            ask_for(launches, how)
    except (Exception, Impossible):
        error = traceback.format_exc()
        card.recording = None
    finally:
        logging.getLogger("lightforcing").removeHandler(warnings)
    return {
        "mode": name,
        "error": error,
        "warnings": warnings.kept,
        "kernels": collections.Counter(card.launched),
        "waits": sorted(set(card.waits)),
        "graphs": len(recorded),
        "devices": sorted(card.woken),
        "problems": sorted(set(card.order.problems)),
    }


def without(absent: Any, *, unless: bool) -> Any:
    """No kernel can be imported."""
    rooms = () if unless else (fused, core_selection, attention_backends, triton_kernels)
    stack = contextlib.ExitStack()
    for room in rooms:
        stack.enter_context(mock.patch.object(room, "kernel_module", absent))
    return stack


if __name__ == "__main__":
    let_cuda_be_guarded()
    for one in rows(sys.argv[1:] or list(MODES)):
        print(json.dumps(one), flush=True)
