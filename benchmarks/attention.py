"""`bench attention`: every dense arm of this machine against each sparse backend, chunk by chunk.

The shapes are one layer's self-attention of the 81-frame short setting (chunks of 3 latent frames, target 0.88,
base 0.98): q [1, 3 · tokens, H, 128] against k, v [1, 6 … 21 frames · tokens, H, 128].
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..lightforcing_core.attention.blocks import FrameBlocks
from ..lightforcing_core.attention.dispatch import BACKENDS, BackendUnavailable, choose_backend, sparse_attention
from ..lightforcing_core.attention.selection import BlockSelection, SelectionPlan
from ..lightforcing_core.families import FAMILIES
from ..lightforcing_core.model.causal import sdpa
from ..lightforcing_core.rollout.growth import chunk_sparsities
from .record import facts
from .timing import Samples, ratio, take_turns, warm_up_rule

HEAD_DIM = 128
FRAMES = 3  # latent frames per chunk
CHUNKS = 7  # of an 81-frame video
CHECKED_BLOCKS = 2  # query blocks compared with the reference before anything is timed

Arm = Callable[[], Tensor]


@dataclass(frozen=True)
class AttentionBench:
    """What is measured: `chunks` count from 1, `sparsity` None takes the published growth of each chunk.

    `backends`: the sparse arms, None for all that can run here (the reference, which is the truth and not fast,
    only where it is named or alone).
    """

    tokens_per_frame: int = 1536
    heads: int = 12
    block: tuple[int, int] = (64, 64)
    sparsity: float | None = None
    chunks: tuple[int, ...] = (2, 3, 4, 5, 6, 7)
    backends: tuple[str, ...] | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for chunk in self.chunks:
            if not 2 <= chunk <= CHUNKS:
                raise ValueError(f"chunk {chunk} is not one of 2 … {CHUNKS}; the first chunk is dense in every arm")
        for name in self.backends or ():
            if name not in BACKENDS:
                raise ValueError(f"unknown attention backend {name!r}; use one of {', '.join(BACKENDS)}")

    def sparsities(self) -> list[float]:
        """One sparsity per chunk of the 81-frame video."""
        if self.sparsity is not None:
            return [0.0] + [self.sparsity] * (CHUNKS - 1)
        family = FAMILIES["light_forcing_short"]
        return chunk_sparsities(CHUNKS * FRAMES, FRAMES, target=family.target, base=family.base)


def run_attention(bench: AttentionBench, on_chunk: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Measure every chunk; returns the record that `bench attention` writes. on_chunk: called with each chunk's row.

    Raises BackendUnavailable when a named backend cannot run, RuntimeError when one gives a wrong result.
    """
    device = torch.device(bench.device)
    generator = torch.Generator().manual_seed(bench.seed)
    shape = (1, CHUNKS * FRAMES * bench.tokens_per_frame, bench.heads, HEAD_DIM)
    dtype = getattr(torch, bench.dtype)
    q_all, k_all, v_all = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    absent: dict[str, str] = {}
    rows = []
    with torch.inference_mode():
        for chunk in bench.chunks:
            tokens = chunk * FRAMES * bench.tokens_per_frame
            q, k, v = q_all[:, : FRAMES * bench.tokens_per_frame], k_all[:, :tokens], v_all[:, :tokens]
            rows.append(_chunk_row(bench, chunk, q, k, v, absent))
            if on_chunk is not None:
                on_chunk(rows[-1])
    return {
        "bench": "attention",
        **facts(device, asdict(bench)),
        "warm_up": warm_up_rule(bench.repeats),
        "not_here": absent,
        "chunks": rows,
    }


def _chunk_row(
    bench: AttentionBench, chunk: int, q: Tensor, k: Tensor, v: Tensor, absent: dict[str, str]
) -> dict[str, Any]:
    """Time one chunk's arms, all of them by turns."""
    q_layout, k_layout = (FrameBlocks(bench.tokens_per_frame, size) for size in bench.block)
    family = FAMILIES["light_forcing_short"]
    plan = SelectionPlan.build(
        range(chunk * FRAMES),
        FRAMES,
        k_layout,
        sparsity=bench.sparsities()[chunk - 1],
        keep_frames=family.keep_frames,
        sink_frames=family.keep_sink,
        near_frames=family.keep_near,
        device=k.device,
    )
    k_means = k_layout.block_means(k)
    frame_means = k_layout.frame_means(k_means)
    own_keys = k[:, -q.shape[1] :]

    def select() -> BlockSelection:
        """What a chunk pays in every forward: pool its own q and k, then choose; older keys are pooled already."""
        k_layout.frame_means(k_layout.block_means(own_keys))
        return plan.select(q_layout.block_means(q), k_means, frame_means)

    selection = select()

    def select_and_attend(name: str) -> Tensor:
        return attend(name, select())

    def attend(name: str, chosen: BlockSelection) -> Tensor:
        return sparse_attention(
            q, k, v, selection=chosen, tokens_per_frame=bench.tokens_per_frame, block=bench.block, backend=name
        )

    dense = dense_arms(q, k, v, absent)
    sparse = _sparse_backends(bench, q, k, v, absent)
    errors = {name: _check(attend(name, selection), q, k, v, selection, bench) for name in sparse}
    arms: dict[str, Callable[[], object]] = {f"dense {name}": arm for name, arm in dense.items()}
    arms["selection"] = select
    for name in sparse:
        arms[f"kernel {name}"] = partial(attend, name, selection)
        arms[f"whole {name}"] = partial(select_and_attend, name)
    samples = take_turns(arms, repeats=bench.repeats, device=q.device)
    kept, all_blocks = plan.kept, k_means.shape[1]
    return {
        "chunk": chunk,
        "queries": q.shape[1],
        "keys": k.shape[1],
        "kept_blocks": kept,
        "key_blocks": all_blocks,
        "ideal_ratio": all_blocks / kept,
        **_compare(samples, dense, sparse),
        "largest_error": errors,
        "arms": {name: arm.to_dict() for name, arm in samples.items()},
    }


def _compare(samples: dict[str, Samples], dense: dict[str, Arm], sparse: Sequence[str]) -> dict[str, Any]:
    """Each sparse arm against the best dense one, all from the same rounds."""
    best = min((f"dense {name}" for name in dense), key=lambda name: samples[name].median)
    return {
        "best_dense": best.removeprefix("dense "),
        "selection_share_of_dense": ratio(samples["selection"], samples[best])["median"],
        "ratios": {
            name: {
                "kernel": ratio(samples[best], samples[f"kernel {name}"]),
                "with_selection": ratio(samples[best], samples[f"whole {name}"]),
            }
            for name in sparse
        },
    }


def dense_arms(q: Tensor, k: Tensor, v: Tensor, absent: dict[str, str]) -> dict[str, Arm]:
    """Every dense attention that runs here, by name; `absent` receives the others with the reason."""
    if q.device.type != "cuda":
        return {"sdpa": lambda: sdpa(q, k, v)}
    arms: dict[str, Arm] = {}
    kernels = {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, kernel in kernels.items():
        arms[name] = partial(_sdpa_by, kernel, q, k, v)
    for name, module in {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}.items():
        if find_spec(module) is None:
            absent[name] = f"{module} is not installed"
            continue
        arms[name] = partial(import_module(module).flash_attn_func, q, k, v)
    for name in list(arms):
        try:
            arms[name]()
            torch.cuda.synchronize(q.device)
        except RuntimeError as error:
            absent[name] = str(error).strip().splitlines()[0]
            del arms[name]
    return arms


def _sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return sdpa(q, k, v)


def _sparse_backends(bench: AttentionBench, q: Tensor, k: Tensor, v: Tensor, absent: dict[str, str]) -> list[str]:
    """The backends to time; a named one that cannot run is an error, any other goes to `absent`."""
    if bench.backends is not None:
        return [choose_backend(q, k, v, block=bench.block, backend=name).name for name in bench.backends]
    able = []
    for name in BACKENDS[:-1]:
        try:
            choose_backend(q, k, v, block=bench.block, backend=name)
        except BackendUnavailable as error:
            absent[name] = str(error)
            continue
        if name == "triton" and q.device.type != "cuda":
            absent[name] = "Triton's interpreter is only for tests"
            continue
        able.append(name)
    return able or [BACKENDS[-1]]


def _check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, bench: AttentionBench) -> float:
    """Largest relative difference from float32 softmax in the first query blocks and head; RuntimeError over 5 %."""
    q_layout, k_layout = (FrameBlocks(bench.tokens_per_frame, size) for size in bench.block)
    worst = 0.0
    for block in range(min(CHECKED_BLOCKS, q_layout.per_frame)):
        rows = slice(block * q_layout.block, min((block + 1) * q_layout.block, bench.tokens_per_frame))
        listed = selection.blocks[0, 0, block, : int(selection.counts[0, 0, block])]
        visible = torch.isin(k_layout.block_of_token(k.shape[1] // bench.tokens_per_frame, k.device), listed)
        scores = q[0, rows, 0].float() @ k[0, visible, 0].float().mT * HEAD_DIM**-0.5
        expected = scores.softmax(-1) @ v[0, visible, 0].float()
        worst = max(worst, float((out[0, rows, 0].float() - expected).abs().max() / expected.abs().max()))
    if not worst < 0.05:
        raise RuntimeError(
            f"a sparse arm differs from the reference by {worst:.3g} of the largest value; not timing it"
        )
    return worst
