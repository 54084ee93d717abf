"""Compiles the fused store for GPUs that are not here and prints one JSON row per variant.

Run as a process of its own, without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
Arguments: `cc:block_q:block_k:head_dim:dtype:cache:parts`, e.g. `90:128:64:128:bf16:int8:qkv`; cache `as is` keeps
the projections' dtype, parts are `qkv`, `q` or `kv`, `qkv+sub` with sub-block means.
"""

import json
import re
import sys

import triton
from resources import resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightforcing.kernels.store import SUB_BLOCKS, _store, launch_options

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
LARGEST = {"as is": 0, "int8": 127, "fp8": 448}
POINTERS = {"q_weight_ptr", "k_weight_ptr", "q_ptr", "k_ptr", "v_ptr", "q_out_ptr", "q_means_ptr"}
POINTERS |= {"key_means_ptr", "value_means_ptr", "frame_means_ptr", "sub_means_ptr"}
ALWAYS_FLOAT32 = {"cos_ptr", "sin_ptr", "key_scales_ptr", "value_scales_ptr"}
OF_Q = {"q_ptr", "q_weight_ptr", "q_out_ptr", "q_means_ptr"}


def compile_variant(
    cc: int, block_q: int, block_k: int, head_dim: int, dtype: str, cache: str, parts: str
) -> dict[str, object]:
    """Compile one variant for sm_`cc`; what it takes of the chip, and whether it counts in order."""
    options = launch_options(block_q, block_k, BYTES[dtype], parts.endswith("+sub"))
    constants: dict[str, object] = {
        "HEAD_DIM": head_dim,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "LARGEST": LARGEST[cache],
        "SUB_BLOCKS": SUB_BLOCKS,
        "STAGES": options.pop("STAGES"),
        "INTERPRETED": False,
    }
    cache_dtype = {"as is": dtype, "int8": "i8", "fp8": "fp8e4nv"}[cache]
    signature = {}
    for name in _store.arg_names:
        of_part = "q" if name in OF_Q else "" if name in ("cos_ptr", "sin_ptr") else "kv"
        unsplit = name == "sub_means_ptr" and not parts.endswith("+sub")
        unscaled = name.endswith("scales_ptr") and cache == "as is"
        absent = unsplit or unscaled or (name.endswith("_ptr") and of_part not in parts)
        if name in constants or absent:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif name in ALWAYS_FLOAT32:
            signature[name] = "*fp32"
        elif name in ("slots_ptr", "arrivals_ptr"):
            signature[name] = "*i32"
        elif name in ("keys_ptr", "values_ptr"):
            signature[name] = f"*{cache_dtype}"
        elif name in POINTERS:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(_store.arg_names)
        if (name.endswith("_ptr") or "stride" in name) and signature[name] != "constexpr"
    }
    source = ASTSource(_store, signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    row = {
        "cc": cc,
        "block_q": block_q,
        "block_k": block_k,
        "dtype": dtype,
        "cache": cache,
        "parts": parts,
        "shared": kernel.metadata.shared,
        "counts_in_order": counts_in_order(kernel.asm["ptx"]),
        **options,
    }
    return row | resource_usage(kernel.asm["cubin"])


def counts_in_order(ptx: str) -> bool:
    """Whether all threads meet between their last store and the one atomic count, which releases to the GPU."""
    steps = re.findall(r"bar\.sync|st\.global|atom\.\S+", ptx)
    counts = [index for index, step in enumerate(steps) if step.startswith("atom")]
    if len(counts) != 1 or not {"acq_rel", "gpu"} <= set(steps[counts[0]].split(".")):
        return False
    return steps[counts[0] - 1] == "bar.sync"


if __name__ == "__main__":
    for variant in sys.argv[1:]:
        cc, block_q, block_k, head_dim, *names = variant.split(":")
        print(json.dumps(compile_variant(int(cc), int(block_q), int(block_k), int(head_dim), *names)), flush=True)
