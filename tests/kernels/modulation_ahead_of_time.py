"""Compiles the modulation kernels for GPUs that are not here and prints one JSON row per variant.

Run as a process of its own, without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
Arguments: `cc:kernel:width:dtype`, e.g. `90:norm_scale_shift:1536:bf16`.
"""

import json
import sys

import triton
from resources import resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightforcing.kernels.modulation import _gated_add, _norm_scale_shift, launch_options

KERNELS = {"norm_scale_shift": _norm_scale_shift, "gated_add": _gated_add}


def compile_variant(cc: int, name: str, width: int, dtype: str) -> dict[str, object]:
    """Compile one variant for sm_`cc`; bytes of shared memory, and registers and stack bytes where cuobjdump is."""
    kernel, options = KERNELS[name], launch_options(width)
    constants = {"WIDTH": width, "INTERPRETED": False, "PADDED": options.pop("PADDED"), "ROWS": options.pop("ROWS")}
    kinds = {True: f"*{dtype}", False: "i32"}
    signature = {name: "constexpr" if name in constants else kinds[name.endswith("_ptr")] for name in kernel.arg_names}
    if "eps" in signature:
        signature["eps"] = "fp32"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or "stride" in name
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    row = {"cc": cc, "kernel": name, "width": width, "dtype": dtype, "shared": compiled.metadata.shared, **options}
    return row | resource_usage(compiled.asm["cubin"])


if __name__ == "__main__":
    for variant in sys.argv[1:]:
        cc, name, width, dtype = variant.split(":")
        print(json.dumps(compile_variant(int(cc), name, int(width), dtype)), flush=True)
