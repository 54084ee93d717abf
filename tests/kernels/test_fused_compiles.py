"""The kernels beside the attention compiled for every supported chip, without a GPU: shared memory and spills."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape, KVOptions

from .compiling import compile_all, in_a_process
from .fused_variants import BLOCKS, DTYPES, HEAD_DIM, POOLED, launch_of, names
from .resource_bounds import check
from .resources import SHARED_KIB


def covering_set():
    """The published shape on every chip, and what takes most of one on some of each generation."""
    everywhere = [
        "store:bf16:bf16:64:qkv+means",
        "score:bf16",
        "select:512:32",
        "select:8192:256",
        "norm_scale_shift:5120:bf16",
        "bias:64:1560",
    ]
    some = {
        80: ["parts:bf16:64", "bias:16:1536"],
        86: ["store:bf16:bf16:64:qkv+means+subs", "store:bf16:int8:128:qkv+means", "score:fp32", "gated_add:5120:bf16"],
        90: ["store:bf16:fp8:128:qkv+means+values+subs", "store:fp32:fp32:64:kv", "parts:bf16:64", "parts:fp32:64"],
        100: ["parts:bf16:64", "norm_scale_shift:1536:fp32", "gated_add:256:fp16"],
        120: ["store:bf16:fp8:128:kv+means+values+subs", "score:fp32", "parts:bf16:64", "select:16384:256"],
    }
    found = [(cc, name) for cc in SHARED_KIB for name in everywhere]
    found += [(cc, name) for cc, more in some.items() for name in more]
    return [f"{cc}:{name}:{launch_of(name)}".removesuffix(":") for cc, name in found]


def test_kernels_fit_every_chip_and_stay_in_registers(tmp_path, capsys):
    variants = covering_set()
    assert set(variants) <= {name for cc in SHARED_KIB for name in names(cc)}
    rows = compile_all(variants, tmp_path)
    assert sorted(row["variant"] for row in rows) == sorted(variants)
    with capsys.disabled():
        print("\n  sm  kernel and variant                              shared KiB  registers  stack")
        for row in rows:
            print(
                f"{row['cc']:4d}  {row['variant'].partition(':')[2]:46s} {row['shared'] / 1024:11.1f} "
                f"{row.get('registers', '?'):>10} {row.get('stack', '?'):>6}"
            )
    for row in rows:
        check(row)


def test_the_store_is_compiled_for_every_cache_that_a_run_keeps():
    """What is pooled, as the names say it, of each way to keep keys and values."""
    asked = set()
    either = (False, True)
    for pooled, values, subs, kv in itertools.product(either, either, either, ("same", "int8", "fp8")):
        shape = CacheShape(
            layers=1,
            batch=1,
            slots=3,
            tokens_per_frame=20,
            heads=1,
            head_dim=HEAD_DIM,
            block_k=16,
            pooled=pooled,
            value_means=values,
            sub_blocks=subs,
            dtype=torch.bfloat16,
        )
        memory = KVCache(shape, KVOptions(dtype=kv)).layer(0)
        kept = {"means": "key_means", "values": "value_means", "subs": "sub_means"}
        parts = "".join(f"+{name}" for name, tensor in kept.items() if getattr(memory, tensor) is not None)
        stored = next(name for name, dtype in DTYPES.items() if dtype == memory.keys.dtype)
        assert (memory.key_scales is not None) == (stored != "bf16")
        asked.add(f"90:store:bf16:{stored}:16:qkv{parts}")
    found = [name.rpartition(":")[0] for name in names(90)]
    assert asked == {name for name in found if name.startswith("90:store:bf16:") and ":16:qkv" in name}
    assert len(asked) == 3 * len(POOLED)
    assert {int(name.split(":")[4]) for name in names(90) if ":store:" in name} == set(BLOCKS)


def test_neither_slots_nor_frames_nor_lengths_compile_anew(tmp_path):
    versions = {row["kernel"]: row["versions"] for row in in_a_process("launch_bindings", cache=tmp_path)}
    kernels = "_store", "_norm_scale_shift", "_gated_add", "_score", "_score_parts", "_select"
    assert versions == dict.fromkeys(kernels, 1)
