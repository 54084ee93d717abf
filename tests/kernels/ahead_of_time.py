"""Compiles the block-sparse kernel for GPUs that are not here and prints one JSON row per variant.

Run as a process of its own, without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
Arguments: `cc:block_q:block_k:head_dim:dtype:ragged`, e.g. `90:128:64:128:bf16:1`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightforcing.kernels.block_sparse import _forward, launch_options

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_variant(cc: int, block_q: int, block_k: int, head_dim: int, dtype: str, ragged: bool) -> dict:
    """Compile one variant for sm_`cc`; bytes of shared memory, and registers and stack bytes where cuobjdump is."""
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": head_dim,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "RAGGED_Q": ragged,
        "RAGGED_K": ragged,
        "UPCAST": False,
    }
    signature = {}
    for name in _forward.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name in ("blocks_ptr", "counts_ptr") else f"*{dtype}"
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(_forward.arg_names)
        if name.endswith("_ptr") or "stride" in name
    }
    options = launch_options(block_q, block_k, head_dim, BYTES[dtype])
    source = ASTSource(_forward, signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    row = {
        "cc": cc,
        "block_q": block_q,
        "block_k": block_k,
        "dtype": dtype,
        "shared": kernel.metadata.shared,
        **options,
    }
    return row | resource_usage(kernel.asm["cubin"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes (spills) per thread, as the cuobjdump inside Triton's wheel reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    return {"registers": int(found[1]), "stack": int(found[2])} if found else {}


if __name__ == "__main__":
    for variant in sys.argv[1:]:
        cc, block_q, block_k, head_dim, dtype, ragged = variant.split(":")
        print(json.dumps(compile_variant(int(cc), int(block_q), int(block_k), int(head_dim), dtype, ragged == "1")))
