"""Random problems for sparse attention, what they mean in float64, and brute force."""

import math

import torch

from lightforcing.lightforcing_core import fast_path
from lightforcing.lightforcing_core.attention.backends import BACKENDS, flex
from lightforcing.lightforcing_core.attention.backends.base import Call
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.dispatch import attend, choose
from lightforcing.lightforcing_core.attention.selection import BlockSelection, FrameBudget, SelectionPlan, View

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EIGHT_BIT = [torch.int8, torch.float8_e4m3fn]
SHAPES = [(40, (32, 16), 1, 3), (64, (16, 32), 2, 2), (100, (64, 64), 1, 2)]
RING = [0, 10, 11, 12, 4, 5, 6, 7, 8, 9]  # the frame that each slot holds: a sink, then a window that has wrapped
LARGEST = torch.finfo(torch.float32).max


def spans(frames, tokens_per_frame, block):
    """The token range of every block, frame by frame, the last one of a frame cut at the frame's end."""
    firsts = [(f * tokens_per_frame, s) for f in range(frames) for s in range(0, tokens_per_frame, block)]
    return [(first + start, first + min(start + block, tokens_per_frame)) for first, start in firsts]


def brute_force(q, k, v, mask, tokens_per_frame, block, means=None):
    """Attention in float64, one row of the mask at a time.

    With means every block that is not in the row is one key. A query without keys gives zeros.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    q_spans, k_spans = (
        spans(x.shape[1] // tokens_per_frame, tokens_per_frame, size) for x, size in zip((q, k), block, strict=True)
    )
    assert mask.shape == (q.shape[0], q.shape[2], len(q_spans), len(k_spans))
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:3])).tolist():
        keys, values, extra = [], [], []
        for i, (start, end) in enumerate(k_spans):
            if mask[b, h, row, i]:
                keys.append(k[b, start:end, h].double())
                values.append(v[b, start:end, h].double())
                extra.append(torch.zeros(end - start, dtype=torch.float64, device=q.device))
            elif means:
                keys.append(means[0][b, i : i + 1, h].double())
                values.append(means[1][b, i : i + 1, h].double())
                extra.append(torch.tensor([end - start], dtype=torch.float64, device=q.device).log())
        if keys:
            first, last = q_spans[row]
            scores = q[b, first:last, h].double() @ torch.cat(keys).T / q.shape[-1] ** 0.5 + torch.cat(extra)
            out[b, first:last, h] = scores.softmax(-1) @ torch.cat(values)
    return out


class Problem:
    """Random queries, stored keys and values with their scales, what these are in float64, a mask and means.

    One query block of the first head reads nothing.
    """

    def __init__(
        self,
        tokens_per_frame,
        block,
        q_frames,
        k_frames,
        stored=None,
        *,
        batch=1,
        heads=2,
        dim=32,
        dtype=None,
        density=0.4,
    ):
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
        self.mask = torch.rand(batch, heads, len(self.q_spans), len(self.k_spans), generator=generator) < density
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

    def brute_force(self, mask=None, means=None):
        """The output in float64; the problem's own mask unless another is given."""
        mask = self.mask if mask is None else mask
        return brute_force(self.q, *self.exact, mask, self.tokens_per_frame, self.block, means)

    def call(self, **rest):
        options = {"mask": self.mask, "scales": self.scales} | rest
        if (mask := options.pop("mask")) is not None:
            options |= {"selection": BlockSelection.from_mask(mask), "uneven": True}
        layouts = (FrameBlocks(self.tokens_per_frame, size) for size in self.block)
        return Call(self.q, *self.kv, *layouts, **options)

    def attend(self, backend, **rest):
        """The result of one backend, or of "auto"."""
        call = self.call(**rest)
        return attend(call, choose(call, backend), backend)[0]


def let_flex_fail(monkeypatch, error="not today"):
    """`auto` takes flex for calls of any size, and it raises."""
    fast_path.begin_run()
    monkeypatch.setattr(flex, "FLEX_MIN_SCORES", 0)
    (backend,) = (one for one in BACKENDS if one.name == "flex")

    def fails(call):
        raise RuntimeError(error)

    monkeypatch.setattr(backend, "why_not", lambda call: None, raising=False)
    monkeypatch.setattr(backend, "run", fails, raising=False)


def selection_plan(slot_frames, current, layout, sparsity, *, keep_frames=6, sink_frames=1, near_frames=2, device=None):
    """The plan of a chunk of `current` frames, with the published budget."""
    view = View(slot_frames, current, layout, layout, 1, 1, device)
    return SelectionPlan.build(view, sparsity, FrameBudget(keep_frames, sink_frames, near_frames))


def finite(score):
    """A score as the selection counts it."""
    return -LARGEST if math.isnan(score) else min(max(score, -LARGEST), LARGEST)


def brute_force_selection(q_means, k_means, frame_means, slot_frames, current, keep, sinks, near, kept):
    """The rule of HSA for one query block at a time, over float64 scores: lists of ascending ids [B][H][q_blocks]."""
    q, k, f = (x.cpu().double() for x in (q_means, k_means, frame_means))
    per_frame = k.shape[1] // f.shape[1]
    by_age = sorted(range(len(slot_frames)), key=slot_frames.__getitem__)
    past, now = by_age[:-current], by_age[-current:]
    keep = max(keep, math.ceil(kept / per_frame) - current)  # as many frames as hold `kept` blocks
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                slots = past + now
                if len(past) > keep:
                    middle = past[sinks : len(past) - near]
                    value = {slot: finite(float(q[b, i, h] @ f[b, slot, h])) for slot in middle}
                    # Python's sort is stable and `middle` starts with the oldest frame.
                    best = sorted(middle, key=lambda slot: -value[slot])[: keep - sinks - near]
                    slots = past[:sinks] + best + past[len(past) - near :] + now
                ids = sorted(slot * per_frame + j for slot in slots for j in range(per_frame))
                value = {j: finite(float(q[b, i, h] @ k[b, j, h])) for j in ids}
                rows.append(sorted(sorted(ids, key=lambda j: -value[j])[:kept]))
    return torch.tensor(rows, dtype=torch.int32).view(q.shape[0], q.shape[2], q.shape[1], kept)
