"""The block-sparse Triton kernel: strides, memory it must not touch, refusals, and compilation without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lightforcing.kernels.block_sparse import block_sparse_attention, why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Shared memory that one program may use, in KiB, by compute capability.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Stack bytes per thread are register spills, by key block. Seen: up to 16 with 64 keys, 96 with 128 (sm_120).
MAX_STACK = {64: 32, 128: 128}


def dense(q, k, v, tokens):
    """Attention of every query over the keys at `tokens`, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k[:, tokens], v[:, tokens]))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def every_query_block_reads(ids, batch, heads, q_blocks, width=None):
    """A list in which all query blocks read the same key blocks; entries past the count are nonsense on purpose."""
    row = torch.tensor(ids + [10**6] * ((width or len(ids)) - len(ids)), dtype=torch.int32, device=DEVICE)
    counts = torch.full((batch, heads, q_blocks), len(ids), dtype=torch.int32, device=DEVICE)
    return row.expand(batch, heads, q_blocks, -1), counts


@pytest.mark.parametrize(
    "layout", ["cache slice", "fused projections", "heads first", "every second head", "last dim strided"]
)
def test_any_strides_are_honoured(layout):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 2, 64, generator=generator).to(DEVICE) for tokens in (40, 120, 120))
    want = dense(q, k, v, [*range(16, 32), *range(80, 96)])
    if layout == "cache slice":  # rows of other frames around, so the batch stride is not L · H · D; k's is not v's
        k_cache, v_cache = (torch.full((2, tokens, 2, 64), torch.nan, device=DEVICE) for tokens in (200, 150))
        k_cache[:, 30:150], v_cache[:, 10:130] = k, v
        k, v = k_cache[:, 30:150], v_cache[:, 10:130]
    elif layout == "fused projections":  # rows of three widths
        q, k, v = (torch.cat([x] * (3 - i), dim=2)[:, :, :2] for i, x in enumerate((q, k, v)))
    elif layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "every second head":
        q, k, v = (x.repeat_interleave(2, dim=2)[:, :, ::2] for x in (q, k, v))
    else:
        q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    blocks, counts = every_query_block_reads([1, 6], 2, 2, 3, width=5)
    got = block_sparse_attention(q, k, v, blocks, counts, tokens_per_frame=40, block_q=16, block_k=16)
    assert got.is_contiguous()
    assert (got.double() - want).abs().max() <= 1e-5


def test_large_scores_do_not_overflow():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 32, 1, 64, generator=generator).to(DEVICE) for _ in range(3))
    q, k = q * 40, k * 40  # scores in the thousands
    blocks, counts = every_query_block_reads([0, 1], 1, 1, 2)
    got = block_sparse_attention(q, k, v, blocks, counts, tokens_per_frame=32, block_q=16, block_k=16)
    assert (got.double() - dense(q, k, v, list(range(32)))).abs().max() <= 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 32, 1, 64, dtype=torch.float64)}, "not torch.float64"),
        ({"q": torch.zeros(1, 32, 1, 256)}, "head dims up to 128, not 256"),
        ({"block_q": 8}, r"blocks of 16, 32, 64, 128 tokens, not \(8, 16\)"),
        ({"counts": torch.zeros(1, 1, 3, dtype=torch.int32)}, r"counts \(1, 1, 3\) do not describe \(1, 1, 2\)"),
        ({"counts": torch.zeros(1, 1, 2)}, "must be int32, not torch.int32 and torch.float32"),
    ],
)
def test_launcher_refuses_with_the_value(change, message):
    arguments = {
        "q": torch.zeros(1, 32, 1, 64),
        "k": torch.zeros(1, 32, 1, 64),
        "v": torch.zeros(1, 32, 1, 64),
        "blocks": torch.zeros(1, 1, 2, 2, dtype=torch.int32),
        "counts": torch.zeros(1, 1, 2, dtype=torch.int32),
        "tokens_per_frame": 32,
        "block_q": 16,
        "block_k": 16,
    }
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**(arguments | change))


def test_kernel_gives_no_reason_against_the_published_shape():
    assert why_not(torch.empty(1, 4608, 12, 128, dtype=torch.bfloat16, device=DEVICE), (64, 64)) is None


def test_kernel_compiles_for_every_supported_chip_without_a_gpu(tmp_path, capsys):
    variants = [f"{cc}:{block_q}:64:128:bf16:1" for cc in SHARED_KIB for block_q in (64, 128)]
    variants += ["86:128:128:128:bf16:0", "120:128:128:128:bf16:0", "86:64:64:128:fp32:1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("ahead_of_time.py"), *variants],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == len(variants)
    with capsys.disabled():
        print("\n  sm  q×k tile  dtype  warps stages  shared KiB  registers  stack")
        for row in rows:
            print(
                f"{row['cc']:4d} {row['block_q']:4d}×{row['block_k']:<4d} {row['dtype']:>5s} {row['num_warps']:6d} "
                f"{row['num_stages']:6d} {row['shared'] / 1024:11.1f} {row.get('registers', '?'):>10} "
                f"{row.get('stack', '?'):>6}"
            )
    for row in rows:
        assert row["shared"] <= SHARED_KIB[row["cc"]] * 1024, row
        if row["dtype"] == "bf16":
            assert row.get("stack", 0) <= MAX_STACK[row["block_k"]], row
