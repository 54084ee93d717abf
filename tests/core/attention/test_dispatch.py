"""`sparse_attention`: every backend equals a brute-force attention, and `auto` says what it does."""

import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightforcing.lightforcing_core.attention import attention_backends
from lightforcing.lightforcing_core.attention import dispatch as attention
from lightforcing.lightforcing_core.attention.dispatch import (
    AttentionOptions,
    BackendUnavailable,
    choose_backend,
    sparse_attention,
)
from lightforcing.lightforcing_core.attention.fast_path import kernel_module, why_no_kernels
from lightforcing.lightforcing_core.attention.selection import BlockSelection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def block_ranges(frames, tokens_per_frame, block):
    """The token range of every block, written out by hand: frame by frame, the last block cut at the frame's end."""
    ranges = []
    for frame in range(frames):
        end = (frame + 1) * tokens_per_frame
        for start in range(frame * tokens_per_frame, end, block):
            ranges.append((start, min(start + block, end)))
    return ranges


def brute_force(q, k, v, mask, tokens_per_frame, block):
    """Attention in float64, one query block at a time, over exactly the keys its row of the mask names."""
    return brute_force_and_lse(q, k, v, mask, tokens_per_frame, block)[0]


def brute_force_and_lse(q, k, v, mask, tokens_per_frame, block):
    """The same and the log-sum-exp of each query's scores, −inf without any."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float64, device=q.device)
    q_ranges = block_ranges(q.shape[1] // tokens_per_frame, tokens_per_frame, block[0])
    k_ranges = block_ranges(k.shape[1] // tokens_per_frame, tokens_per_frame, block[1])
    assert mask.shape[2:] == (len(q_ranges), len(k_ranges))
    rows = mask.tolist()
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for row, (first, last) in enumerate(q_ranges):
                wanted = [k_ranges[i] for i in range(len(k_ranges)) if rows[b][h][row][i]]
                if not wanted:
                    continue
                keys = torch.cat([k[b, s:e, h] for s, e in wanted]).double()
                values = torch.cat([v[b, s:e, h] for s, e in wanted]).double()
                scores = q[b, first:last, h].double() @ keys.T / q.shape[-1] ** 0.5
                out[b, first:last, h] = scores.softmax(-1) @ values
                lse[b, first:last, h] = scores.logsumexp(-1)
    return out, lse


def problem(tokens_per_frame, block, *, q_frames, k_frames, batch=1, heads=1, dim=64, density=0.3, dtype=torch.float32):
    """Random q, k, v and mask; one query block of the first head attends to nothing, another to everything."""
    generator = torch.Generator().manual_seed(tokens_per_frame * 1000 + block[0] + block[1])
    q, k, v = (
        torch.randn(batch, frames * tokens_per_frame, heads, dim, generator=generator).to(DEVICE, dtype)
        for frames in (q_frames, k_frames, k_frames)
    )
    shape = [frames * -(-tokens_per_frame // size) for frames, size in zip((q_frames, k_frames), block, strict=True)]
    mask = torch.rand(batch, heads, *shape, generator=generator) < density
    mask[..., -1] |= ~mask.any(-1)
    if shape[0] > 1:
        mask[0, 0, 0] = False
    mask[-1, -1, -1] = True
    return q, k, v, mask.to(DEVICE)


def check(backend, tokens_per_frame, block, **sizes):
    q, k, v, mask = problem(tokens_per_frame, block, **sizes)
    got = sparse_attention(q, k, v, mask=mask, tokens_per_frame=tokens_per_frame, block=block, backend=backend)
    want = brute_force(q, k, v, mask, tokens_per_frame, block)
    assert got.shape == q.shape
    assert got.dtype == q.dtype
    error = (got.double() - want).abs().max()
    if q.dtype == torch.float32:
        assert error <= 1e-4
    else:
        assert error / want.abs().max() <= 2e-2
        assert (got.double() - want).norm() / want.norm() <= 2e-2


# tokens per frame, (query, key) block, sizes. Without a past q_frames equals k_frames.
SHAPES = [
    (1536, (64, 64), {"q_frames": 1, "k_frames": 2, "density": 0.1}),
    (1536, (128, 128), {"q_frames": 1, "k_frames": 1, "density": 0.2}),
    (1560, (64, 64), {"q_frames": 1, "k_frames": 2, "density": 0.1}),
    (1560, (128, 64), {"q_frames": 1, "k_frames": 1, "density": 0.1}),
    (390, (64, 32), {"q_frames": 1, "k_frames": 3, "heads": 2}),
    (390, (128, 128), {"q_frames": 2, "k_frames": 2, "batch": 2}),
    (96, (32, 16), {"q_frames": 2, "k_frames": 4, "batch": 2, "heads": 2}),
    (96, (64, 128), {"q_frames": 1, "k_frames": 3, "dim": 128}),
    (7, (16, 16), {"q_frames": 3, "k_frames": 7, "heads": 2}),
    (7, (16, 64), {"q_frames": 2, "k_frames": 2, "batch": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("tokens_per_frame", "block", "sizes"), SHAPES)
def test_backend_equals_brute_force(backend, tokens_per_frame, block, sizes, dtype):
    check(backend, tokens_per_frame, block, dtype=dtype, **sizes)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # in the interpreter, of queries without keys
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("tokens_per_frame", "block", "sizes"), SHAPES)
def test_log_sum_exp_equals_brute_force(backend, tokens_per_frame, block, sizes):
    q, k, v, mask = problem(tokens_per_frame, block, dtype=torch.bfloat16, **sizes)
    options = {"mask": mask, "tokens_per_frame": tokens_per_frame, "block": block, "backend": backend}
    _, lse = sparse_attention(q, k, v, **options, return_lse=True)
    _, want = brute_force_and_lse(q, k, v, mask, tokens_per_frame, block)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def flex():
    try:
        choose_backend(torch.zeros(1, 64, 1, 64, device=DEVICE), torch.zeros(1, 64, 1, 64), backend="flex")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens_per_frame", "block", "sizes"), SHAPES)
def test_flex_equals_brute_force(tokens_per_frame, block, sizes, dtype):
    check("flex", tokens_per_frame, block, dtype=dtype, **sizes)


@pytest.mark.usefixtures("flex")
def test_flex_compiles_once_for_all_chunk_lengths_and_frame_sizes():
    def attend(tokens_per_frame, q_frames, k_frames):
        check("flex", tokens_per_frame, (64, 64), q_frames=q_frames, k_frames=k_frames, heads=2)

    attend(130, 2, 4)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens_per_frame, q_frames, k_frames in ((130, 2, 6), (130, 2, 8), (70, 3, 9), (99, 1, 2)):
        attend(tokens_per_frame, q_frames, k_frames)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@given(
    tokens_per_frame=st.integers(1, 80),
    block=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
    q_frames=st.integers(1, 3),
    past=st.integers(0, 3),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    dim=st.sampled_from([8, 24, 64]),
    density=st.floats(0.05, 1.0),
)
def test_reference_equals_brute_force_on_any_shape(tokens_per_frame, block, past, q_frames, **sizes):
    check("reference", tokens_per_frame, block, q_frames=q_frames, k_frames=q_frames + past, **sizes)


@given(
    tokens_per_frame=st.integers(1, 40),
    block=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32])),
    q_frames=st.integers(1, 2),
    past=st.integers(0, 2),
    batch=st.integers(1, 2),
    dim=st.sampled_from([24, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_triton_equals_brute_force_on_any_shape(tokens_per_frame, block, past, q_frames, **sizes):
    check("triton", tokens_per_frame, block, q_frames=q_frames, k_frames=q_frames + past, **sizes)


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("backend", ["triton", "flex", "reference"])
def test_unselected_blocks_and_the_rest_of_the_cache_are_never_read(backend):
    tokens_per_frame, block = 390, (64, 64)
    q, k, v, mask = problem(tokens_per_frame, block, q_frames=1, k_frames=3, batch=1, heads=2)
    # The very first block, a full one, and a frame's ragged last one (7 blocks per frame).
    mask[..., 0] = mask[..., 3] = mask[..., 6] = False
    want = brute_force(q, k, v, mask, tokens_per_frame, block)
    cache = torch.full((2, 1, k.shape[1] + 200, 2, 64), torch.nan, device=DEVICE)
    cache[0, :, : k.shape[1]], cache[1, :, : k.shape[1]] = k, v
    k, v = cache[:, :, : k.shape[1]]
    for start, end in ((0, 64), (192, 256), (384, 390)):
        k[:, start:end] = v[:, start:end] = torch.nan
    got = sparse_attention(q, k, v, mask=mask, tokens_per_frame=tokens_per_frame, block=block, backend=backend)
    assert (got.double() - want).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_query_block_without_keys_gives_zeros(backend):
    q, k, v, mask = problem(40, (16, 16), q_frames=1, k_frames=2)
    mask[:, :, 1] = False
    got = sparse_attention(q, k, v, mask=mask, tokens_per_frame=40, block=(16, 16), backend=backend)
    assert (got[:, 16:32] == 0).all()
    assert got.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_full_mask_equals_dense_attention_with_its_scale(backend):
    q, k, v, mask = problem(50, (32, 16), q_frames=1, k_frames=2, batch=2, heads=2)
    got = sparse_attention(
        q, k, v, mask=torch.ones_like(mask), tokens_per_frame=50, block=(32, 16), backend=backend, scale=0.3
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(got, dense.transpose(1, 2), atol=1e-4, rtol=0)


def test_mask_and_selection_mean_the_same():
    q, k, v, mask = problem(50, (32, 16), q_frames=1, k_frames=2)
    options = {"tokens_per_frame": 50, "block": (32, 16), "backend": "reference"}
    from_list = sparse_attention(q, k, v, selection=BlockSelection.from_mask(mask), **options)
    assert torch.equal(from_list, sparse_attention(q, k, v, mask=mask, **options))


def test_reference_keeps_float64_and_can_be_differentiated():
    q, k, v, mask = problem(20, (16, 16), q_frames=1, k_frames=2, dim=4, dtype=torch.float64)
    mask[:] = True
    q.requires_grad_()

    def attend(q):
        return sparse_attention(q, k, v, mask=mask, tokens_per_frame=20, block=(16, 16))

    assert attend(q).dtype == torch.float64
    assert torch.autograd.gradcheck(attend, q, fast_mode=True)


def test_reference_result_does_not_depend_on_how_much_it_gathers_at_once(monkeypatch):
    q, k, v, mask = problem(50, (16, 16), q_frames=2, k_frames=3)
    options = {"mask": mask, "tokens_per_frame": 50, "block": (16, 16), "backend": "reference"}
    at_once = sparse_attention(q, k, v, **options)
    monkeypatch.setattr(attention_backends, "REFERENCE_CHUNK", 1)
    torch.testing.assert_close(sparse_attention(q, k, v, **options), at_once, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def fresh_choices(monkeypatch):
    """No backend has failed yet and nothing has been logged yet."""
    monkeypatch.setattr(attention, "_failures", {})
    monkeypatch.setattr(attention, "_announced", set())


def on_meta(tokens, keys=None, heads=12, dtype=torch.bfloat16):
    q = torch.empty(1, tokens, heads, 128, dtype=dtype)
    return q, torch.empty(1, keys or tokens, heads, 128, dtype=dtype)


@pytest.mark.usefixtures("fresh_choices", "flex")
def test_auto_on_cpu_compiles_flex_only_for_large_problems():
    assert choose_backend(*on_meta(4608, 9216)).name == "flex"
    small = choose_backend(*on_meta(96))
    assert small.name == "reference"
    assert "query-key pairs" in small.reason


@pytest.mark.usefixtures("fresh_choices")
def test_auto_never_takes_the_interpreter():
    assert "Triton" in choose_backend(*on_meta(96)).reason
    assert choose_backend(*on_meta(4608, 9216)).name != "triton"


@pytest.mark.usefixtures("fresh_choices")
def test_auto_without_a_compiler_or_triton_takes_the_reference_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(attention_backends, "cpp_compiler", lambda: None)
    kernel_module.cache_clear()
    why_no_kernels.cache_clear()
    try:
        choice = choose_backend(*on_meta(4608, 9216))
        assert choice.name == "reference"
        assert "pip install triton" in choice.reason
        assert "C++ compiler" in choice.reason
        with pytest.raises(BackendUnavailable, match="'triton' cannot run: triton is not installed; install it with"):
            choose_backend(*on_meta(96), backend="triton")
        with pytest.raises(BackendUnavailable, match=r"'flex' cannot run: .* install g\+\+"):
            choose_backend(*on_meta(96), backend="flex")
    finally:
        kernel_module.cache_clear()
        why_no_kernels.cache_clear()


def test_attention_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lightforcing.lightforcing_core.attention.dispatch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.usefixtures("fresh_choices")
def test_auto_falls_through_when_a_backend_fails_and_a_named_one_raises(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("the compiler is on holiday\nsecond line")

    monkeypatch.setitem(attention_backends.RUN, "flex", fails)
    monkeypatch.setitem(attention_backends.WHY_NOT, "flex", lambda *_: None)
    monkeypatch.setattr(attention, "FLEX_MIN_SCORES", 0)
    monkeypatch.setitem(attention_backends.WHY_NOT, "triton", lambda *_: "no triton in this test")
    q, k, v, mask = problem(20, (16, 16), q_frames=1, k_frames=2)
    options = {"mask": mask, "tokens_per_frame": 20, "block": (16, 16)}
    with caplog.at_level(logging.INFO):
        got = [sparse_attention(q, k, v, **options) for _ in range(2)]
    want = sparse_attention(q, k, v, backend="reference", **options)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], want)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1  # the second call knows and does not try again
    assert "flex failed" in warnings[0]
    assert "on holiday" in warnings[0]
    assert "second line" not in warnings[0]
    assert "on holiday" in choose_backend(q, k).reason
    with pytest.raises(RuntimeError, match="on holiday"):
        sparse_attention(q, k, v, backend="flex", **options)


@pytest.mark.usefixtures("fresh_choices")
def test_auto_logs_its_choice_once(caplog):
    q, k, v, mask = problem(20, (16, 16), q_frames=1, k_frames=2, dtype=torch.float64)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            sparse_attention(q, k, v, mask=mask, tokens_per_frame=20, block=(16, 16))
    lines = [r.message for r in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("[Light Forcing] attention: reference (")


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backend": "magic"},
            "unknown attention backend 'magic'; use 'auto', 'triton', 'flex', 'flash4', 'reference'",
        ),
        ({"block": (64, 48)}, "key block of 48 tokens is not a power of two"),
        ({"block": (8, 64)}, "query block of 8 tokens"),
        ({"tokens_per_frame": 30}, "40 tokens are not whole frames of 30"),
        ({"mask": None}, "exactly one of mask and selection, not neither"),
        ({"mask": torch.ones(1, 1, 2, 2, dtype=torch.bool)}, r"mask is torch.bool \(1, 1, 2, 2\).*\(1, 1, 3, 6\)"),
        ({"mask": torch.ones(1, 1, 3, 6)}, "mask is torch.float32"),
        ({"k": torch.zeros(1, 80, 2, 64)}, r"k \(1, 80, 2, 64\) and v \(1, 80, 1, 64\) do not fit together"),
        ({"k": torch.zeros(1, 80, 1, 64, dtype=torch.float16)}, "k is torch.float16 on cpu but q is torch.float32"),
        (
            {"mask": None, "selection": BlockSelection(torch.zeros(1, 1, 3, 6), torch.ones(1, 1, 3))},
            "selection.blocks is torch.float32 on cpu; it must be torch.int32",
        ),
        (
            {
                "mask": None,
                "selection": BlockSelection(torch.zeros(1, 1, 4, 6).int(), torch.ones(1, 1, 4).int()),
            },
            r"counts \(1, 1, 4\); these tensors and blocks need \(1, 1, 3\)",
        ),
    ],
)
def test_bad_input_is_refused_with_its_values(change, message):
    arguments = {
        "q": torch.zeros(1, 40, 1, 64),
        "k": torch.zeros(1, 80, 1, 64),
        "v": torch.zeros(1, 80, 1, 64),
        "mask": torch.ones(1, 1, 3, 6, dtype=torch.bool),
        "tokens_per_frame": 40,
        "block": (16, 16),
    }
    with pytest.raises(ValueError, match=message):
        sparse_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "unknown attention backend 'cuda'; use 'auto', 'triton'"),
        ({"block": (100, 64)}, "query block of 100 tokens"),
        ({"sink_frames": 4, "near_frames": 3}, "sink_frames 4 \\+ near_frames 3 exceed keep_frames 6"),
        ({"keep_frames": -1}, "keep_frames -1 is negative"),
    ],
)
def test_attention_options_refuse_what_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)
