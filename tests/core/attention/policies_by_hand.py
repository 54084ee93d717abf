"""Selection rules of published methods, one block and one token at a time, in Python's numbers.

Frames are in the order of time. Each function returns the key blocks that one query block reads, ascending.
"""

import math


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
    read, sum_of_others = {own}, 0.0
    for block in sorted(set(range(len(scores))) - {own}, key=lambda block: (-shares[block], block)):
        if len(read) > 1 and sum_of_others > limit - shares[own]:
            break
        read.add(block)
        sum_of_others += shares[block]
    return sorted(read)
