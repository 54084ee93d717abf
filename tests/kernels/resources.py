"""What a compiled kernel takes of a chip, read without one."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

# Shared memory that one program may use, in KiB, by compute capability.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


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
