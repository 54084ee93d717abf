"""Sparse Forcing's memory by the book, one head and one block at a time, in float64."""

import torch


class Block:
    """The keys and values of one block of one head, [tokens, D] each, and the attention that it last got."""

    def __init__(self, k, v):
        self.k, self.v, self.got = k.double(), v.double(), 0.0


class Memory:
    """What one layer sees. size: tokens per block; persistent: blocks that stay, of those that are whole and others."""

    def __init__(self, window, sinks, size, persistent):
        self.window, self.sinks, self.size, self.persistent = window, sinks, size, persistent
        self.frames, self.pool = {}, {}  # by frame, then by (video, head), their blocks

    def cut(self, x):
        """Blocks of one frame of queries, keys or values, [B, tokens, H, D], by (video, head)."""
        return {(b, h): x[b, :, h].split(self.size) for b in range(x.shape[0]) for h in range(x.shape[2])}

    def see(self, start, keys, values):
        """Hold the frames of a chunk from `start` on, and let older ones leave; keys, values: one per frame."""
        past = [frame for frame in self.frames if frame < start]
        leaving = max(0, len(past) + len(keys) - self.window)
        for frame in past[self.sinks :][:leaving]:
            for place, blocks in self.frames.pop(frame).items():
                self.pool[place] = self.pool.get(place, []) + blocks
        for place, blocks in self.pool.items():
            stay = []
            for whole, most in zip((True, False), self.persistent, strict=True):
                alike = [one for one in blocks if (len(one.k) == self.size) is whole]
                stay += sorted(alike, key=lambda one: -one.got)[:most]
            self.pool[place] = [one for one in blocks if one in stay]
        for frame, (k, v) in enumerate(zip(keys, values, strict=True), start):
            parts, others = self.cut(k), self.cut(v)
            self.frames[frame] = {at: list(map(Block, parts[at], others[at])) for at in parts}

    def read(self, queries, sparsity, clean):
        """Attention of a chunk's frames [B, tokens, H, D] each; `clean` queries say how much each block matters."""
        out = [torch.empty_like(q) for q in queries]
        for b, h in self.cut(queries[0]):
            window = [block for frame in self.frames.values() for block in frame[b, h]]
            pool = self.pool.get((b, h), [])
            many = max(1, int((1 - sparsity) * len(window)))
            got = dict.fromkeys([*window, *pool], 0.0)
            for q, y in zip(queries, out, strict=True):
                for at, rows in enumerate(self.cut(q)[b, h]):
                    mean, scale = rows.double().mean(0), rows.shape[1] ** -0.5
                    score = {one: float(mean @ one.k.mean(0)) * scale for one in got}
                    mass = {one: len(one.k) * torch.tensor(score[one]).exp().item() for one in got}
                    got = {one: got[one] + mass[one] / sum(mass.values()) for one in got}
                    chosen = sorted(window, key=lambda one: -score[one])[:many] + pool
                    if not sparsity or len(self.frames) == len(queries):
                        chosen = window
                    k, v = torch.cat([one.k for one in chosen]), torch.cat([one.v for one in chosen])
                    weights = (rows.double() @ k.T * scale).softmax(-1)
                    y[b, at * self.size : at * self.size + len(rows), h] = (weights @ v).to(y.dtype)
            if clean:
                for one in got:
                    one.got = got[one]
        return out
