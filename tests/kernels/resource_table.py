"""What compiled kernels take of each chip, from the rows of `every_variant`: by kind of work, and a line per chip.

As a script: `resource_table.py ROWS RESULT` writes the JSON of benchmarks/results/ahead-of-time.json and prints the
lines. Rows of other code than the last one's are left out.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

COLUMNS = ("variants", "registers", "stack bytes", "shared bytes", "tensor memory columns")


def by_kind(rows, is_timed):
    """Most of each resource by chip and kind of work, untimed or timed; ragged and whole frames are one kind."""
    found = defaultdict(list)
    for row in rows:
        cc, block_q, block_k, _, dtype, stored, _, variant, _ = row["variant"].split(":")
        key = f"sm_{cc} {dtype} {stored} {block_q}×{block_k} {variant} {'timed' if is_timed(row) else 'untimed'}"
        found[key].append([row[name] for name in ("registers", "stack", "shared", "tensor_memory")])
    return {key: [len(taken), *map(max, zip(*taken, strict=True))] for key, taken in found.items()}


def by_chip(rows, is_timed, shared_kib):
    """A Markdown table: what runs untimed and what the tuner may prefer, with the worst of each on each chip."""
    lines = [
        "| chip | launches | variants | most registers | on the stack | most bytes of it | most shared memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for cc in shared_kib:
        for timed in (False, True):
            here = [row for row in rows if row["cc"] == cc and is_timed(row) == timed]
            if here:
                worst = max(here, key=lambda row: row["stack"])
                lines.append(
                    f"| sm_{cc} | {'timed' if timed else 'untimed'} | {len(here):,} "
                    f"| {max(row['registers'] for row in here)} | {sum(row['stack'] > 0 for row in here):,} "
                    f"| {worst['stack']}{f' ({described(worst)})' if worst['stack'] else ''} "
                    f"| {max(row['shared'] for row in here) / 1024:.0f} of {shared_kib[cc]} KiB |"
                )
    return lines


def described(row):
    _, block_q, block_k, _, dtype, stored, _, variant, how = row["variant"].split(":")
    return f"{dtype}{'' if dtype == stored else f' over {stored}'}, {block_q}×{block_k}, {variant}, {how}"


def dumped(rows, is_timed, source):
    """JSON with one kind of work a line."""
    lines = [
        f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(value)}"
        for key, value in sorted(by_kind(rows, is_timed).items())
    ]
    head = json.dumps({"source": source, "columns": COLUMNS}, indent=1)
    return head.removesuffix("\n}") + ',\n "kinds": {\n' + ",\n".join(lines) + "\n }\n}\n"


if __name__ == "__main__":
    from attention_variants import is_timed
    from resources import SHARED_KIB

    read = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    last = read[-1]["source"]
    current = list({row["variant"]: row for row in read if row["source"] == last}.values())
    Path(sys.argv[2]).write_text(dumped(current, is_timed, last), encoding="utf-8")
    print(*by_chip(current, is_timed, SHARED_KIB), sep="\n")
