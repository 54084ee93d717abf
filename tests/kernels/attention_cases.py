"""Cases for the block-sparse kernel: inputs full of what must not be read, and ways to launch."""

from contextlib import contextmanager
from unittest import mock

import torch
from hypothesis import strategies as st

from lightforcing.kernels import block_sparse, tuning
from lightforcing.kernels.block_sparse import block_sparse_attention

from ..support.attention_problems import DEVICE, EIGHT_BIT, brute_force, spans


def dense(q, k, v, tokens):
    """Attention of every query over the keys at `tokens`, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k[:, tokens], v[:, tokens]))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def every_query_block_reads(ids, batch, heads, q_blocks, width=None):
    """A list in which all query blocks read the same key blocks; entries past the count are nonsense on purpose."""
    row = torch.tensor(ids + [10**6] * ((width or len(ids)) - len(ids)), dtype=torch.int32, device=DEVICE)
    counts = torch.full((batch, heads, q_blocks), len(ids), dtype=torch.int32, device=DEVICE)
    return row.expand(batch, heads, q_blocks, -1), counts


class Case:
    """Random q, k, v in a larger cache, lists and means; all that the kernel must not read is NaN or nonsense."""

    def __init__(self, tokens_per_frame, block, q_frames, past, batch, heads, dim, dtype, stored, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tokens_per_frame, self.block = tokens_per_frame, block
        k_frames = q_frames + past
        self.k_spans = spans(k_frames, tokens_per_frame, block[1])
        rows = q_frames * len(spans(1, tokens_per_frame, block[0]))

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        self.q = normal(batch, q_frames * tokens_per_frame, heads, dim).to(DEVICE, dtype)
        self.mask = torch.rand(batch, heads, rows, len(self.k_spans), generator=generator) < 0.4
        self.mask[-1, -1, -1] = True
        if rows > 1:
            self.mask[0, 0, 0] = False
        self.means = tuple(normal(batch, len(self.k_spans), heads, dim).to(DEVICE, dtype) for _ in range(2))
        # Lists in any order, in a row that is wider than needed and ends in ids that do not exist.
        self.blocks = torch.full((batch, heads, rows, len(self.k_spans) + 2), 10**6, dtype=torch.int32)
        self.counts = self.mask.sum(-1, dtype=torch.int32).to(DEVICE)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in self.mask.shape[:3])).tolist():
            ids = self.mask[tuple(index)].nonzero()[:, 0]
            ids = ids[torch.randperm(len(ids), generator=generator)]
            self.blocks[tuple(index)][: len(ids)] = ids.int()
        self.blocks = self.blocks.to(DEVICE)

        self.exact, self.stored, scales = [], [], []
        for _ in range(2):
            cache = torch.full((batch, k_frames * tokens_per_frame + 40, heads, dim), torch.nan)
            block_scales = torch.full((batch, len(self.k_spans), heads), 1.0)
            for i, (start, end) in enumerate(self.k_spans):
                cache[:, 20 + start : 20 + end] = normal(batch, end - start, heads, dim)
                block_scales[:, i] = 0.002 * 2.0 ** torch.randint(0, 4, (heads,), generator=generator)
            if stored in EIGHT_BIT:
                spread = torch.cat(
                    [block_scales[:, i : i + 1].expand(-1, e - s, -1) for i, (s, e) in enumerate(self.k_spans)], 1
                )
                inner = cache[:, 20:-20] / spread[..., None] / 16
                numbers = inner.round().clamp(-127, 127) if stored == torch.int8 else inner
                cache[:, 20:-20] = numbers
                cache = cache.nan_to_num(127.0).to(stored) if stored == torch.int8 else cache.to(stored)
                self.exact.append((cache[:, 20:-20].double() * spread[..., None]).to(DEVICE))
                scales.append(block_scales.to(DEVICE))
            else:
                cache = cache.to(dtype)
                self.exact.append(cache[:, 20:-20].double().to(DEVICE))
            self.stored.append(cache.to(DEVICE)[:, 20:-20])
        self.scales = tuple(scales) or None
        wide = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
        self.tolerance = wide[torch.bfloat16 if dtype == torch.float16 and scales else dtype]

    def want(self, mask=None, means=None, q=None):
        """The output in float64."""
        mask = self.mask if mask is None else mask
        return brute_force(self.q if q is None else q, *self.exact, mask, self.tokens_per_frame, self.block, means)

    def attend(self, blocks=None, counts=None, **rest):
        """The kernel's output, for the case's own lists unless others are given."""
        lists = (self.blocks, self.counts) if blocks is None else (blocks, counts)
        return block_sparse_attention(self.q, *self.stored, *lists, **self.options() | rest)

    def attend_densely(self):
        return block_sparse_attention(self.q, *self.stored, None, None, **self.options())

    def check(self, got, want):
        assert got.dtype == self.q.dtype
        assert (got.double() - want).abs().max() <= self.tolerance * max(1.0, want.abs().max().item())

    def options(self):
        return {
            "tokens_per_frame": self.tokens_per_frame,
            "block_q": self.block[0],
            "block_k": self.block[1],
            "scales": self.scales,
        }


@contextmanager
def poisoned():
    """Memory that the launcher allocates starts as NaN."""
    empty = torch.empty
    with mock.patch.object(block_sparse.torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(torch.nan)):
        yield


CASES = st.builds(
    Case,
    tokens_per_frame=st.integers(1, 70),
    block=st.tuples(st.sampled_from([16, 32, 128]), st.sampled_from([16, 32, 128])),
    q_frames=st.integers(1, 2),
    past=st.integers(0, 2),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    dim=st.sampled_from([16, 24, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    stored=st.sampled_from([None, *EIGHT_BIT]),
    seed=st.integers(0, 99),
)


# How a launch may be: tiles through descriptors, units beyond the last multiple of `per_sm` cut into parts, halves.
HOW = st.fixed_dictionaries(
    {"descriptors": st.booleans(), "per_sm": st.sampled_from([0, 3, 5, 8]), "halves": st.booleans()}
)


@contextmanager
def launched(**changes):
    """The default launch with changes, and cuts down to one block; gives the prepared launches of every call."""
    calls, default, prepared = [], tuning.default_launch, block_sparse.prepared

    def seen(*arguments):
        calls.append(prepared(*arguments))
        return calls[-1]

    with (
        mock.patch.object(tuning, "default_launch", lambda *kind: default(*kind)._replace(**changes)),
        mock.patch.object(tuning, "MIN_BLOCKS", 1),
        mock.patch.object(block_sparse, "prepared", seen),
    ):
        yield calls
