"""What compiled kernels take of each chip, from the rows of `every_variant`: by kind of work, and as tables.

As a script, `python -m tests.kernels.resource_table ROWS`: writes benchmarks/results/ahead-of-time.json and prints the
tables of its README. Rows of other code than the present one's, and of what no run picks any more, are left out; of
kernels that have none and are as they were the record stays.
"""

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

from .attention_variants import is_timed
from .resources import SHARED_KIB

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "ahead-of-time.json"
COLUMNS = ("variants", "registers", "stack bytes", "shared bytes", "tensor memory columns")


def digest(names):
    """Of a set of variants."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def by_kind(rows):
    """Most of each resource by chip and kind of work; ragged and whole frames are one kind."""
    found = defaultdict(list)
    for row in rows:
        found[kind(row)].append([row[name] for name in ("registers", "stack", "shared", "tensor_memory")])
    return {key: [len(taken), *map(max, zip(*taken, strict=True))] for key, taken in found.items()}


def kind(row):
    """The chip and the kind of work; of the attention also whether it is untimed, timed, or timed with wide tiles."""
    cc, kernel, *rest = row["variant"].split(":")
    if is_attention(row):
        block_k, _, dtype, stored, _, variant, _ = rest
        timed = ("timed wide" if row["tile_k"] == 128 else "timed") if is_timed(row) else "untimed"
        return f"sm_{cc} {dtype} {stored} {kernel}×{block_k} {variant} {timed}"
    of = {"store": rest[:2], "score": rest[:1], "parts": rest[:1], "select": rest[:1], "bias": []}
    return " ".join([f"sm_{cc}", kernel, *of.get(kernel, rest[1:2])])


def is_attention(row):
    return kernel_of(row["variant"]) == "attention"


def attention_table(rows):
    """Markdown: what runs untimed and what the tuner may prefer, with the worst of each on each chip."""
    lines = [
        "| chip | launches | variants | most registers | on the stack | most bytes of it | most shared memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for cc in SHARED_KIB:
        for timed in (False, True):
            here = [row for row in rows if is_attention(row) and row["cc"] == cc and is_timed(row) == timed]
            if here:
                lines.append(
                    f"| sm_{cc} | {'timed' if timed else 'untimed'} | {len(here):,} "
                    f"| {max(row['registers'] for row in here)} | {sum(row['stack'] > 0 for row in here):,} "
                    f"| {most_stack(here)} | {max(row['shared'] for row in here) / 1024:.0f} of {SHARED_KIB[cc]} KiB |"
                )
    return lines


def fused_table(rows):
    """Markdown: the other kernels, over all chips."""
    lines = [
        "| kernel | variants | most registers | on the stack | most bytes of it | most shared memory |",
        "|---|---|---|---|---|---|",
    ]
    found = defaultdict(list)
    for row in rows:
        if not is_attention(row):
            found[row["variant"].split(":")[1]].append(row)
    for kernel, here in found.items():
        lines.append(
            f"| {kernel} | {len(here):,} | {max(row['registers'] for row in here)} "
            f"| {sum(row['stack'] > 0 for row in here):,} | {most_stack(here)} "
            f"| {max(row['shared'] for row in here) / 1024:.0f} KiB |"
        )
    return lines


def most_stack(rows):
    """The most stack bytes per thread, and of which variant."""
    worst = max(rows, key=lambda row: row["stack"])
    if not worst["stack"]:
        return "0"
    if not is_attention(worst):
        return f"{worst['stack']} ({worst['variant']})"
    _, block_q, block_k, _, dtype, stored, _, variant, how = worst["variant"].split(":")
    dtypes = dtype if dtype == stored else f"{dtype} over {stored}"
    return f"{worst['stack']} ({dtypes}, {block_q}×{block_k}, {variant}, {how})"


def record_of(names, rows, sources, last):
    """The new record from `rows` by name, and from the `last` one of each kernel that is as it was and has no rows."""
    kinds, variants = {}, {}
    for kernel, source in sources.items():
        wanted = [name for name in names if kernel_of(name) == kernel]
        variants[kernel] = digest(wanted)
        if missing := [name for name in wanted if name not in rows]:
            if (last["sources"].get(kernel), last["variants"].get(kernel)) != (source, variants[kernel]):
                raise SystemExit(f"{len(missing):,} variants of {kernel} are not compiled, {missing[0]} is one of them")
            kinds |= {kind: taken for kind, taken in last["kinds"].items() if kernel_of_kind(kind) == kernel}
        else:
            kinds |= by_kind([rows[name] for name in wanted])
    return {"sources": sources, "variants": variants, "columns": COLUMNS, "kinds": dict(sorted(kinds.items()))}


def kernel_of(name):
    """Which kernel a variant's name is one of."""
    kernel = name.split(":")[1]
    return "attention" if kernel.isdigit() else kernel


def kernel_of_kind(key):
    kernel = key.split()[1]
    return "attention" if kernel in ("bf16", "fp16", "fp32") else kernel


def dumped(record):
    """JSON with one kind of work a line."""
    head = {name: value for name, value in record.items() if name != "kinds"}
    lines = [f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(taken)}" for key, taken in record["kinds"].items()]
    return json.dumps(head, indent=1).removesuffix("\n}") + ',\n "kinds": {\n' + ",\n".join(lines) + "\n }\n}\n"


if __name__ == "__main__":
    from .every_variant import CODE, every_name, identity, is_current

    read = map(json.loads, Path(sys.argv[1]).read_text().splitlines())
    rows = {row["variant"]: row for row in read if is_current(row)}
    names = every_name()
    last = json.loads(RECORD.read_text(encoding="utf-8"))
    sources = {kernel: identity(kernel) for kernel in CODE}
    RECORD.write_text(dumped(record_of(names, rows, sources, last)), encoding="utf-8")
    current = [rows[name] for name in names if name in rows]
    print(*attention_table(current), "", *fused_table(current), sep="\n")
