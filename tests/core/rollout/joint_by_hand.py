"""Rolling Forcing by the book, in float64: every key before RoPE and every value is held, and roped in every pass."""

import torch

from ...support import naive_wan as naive

STEPS = (1000, 800, 600, 400, 200)
LEVELS = [5 * s / (1000 + 4 * s) for s in STEPS]


def windows(chunks, levels):
    """The chunks of every joint pass with their noise levels, oldest first."""
    many = len(levels)
    for last in range(chunks + many - 1):
        yield {chunk: levels[last - chunk] for chunk in range(max(0, last - many + 1), min(chunks, last + 1))}


def joint_keys(start, frames, sinks, window):
    """The frames before a joint pass's own and their places in time: (frame, place)."""
    room = window - frames
    if start <= room:
        return [(frame, frame) for frame in range(start)]
    working = range(start - (room - sinks), start)
    return [(frame, working.start - sinks + frame) for frame in range(sinks)] + [(frame, frame) for frame in working]


class Book:
    """A model without a cache. weights: its state dict; context: [tokens, text_dim]; size: (rows, columns)."""

    def __init__(self, weights, context, layers, size):
        self.weights, self.context, self.layers, self.size = weights, context, layers, size
        self.held = [{} for _ in range(layers)]  # frame → its key before RoPE, and its value

    def flow(self, x, times, start, seen, keep=False):
        """The flow of frames from `start` on, [C, F, h, w], that see `seen`: (frame, place), and each other."""
        tokens = self.size[0] * self.size[1]

        def attend(layer, q, k, v):
            past = [self.held[layer][frame] for frame, _ in seen]
            keys, values = (torch.cat(parts) for parts in zip(*past, (k, v), strict=True))
            places = torch.tensor([*(place for _, place in seen), *range(start, start + x.shape[1])])
            grid = torch.cartesian_prod(places, *map(torch.arange, self.size))
            if keep:
                parts = zip(k.split(tokens), v.split(tokens), strict=True)
                self.held[layer] |= dict(enumerate(parts, start))
            return naive.attend(naive.rope(q, grid[-len(q) :]), naive.rope(keys, grid), values)

        return naive.naive_forward(self.weights, x, times, self.context, self.layers, self_attention=attend)


def rolled(book, draw, lengths, *, window=21, sinks=3, levels=LEVELS, noise_of_context=0.0, scale=None):
    """The video of every chunk's last prediction. draw(chunk, number) → noise [C, F, h, w]."""
    starts = [sum(lengths[:chunk]) for chunk in range(len(lengths) + 1)]
    noisy, clean = {}, {}
    for at_once in windows(len(lengths), levels):
        oldest, *_ = at_once
        for chunk in at_once.keys() - noisy.keys():
            noisy[chunk] = draw(chunk, 0)
        x = torch.cat([noisy[chunk] for chunk in at_once], dim=1)
        each = torch.cat([torch.full((lengths[chunk],), level) for chunk, level in at_once.items()]).double()
        start = starts[oldest]
        flow = book.flow(x, 1000 * each, start, joint_keys(start, x.shape[1], sinks, window) if oldest else [])
        x0 = x - each[:, None, None] * flow
        for chunk, level in at_once.items():
            clean[chunk] = x0[:, starts[chunk] - start : starts[chunk + 1] - start]
            if level != levels[-1]:
                step = levels.index(level) + 1
                noisy[chunk] = (1 - levels[step]) * clean[chunk] + levels[step] * draw(chunk, step)
        seen = range(max(0, starts[oldest + 1] - window), start) if oldest else ()
        times = torch.full((lengths[oldest],), noise_of_context)
        book.flow(clean[oldest], times, start, [(frame, frame) for frame in seen], keep=True)
    return torch.cat([clean[chunk] for chunk in range(len(lengths))], dim=1)
