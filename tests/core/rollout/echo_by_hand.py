"""Echo-Forcing's window by the book: everything before RoPE, roped by slot, with scores of one pair at a time."""

import cmath
import math
from itertools import chain, cycle, islice

import torch

from ...support import naive_wan as naive


def pairs_of(x):
    """[..., 2 n] → complex [..., n]."""
    return torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())


def score(key, mean, length, ahead, frequencies, gate):
    """The score of one key by one head, [n] complex each but `length`; frequencies: of its temporal pairs."""
    total = 0.0
    for offset in (1, 2, 4, 8, 16):
        for pair, (k, q) in enumerate(zip(key.tolist(), mean.tolist(), strict=True)):
            turn = (ahead + offset) * frequencies[pair] if pair < len(frequencies) else 0.0
            total += abs(q) * abs(k) * math.cos(turn + cmath.phase(q * k.conjugate())) / 5
    extra = zip(key.tolist(), mean.tolist(), length.tolist(), strict=True)
    return total + gate * sum((far - abs(q)) * abs(k) for k, q, far in extra)


class Layer:
    """What one layer of one video sees. window: in frames. rows, columns: of a frame's tokens."""

    def __init__(self, window, rows, columns):
        self.window, self.rows, self.columns = window, rows, columns
        self.keys, self.values, self.queries = [], [], []  # by frame, [tokens, H, 128]
        self.last = 0  # frames of the last chunk

    def chosen(self, length):
        """Frame and token of those that the next chunk of `length` frames sees, by the last chunk's clean queries."""
        end = len(self.keys)
        first = [pairs_of(q) for q in self.queries if q is not None]
        means, lengths = torch.cat(first).mean(0), torch.cat(first).abs().mean(0)  # [H, 64]
        now = torch.cat([pairs_of(q) for q in self.now]).mean(0)
        near = (
            (means * now.conj()).real.sum(-1) / means.abs().square().sum(-1).sqrt() / now.abs().square().sum(-1).sqrt()
        )
        frequencies = [10000 ** (-2 * j / 44) for j in range(22)]
        found = []
        for frame in range(max(0, end - self.window), end - length):
            for token, heads in enumerate(pairs_of(self.keys[frame])):
                of_heads = [
                    score(k, means[h], lengths[h], end - frame, frequencies, math.exp(-3 * (1 - float(near[h]))))
                    for h, k in enumerate(heads)
                ]
                found.append((sum(of_heads) / len(of_heads), (frame, token)))
        best = sorted(found, key=lambda one: -one[0])[: length * self.rows * self.columns]
        return sorted(at for _, at in best)

    def attend(self, q, k, v, commit):
        tokens = self.rows * self.columns
        past, length = len(self.keys), len(k) // tokens
        if past + length <= self.window:
            seen, shift = [(frame, t) for frame in range(past) for t in range(tokens)], past
        else:
            sinks = self.window - 3 * length
            order = islice(chain(range(sinks), cycle([*range(sinks)[::-1], *range(sinks)])), past + length)
            area = list(order)[past + length - self.window :][:sinks]
            near = range(past - length, past)
            seen = [(frame, t) for frame in area for t in range(tokens)]
            seen += self.chosen(length) + [(frame, t) for frame in near for t in range(tokens)]
            shift = self.window - length
        keys = torch.cat([torch.stack([self.keys[f][t] for f, t in seen]), k]) if seen else k
        values = torch.cat([torch.stack([self.values[f][t] for f, t in seen]), v]) if seen else v
        if commit:
            self.keys += k.split(tokens)
            self.values += v.split(tokens)
            self.now = q.split(tokens)
            self.queries += self.now if past + length <= self.window else [None] * length
        grid = torch.cartesian_prod(torch.arange(shift + length), torch.arange(self.rows), torch.arange(self.columns))
        return naive.attend(naive.rope(q, grid[-len(q) :]), naive.rope(keys, grid), values)
