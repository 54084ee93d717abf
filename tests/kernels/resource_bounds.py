"""What compiled code may take of a chip: shared memory by its kind, registers, and stack bytes, all of them spills."""

from lightforcing.kernels import tuning

from .attention_variants import kind_of, launch_of
from .resource_table import is_attention, kernel_of_kind, kind
from .resources import SHARED_KIB

TENSOR_MEMORY = 512  # columns of sm_100
# Stack bytes per thread of the attention: none in 16 bits; seen in 8 bits 24 and 32 with units cut (fp8 in blocks of
# 128 on sm_120), in float32 56. On sm_100 and sm_103 the compiler stops at 168 registers in some of what is timed.
MAX_STACK = {"16-bit": 0, "16-bit timed": 8, "8-bit": 32, "fp32": 64}
MAX_STACK_WIDE = 128  # key tiles of 128 on sm_100: only where they are measured to be faster all the same
# Of the others, by dtype or by the blocks of a row.
MAX_STACK_STORE = {"bf16": 64, "fp16": 64, "fp32": 96}
MAX_STACK_SCORE = {"bf16": 0, "fp16": 0, "fp32": 16}
MAX_STACK_ROW = {2048: 8, 4096: 8, 8192: 16, 16384: 40}


def check(row):
    """Assert that a row of `ahead_of_time` fits its chip and stays in registers, up to what is stated above."""
    assert row["shared"] <= SHARED_KIB[row["cc"]] * 1024, row
    assert (row["tensor_memory"] or 0) <= TENSOR_MEMORY, row
    assert row.get("registers", 0) <= most_registers(kind(row)), row
    assert row.get("stack", 0) <= most_stack(kind(row)), row
    if is_attention(row):
        _, *shape, how = row["variant"].split(":")
        work = kind_of(*shape)
        estimate = tuning.shared_bytes(work, launch_of(work, how))  # what the choice of launch parameters goes by
        assert row["shared"] <= estimate, (row, estimate)
        assert (row["tensor_maps"] > 0) == row["descriptors"], row  # copies by TMA exactly where they were asked for
    if ":store:" in row["variant"]:
        assert row["counts_in_order"] == ("+means" in row["variant"]), row  # whoever pools a frame sees all its blocks


def most_registers(work):
    return 64 if work.split()[1] in ("norm_scale_shift", "gated_add") else 255


def most_stack(work):
    """Stack bytes that a kind of work, as `resource_table.kind` says it, may take."""
    chip, kernel, *rest = work.split()
    if kernel == "store":
        return MAX_STACK_STORE[rest[0]]
    if kernel in ("score", "parts"):
        return MAX_STACK_SCORE[rest[0]]
    if kernel == "select":
        return MAX_STACK_ROW.get(int(rest[0]), 0)
    if kernel_of_kind(work) != "attention":
        return 0
    blackwell, timed, wide = chip in ("sm_100", "sm_103"), "timed" in rest, "wide" in rest
    if blackwell and wide:
        return MAX_STACK_WIDE
    if kernel == "fp32":
        return MAX_STACK["fp32"]
    if rest[0] in ("int8", "fp8"):
        return MAX_STACK["8-bit"]
    return MAX_STACK["16-bit timed" if blackwell and timed else "16-bit"]
