"""What compiled code may take of a chip: shared memory by its kind, registers, and stack bytes, all of them spills."""

from lightforcing.kernels import tuning

from .attention_variants import is_timed, kind_of, launch_of
from .resource_table import is_attention
from .resources import SHARED_KIB

TENSOR_MEMORY = 512  # columns of sm_100
# Stack bytes per thread of the attention: none in 16 bits; seen in 8 bits 24 and 32 with units cut (fp8 in blocks of
# 128 on sm_120), in float32 56. On sm_100 and sm_103 the compiler stops at 168 registers in some of what is timed.
MAX_STACK = {"16-bit": 0, "16-bit timed": 8, "8-bit": 32, "fp32": 64}
MAX_STACK_WIDE = 144  # key tiles of 128 on sm_100: only where they are measured to be faster all the same
# Of the others, by dtype or by the blocks of a row.
MAX_STACK_STORE = {"bf16": 64, "fp16": 64, "fp32": 96}
MAX_STACK_SCORE = {"bf16": 0, "fp16": 0, "fp32": 16}
MAX_STACK_ROW = {2048: 8, 4096: 8, 8192: 16, 16384: 40}
MAX_REGISTERS = {"norm_scale_shift": 64, "gated_add": 64}


def check(row):
    """Assert that a row of `ahead_of_time` fits its chip and stays in registers, up to what is stated above."""
    assert row["shared"] <= SHARED_KIB[row["cc"]] * 1024, row
    assert (row["tensor_memory"] or 0) <= TENSOR_MEMORY, row
    if is_attention(row):
        check_attention(row)
    else:
        check_fused(row)


def check_attention(row):
    _, *shape, how = row["variant"].split(":")
    kind = kind_of(*shape)
    estimate = tuning.shared_bytes(kind, launch_of(kind, how))  # what the choice of launch parameters goes by
    assert row["shared"] <= estimate, (row, estimate)
    assert (row["tensor_maps"] > 0) == row["descriptors"], row  # copies by TMA exactly where they were asked for
    assert row.get("stack", 0) <= most_stack(row), row


def most_stack(row):
    _, _, _, _, dtype, stored, *_ = row["variant"].split(":")
    blackwell = row["cc"] // 10 == 10
    if is_timed(row) and blackwell and row["tile_k"] == 128:
        return MAX_STACK_WIDE
    if dtype == "fp32":
        return MAX_STACK["fp32"]
    if stored in ("int8", "fp8"):
        return MAX_STACK["8-bit"]
    return MAX_STACK["16-bit timed" if is_timed(row) and blackwell else "16-bit"]


def check_fused(row):
    _, kernel, first, *_ = row["variant"].split(":")
    stack, registers = row.get("stack", 0), row.get("registers", 0)
    assert registers <= MAX_REGISTERS.get(kernel, 255), row
    if kernel == "store":
        assert stack <= MAX_STACK_STORE[first], row
        assert row["counts_in_order"] == ("+means" in row["variant"]), row  # whoever pools a frame sees all its blocks
    elif kernel in ("score", "parts"):
        assert stack <= MAX_STACK_SCORE[first], row
    elif kernel == "select":
        assert stack <= MAX_STACK_ROW.get(int(first), 0), row
    else:
        assert stack == 0, row
