"""Selection rules of published methods, one block and one token at a time, in Python's numbers.

Frames are in the order of time. Each function returns the key blocks that one query block reads, ascending.
"""

import math
from itertools import pairwise


def blocks_of(tokens, size):
    """Token ranges of a frame's blocks."""
    return [range(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def radial(frames, query_frame, query_block, tokens, q_size, k_size, decay):
    power = 1
    while power <= tokens:
        power *= 2
    rows, read = blocks_of(tokens, q_size)[query_block], []
    for at, frame in enumerate(frames):
        distance, part = abs(query_frame - frame), 1
        while part <= distance:
            part *= 2
        for block, columns in enumerate(blocks_of(tokens, k_size)):
            if frame == 0 or distance <= 1:
                chosen = True
            elif power / part < 128 and distance % int(128 * part / power):
                chosen = False
            else:
                width = int(max(k_size, power / part * decay))
                hits = [sum(abs(row - column) <= width for row in rows) for column in columns]
                some = [n for n in hits if n]
                chosen = sum(3 * n > len(rows) for n in some) > 0.6 * len(some)
            if chosen:
                read.append(at * len(blocks_of(tokens, k_size)) + block)
    return read


def tiles(grid, window, own):
    """Sliding tiles on a grid of time × rows × columns of tiles; own: the tile (t, y, x) that asks."""
    ranges = []
    for size, width, at in zip(grid, window, own, strict=True):
        reach = width // 2
        centre = min(max(at, reach), size - 1 - reach)
        ranges.append([j for j in range(size) if abs(j - centre) <= reach])
    return [(t * grid[1] + y) * grid[2] + x for t in ranges[0] for y in ranges[1] for x in ranges[2]]


def spatial_band(frames, query_frame, query_block, tokens, q_size, k_size, reach):
    rows = [query_frame * tokens + row for row in blocks_of(tokens, q_size)[query_block]]
    read = []
    for at, frame in enumerate(frames):
        for block, columns in enumerate(blocks_of(tokens, k_size)):
            near = min(abs(row - frame * tokens - column) for row in rows for column in columns) <= reach * tokens
            if at == 0 or near:
                read.append(at * len(blocks_of(tokens, k_size)) + block)
    return read


def softmax(scores):
    largest = max(scores)
    terms = [math.exp(score - largest) for score in scores]
    return [term / sum(terms) for term in terms]


def top_p(shares, limit):
    """The largest shares until their sum is more than limit."""
    read, total = [], 0.0
    for block in sorted(range(len(shares)), key=lambda block: -shares[block]):
        if read and total > limit:
            break
        read.append(block)
        total += shares[block]
    return sorted(read)


def best_of_all(rows, average):
    """The largest shares of all rows together, `average` per row, at least one in each: lists of blocks."""
    read = [{max(range(len(row)), key=lambda block, row=row: row[block])} for row in rows]
    left = average * len(rows) - len(rows)
    others = [(-row[block], at, block) for at, row in enumerate(rows) for block in range(len(row))]
    for _, at, block in sorted(others):
        if left and block not in read[at]:
            read[at].add(block)
            left -= 1
    return [sorted(blocks) for blocks in read]


def vmoba(scores, own, limit):
    lowest = min(scores)
    total = sum(score - lowest for score in scores)
    shares = [(score - lowest) / total for score in scores]
    read, sum_of_others = set(own), 0.0
    for block in sorted(set(range(len(scores))) - own, key=lambda block: (-shares[block], block)):
        if len(read) > len(own) and sum_of_others > limit - sum(shares[block] for block in own):
            break
        read.add(block)
        sum_of_others += shares[block]
    return sorted(read)


def segments(blocks):
    """The ids of a frame's blocks in six runs, the longer ones first."""
    short, longer = divmod(blocks, 6)
    ids, runs = list(range(blocks)), []
    for run in range(6):
        size = short + (run < longer)
        runs.append(ids[:size])
        ids = ids[size:]
    return runs


def forcing_kv(frames, own, dynamic, changed, per_frame):
    """changed: (frame among the three before the last past one, segment) pairs. frames: how many are visible."""
    past = frames - own
    read = {at * per_frame + block for at in (0, past - 1, *range(past, frames)) for block in range(per_frame)}
    for at, segment in changed if dynamic else ():
        read |= {(past - 4 + at) * per_frame + block for block in segments(per_frame)[segment]}
    return sorted(read)


def dummy_forcing(frames, own, role, near, per_frame):
    past = frames - own
    reads = {"first": range(1), "near": range(max(0, past - near), past), "last": range(past - 1, past)}[role]
    return sorted(at * per_frame + block for at in (*reads, *range(past, frames)) for block in range(per_frame))


def changed(keys, heads, tokens, block, count):
    """The segments that differ most from the next frame: keys [frame][token][head] are lists of numbers."""
    scores = []
    of_block = {block: number for number, run in enumerate(segments(-(-tokens // block))) for block in run}
    for now, following in pairwise(keys):
        alike = [[] for _ in range(6)]
        for token in range(tokens):
            a, b = ([x for head in heads for x in frame[token][head]] for frame in (now, following))
            product = sum(x * y for x, y in zip(a, b, strict=True))
            alike[of_block[token // block]].append(product / math.hypot(*a) / math.hypot(*b))
        scores += [sum(one) / len(one) for one in alike]
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count])


def masses(q, keys, groups):
    """The mean share of attention of each group of keys; q, keys: lists of vectors, groups: lists of key indices."""
    totals = [0.0] * len(groups)
    for row in q:
        shares = softmax([sum(x * y for x, y in zip(row, key, strict=True)) / len(row) ** 0.5 for key in keys])
        totals = [total + sum(shares[key] for key in group) for total, group in zip(totals, groups, strict=True)]
    return [total / len(q) for total in totals]
