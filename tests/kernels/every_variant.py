"""Compiles every variant that a run can pick, see `attention_variants` and `fused_variants`: a row of JSON for each.

Run as a process of its own, without TRITON_INTERPRET, with the file's path, and with the names of kernels where not all
are wanted; a run that was interrupted goes on with its rows. Chips of one family are given the same PTX but for its
label, so that is made once and assembled for each.
"""

import functools
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import tokenize
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import KernelInterface

from lightforcing.kernels import attend, modulation, rounding, selection, store

from . import attention_variants, fused_variants
from .ahead_of_time import fused_kernel, fused_row, prepare, row_of
from .attention_variants import CHIPS, name_of
from .resource_table import kernel_of
from .resources import SHARED_KIB

FAMILIES = ((80, 86, 89), (90,), (100, 103), (120,))
CODE = {
    "attention": (attend,),
    "store": (store, rounding),
    "score": (selection,),
    "parts": (selection,),
    "select": (selection,),
    "norm_scale_shift": (modulation, rounding),
    "gated_add": (modulation, rounding),
    "bias": (attend,),
}


@functools.cache
def identity(kernel):
    """What a kernel's rows depend on besides their variants: rows of other code are not gone on with."""
    sources = [
        inspect.getsource(one.fn)
        for module in CODE[kernel]
        for one in vars(module).values()
        if isinstance(one, KernelInterface) and one.fn.__module__ == module.__name__
    ]
    tokens = (token for text in sources for token in tokenize.generate_tokens(io.StringIO(text).readline))
    code = " ".join(token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL))
    return f"triton {triton.__version__} {hashlib.sha256(code.encode()).hexdigest()[:16]}"


def every_name():
    """The names of all variants, on all chips."""
    return [name for names, _ in tasks() for name in names.values()]


@functools.cache
def tasks():
    """Names by chips of one family, and a function that compiles them; what runs untimed comes first."""
    return [*map(fused_task, fused_families()), *(attention_task(*family) for family in attention_families())]


def fused_families():
    """Names by chip, those of one family together."""
    names = {cc: [name.partition(":")[2] for name in fused_variants.names(cc)] for cc in CHIPS}
    for family in FAMILIES:
        for name in dict.fromkeys(itertools.chain(*(names[cc] for cc in family))):
            yield {cc: f"{cc}:{name}" for cc in family if name in names[cc]}


def attention_families():
    """(kind, launch, chips of one family), by how far they are from running untimed."""
    found = []
    for kind, family in itertools.product(attention_variants.kinds(), FAMILIES):
        chips = [cc for cc in family if attention_variants.runs_on(kind, cc)]
        launches = {cc: attention_variants.launches(kind, cc, SHARED_KIB[cc]) for cc in chips}
        for launch in dict.fromkeys(itertools.chain(*launches.values())):
            found.append((kind, launch, [cc for cc in chips if launch in launches[cc]]))
    return sorted(found, key=lambda each: attention_variants.distance(*each[:2]))


def fused_task(names):
    def compiled():
        first = next(iter(names))
        kernel = fused_kernel(first, names[first])
        for cc, name in names.items():
            yield fused_row(cc, name, kernel, machine_code(kernel, cc, first))

    return names, compiled


def attention_task(kind, launch, chips):
    names = {cc: name_of(cc, kind, launch) for cc in chips}

    def compiled():
        first = chips[0]
        kernels = prepare(first, kind, launch, 1560 if any(kind.ragged) else 1536, 21, 60)
        for cc, name in names.items():
            yield row_of(cc, launch, name, *kernels[:1], kernels[1:], [machine_code(x, cc, first) for x in kernels])

    return names, compiled


def machine_code(kernel, cc, made_for):
    """Of a kernel whose PTX was made for another chip of the same family."""
    if cc == made_for:
        return kernel.asm["cubin"]
    backend = make_backend(GPUTarget("cuda", cc, 32))
    ptx = re.sub(r"(\.target sm_)\d+", rf"\g<1>{cc}", kernel.asm["ptx"])
    return backend.make_cubin(ptx, {}, backend.parse_options({}), cc)


def compile_all(file, *kernels):
    """Add the rows of these kernels, or of all, that `file` lacks; every core takes a share."""
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # an interrupted run may have left half a row
    file.write_text(whole)
    known = {row["variant"] for row in map(json.loads, whole.splitlines()) if is_current(row)}
    wanted = [kernel_of(next(iter(names.values()))) in (kernels or CODE) for names, _ in tasks()]
    missing = [index for index, (names, _) in enumerate(tasks()) if wanted[index] and not known >= set(names.values())]
    spawn = multiprocessing.get_context("spawn")
    with file.open("a") as out, ProcessPoolExecutor(mp_context=spawn, initializer=own_cache) as pool:
        for rows in pool.map(compile_task, missing):
            for row in rows:
                print(json.dumps(row), file=out, flush=True)


def is_current(row):
    """Whether a row is of the kernel's code as it is now."""
    return row["source"] == identity(kernel_of(row["variant"]))


def compile_task(index):
    """The rows of one of the tasks. Compiled code is forgotten, but for the kernel that adds parts up."""
    _, compiled = tasks()[index]
    rows = [row | {"source": identity(kernel_of(row["variant"]))} for row in compiled()]
    for kernel in (attend.forward, store._store):
        kernel.device_caches.clear()
    shutil.rmtree(triton.knobs.cache.dir, ignore_errors=True)
    return rows


def own_cache():
    """Triton's, of this process alone: it is emptied after every task."""
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / str(os.getpid()))


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), *sys.argv[2:])
