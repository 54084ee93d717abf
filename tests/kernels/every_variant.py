"""Compiles every variant that a run can pick, see `attention_variants`: a row of JSON each, in a file.

Run as a process of its own, without TRITON_INTERPRET, with the file's path; a run that was interrupted goes on with
its rows. Chips of one family are given the same PTX but for its label, so that is made once and assembled for each.
"""

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import attention_variants
import triton
from ahead_of_time import prepare, row_of
from attention_variants import name_of
from resources import SHARED_KIB
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from lightforcing.kernels import block_sparse

FAMILIES = ((80, 86, 89), (90,), (100, 103), (120,))


def families():
    """(kind, launch, chips of one family) of all code to compile, what runs untimed first."""
    found = []
    for kind, family in itertools.product(attention_variants.kinds(), FAMILIES):
        chips = [cc for cc in family if attention_variants.runs_on(kind, cc)]
        launches = {cc: attention_variants.launches(kind, cc, SHARED_KIB[cc]) for cc in chips}
        for launch in dict.fromkeys(itertools.chain(*launches.values())):
            found.append((kind, launch, [cc for cc in chips if launch in launches[cc]]))
    return sorted(found, key=lambda each: attention_variants.distance(*each[:2]))


def assembled(ptx, cc):
    """Machine code of PTX that was made for another chip of the same family."""
    backend = make_backend(GPUTarget("cuda", cc, 32))
    ptx = re.sub(r"(\.target sm_)\d+", rf"\g<1>{cc}", ptx)
    return backend.make_cubin(ptx, {}, backend.parse_options({}), cc)


def compile_family(kind, launch, chips):
    """One row per chip."""
    kernel, *others = prepare(chips[0], kind, launch, 1560 if any(kind.ragged) else 1536, 21, 60)
    for cc in chips:
        cubins = [x.asm["cubin"] if cc == chips[0] else assembled(x.asm["ptx"], cc) for x in (kernel, *others)]
        yield row_of(cc, launch, name_of(cc, kind, launch), kernel, others, cubins)


def forget():
    """Compiled code in memory and on disk; the kernel that adds parts up stays in memory."""
    block_sparse.forward.device_caches.clear()
    shutil.rmtree(triton.knobs.cache.dir, ignore_errors=True)


def identity():
    """What rows depend on besides their variant: rows of other code are not gone on with."""
    return f"triton {triton.__version__} {block_sparse.forward.cache_key[:16]}"


def compile_all(file):
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # an interrupted run may have left half a row
    known = {row["variant"] for row in map(json.loads, whole.splitlines()) if row["source"] == identity()}
    file.write_text(whole)
    with file.open("a") as out:
        for kind, launch, chips in families():
            if chips := [cc for cc in chips if name_of(cc, kind, launch) not in known]:
                for row in compile_family(kind, launch, chips):
                    print(json.dumps(row | {"source": identity()}), file=out, flush=True)
                forget()


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
