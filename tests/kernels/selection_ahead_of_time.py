"""Compiles the selection kernels for GPUs that are not here and prints one JSON row per variant.

Run as a process of its own, without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
Arguments: `cc:score:dtype:head_dim` or `cc:parts:dtype:head_dim`, e.g. `90:score:bf16:128`, or
`cc:select:k_blocks:frames`, e.g. `90:select:504:21`.
"""

import json
import sys

import triton
from resources import resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightforcing.kernels.score import Parts, _score, _score_parts, part_constants, score_constants
from lightforcing.kernels.selection import _select, select_constants, select_warps

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
POINTERS = {"scores_ptr": "*fp32", "ranks_ptr": "*i32", "blocks_ptr": "*i32", "counts_ptr": "*i32"}


def compile_variant(cc: int, kernel: str, first: str, second: str) -> dict:
    """Compile one variant for sm_`cc`; bytes of shared memory, and registers and stack bytes where cuobjdump is."""
    if kernel in ("score", "parts"):
        function, options = _score if kernel == "score" else _score_parts, {"num_warps": 4, "num_stages": 2}
        constants = score_constants(int(second), BYTES[first])
        if kernel == "parts":
            constants = part_constants(int(second), BYTES[first], Parts(None, 1560, 16, 4))
        constants |= {"UPCAST": False}
        shape, dtype = f"{constants['TILE_Q']}×{constants['TILE_K']} tile, dim {second}", first
    else:
        function, constants = _select, select_constants(int(first), int(second))
        options = {"num_warps": select_warps(constants["COLUMNS"])}
        shape, dtype = f"{constants['COLUMNS']} blocks, {constants['FRAMES']} frames", "fp32"
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name) or f"*{first}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if name.endswith("_ptr") or "stride" in name
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    row = {
        "cc": cc,
        "kernel": kernel,
        "shape": shape,
        "dtype": dtype,
        "warps": options["num_warps"],
        "shared": compiled.metadata.shared,
        "unspecialised": [parameter.name for parameter in function.params if parameter.do_not_specialize],
    }
    return row | resource_usage(compiled.asm["cubin"])


if __name__ == "__main__":
    for variant in sys.argv[1:]:
        cc, kernel, first, second = variant.split(":")
        print(json.dumps(compile_variant(int(cc), kernel, first, second)), flush=True)
