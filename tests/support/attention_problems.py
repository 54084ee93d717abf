"""Random problems for the front door of sparse attention, what they stand for in float64, and brute force."""

import torch
from hypothesis import strategies as st

from lightforcing.lightforcing_core.attention import attention_backends
from lightforcing.lightforcing_core.attention import dispatch as attention
from lightforcing.lightforcing_core.attention.dispatch import sparse_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EIGHT_BIT = [torch.int8, torch.float8_e4m3fn]
SHAPES = [(40, (32, 16), 1, 3), (64, (16, 32), 2, 2), (100, (64, 64), 1, 2)]
# Sizes of problems for the reference, as hypothesis draws them.
SIZES = {
    "tokens_per_frame": st.integers(1, 40),
    "block": st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32, 64])),
    "q_frames": st.integers(1, 2),
    "k_frames": st.integers(2, 3),
    "batch": st.integers(1, 2),
    "dim": st.sampled_from([8, 24]),
}


def spans(frames, tokens_per_frame, block):
    """The token range of every block, frame by frame, the last one of a frame cut at the frame's end."""
    firsts = [(f * tokens_per_frame, s) for f in range(frames) for s in range(0, tokens_per_frame, block)]
    return [(first + start, first + min(start + block, tokens_per_frame)) for first, start in firsts]


class Problem:
    """Random queries, stored keys and values with their scales, what these stand for in float64, mask and means."""

    def __init__(self, tokens_per_frame, block, q_frames, k_frames, stored, *, batch=1, heads=2, dim=32, dtype=None):
        generator = torch.Generator().manual_seed(tokens_per_frame + block[0] + k_frames)
        self.tokens_per_frame, self.block = tokens_per_frame, block
        self.q_spans, self.k_spans = (
            spans(frames, tokens_per_frame, size) for frames, size in zip((q_frames, k_frames), block, strict=True)
        )
        shape = (batch, k_frames * tokens_per_frame, heads, dim)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

        self.dtype = dtype or torch.float32
        self.q = normal(batch, q_frames * tokens_per_frame, heads, dim).to(self.dtype)
        self.mask = torch.rand(batch, heads, len(self.q_spans), len(self.k_spans), generator=generator) < 0.4
        self.mask[-1, -1, -1] = True
        if len(self.q_spans) > 1:
            self.mask[0, 0, 0] = False
        self.mask = self.mask.to(DEVICE)
        self.means = tuple(normal(batch, len(self.k_spans), heads, dim).to(self.dtype) for _ in range(2))
        self.kv, self.scales, self.exact = [], None, []
        if stored in EIGHT_BIT:
            self.scales = tuple(
                (2.0 ** torch.randint(-9, -4, (batch, len(self.k_spans), heads), generator=generator)).to(DEVICE)
                for _ in range(2)
            )
        for side in range(2):
            if stored in EIGHT_BIT:
                numbers = (normal(*shape) * 40).clamp(-127, 127).to(stored)
                exact = numbers.double()
                for i, (start, end) in enumerate(self.k_spans):
                    exact[:, start:end] *= self.scales[side][:, i : i + 1, :, None].double()
            else:
                numbers = normal(*shape).to(self.dtype)
                exact = numbers.double()
            self.kv.append(numbers)
            self.exact.append(exact)

    def brute_force(self, mask, means=None):
        """Float64, one row of the mask at a time; with means every block that is not in the row is one key."""
        return self.brute_force_and_lse(mask, means)[0]

    def brute_force_and_lse(self, mask, means=None):
        """The same and the log-sum-exp of each query's scores, −inf without any."""
        k, v = self.exact
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=DEVICE)
        lse = torch.full(self.q.shape[:-1], -torch.inf, dtype=torch.float64, device=DEVICE)
        for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:3])).tolist():
            keys, values, extra = [], [], []
            for i, (start, end) in enumerate(self.k_spans):
                if mask[b, h, row, i]:
                    keys.append(k[b, start:end, h])
                    values.append(v[b, start:end, h])
                    extra.append(torch.zeros(end - start, dtype=torch.float64, device=DEVICE))
                elif means:
                    keys.append(means[0][b, i : i + 1, h].double())
                    values.append(means[1][b, i : i + 1, h].double())
                    extra.append(torch.tensor([end - start], dtype=torch.float64, device=DEVICE).log())
            if keys:
                first, last = self.q_spans[row]
                scores = self.q[b, first:last, h].double() @ torch.cat(keys).T / self.q.shape[-1] ** 0.5
                scores += torch.cat(extra)
                out[b, first:last, h] = scores.softmax(-1) @ torch.cat(values)
                lse[b, first:last, h] = scores.logsumexp(-1)
        return out, lse

    def attend(self, backend, **rest):
        return sparse_attention(
            self.q,
            *self.kv,
            mask=self.mask,
            tokens_per_frame=self.tokens_per_frame,
            block=self.block,
            backend=backend,
            scales=self.scales,
            **rest,
        )


def let_flex_fail(monkeypatch):
    """`auto` takes flex for calls of any size, and it raises."""
    monkeypatch.setattr(attention, "_failures", {})
    monkeypatch.setattr(attention, "FLEX_MIN_SCORES", 0)
    monkeypatch.setitem(attention_backends.WHY_NOT, "flex", lambda request: None)

    def fails(call):
        raise RuntimeError("not today")

    monkeypatch.setitem(attention_backends.RUN, "flex", fails)
