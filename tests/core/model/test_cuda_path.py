"""The CUDA path from end to end without a card: whole rollouts of which a card would refuse nothing.

A process of its own asks for every operation and every launch as on a GPU and looks at each, see `cuda_path`.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stands in for CUDA through libc10.so")

HERE = Path(__file__).parents[2] / "support"
FUSED = {"_norm_scale_shift", "_gated_add", "_store"}
SPARSE = FUSED | {"_score", "_select", "forward"}
UNTRAINED = FUSED | {"_score_parts", "_select", "tail_bias", "forward"}
# The kernels of each mode, apart from the one that follows `forward` where units are cut.
KERNELS = {
    "dense": FUSED,
    "published": SPARSE,
    "another launch wins, no graphs": SPARSE | {"combine"},
    "untrained": UNTRAINED,
    "untrained, another launch wins": UNTRAINED | {"combine"},
    "tiles": UNTRAINED,
    "selections kept for two steps": SPARSE,
    "whole wide blocks": SPARSE | {"tail_bias"},
    "int8": UNTRAINED,
    "int8, dense": FUSED | {"forward"},
    "int8 on an older card": UNTRAINED,
    "fp8": SPARSE,
    "fp8 on an older card": {"_norm_scale_shift", "_gated_add", "_score", "_select"},
    "a card too old for kernels": set(),
    "host memory, few layers": SPARSE,
    "host memory, int8, sinks follow": UNTRAINED,
    "window, sinks follow": SPARSE,
    "window, sinks stay": UNTRAINED,
    "prompts": SPARSE,
    "guided, context noise": SPARSE,
    "two videos": UNTRAINED,
    "one frame per chunk": SPARSE,
    "both ends given": SPARSE,
    "float16": UNTRAINED,
    "float32": SPARSE,
    "FP8 linears": SPARSE,
    "second card": UNTRAINED | {"combine"},
    "second card, host memory": SPARSE,
    "decode beside": SPARSE,
    "recorded run, TAE beside": UNTRAINED,
    "one head": UNTRAINED,
    "flex": SPARSE - {"forward"},
    "flex, untrained, int8": UNTRAINED - {"forward", "tail_bias"},
    "flash4": SPARSE - {"forward"},
    "without Triton": set(),
    "machine code": UNTRAINED,
}
WITHOUT_GRAPHS = {mode for mode in KERNELS if "host memory" in mode or "no graphs" in mode}
# Where the host may wait: before a run, while launches are timed, for a kind of graph's first launch, for a graph that
# is a chunk old, and behind a run. Each is one that a rollout meets once or is never late for.
MAY_WAIT = {"rollout._is_finite", "block_sparse.time", "step_graph._first", "cuda_recorder.free"}
MAY_WAIT_BESIDE = {
    "host memory": {"kv_storage.free", "host_memory._unpin"},
    "beside": {"overlap.frames"},
    "recorded run": {"run_record.finish", "run_record.record"},
}


def faults():
    """The names of the faults that are made on purpose."""
    tree = ast.parse((HERE / "card_faults.py").read_text(encoding="utf-8"))
    named = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    return [name for name in named if name not in ("there", "found")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What became of each mode and fault, by name."""
    folder = tmp_path_factory.mktemp("cuda_path")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "LIGHTFORCING_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "cuda_path.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {row.get("mode") or row["fault"]: row for row in found}


@pytest.mark.parametrize("mode", KERNELS)
def test_a_card_refuses_nothing_of_a_whole_rollout(rows, mode):
    row = rows[mode]
    assert row["error"] is None, row["error"]
    assert row["warnings"] == []  # which is how a kernel that fails makes itself known
    assert row["problems"] == []


@pytest.mark.parametrize("mode", KERNELS)
def test_every_kernel_that_should_run_does(rows, mode):
    launched = set(rows[mode]["kernels"])
    assert launched - {"combine"} == KERNELS[mode] - {"combine"}
    assert launched >= KERNELS[mode]


@pytest.mark.parametrize("mode", KERNELS)
def test_the_host_waits_for_nothing_on_the_way(rows, mode):
    allowed = MAY_WAIT.union(*(places for name, places in MAY_WAIT_BESIDE.items() if name in mode))
    assert {wait.partition(":")[0] for wait in rows[mode]["waits"]} <= allowed, rows[mode]["waits"]


@pytest.mark.parametrize("mode", KERNELS)
def test_steps_are_recorded_where_they_can_be(rows, mode):
    assert (rows[mode]["graphs"] == 0) == (mode in WITHOUT_GRAPHS)


@pytest.mark.parametrize("mode", KERNELS)
def test_only_the_card_that_was_asked_for_is_woken(rows, mode):
    assert rows[mode]["devices"] == [1 if "second card" in mode else 0]


@pytest.mark.parametrize("fault", faults())
def test_what_a_card_would_refuse_is_noticed(rows, fault):
    assert rows[fault]["found"], fault


def test_every_mode_has_its_kernels_listed(rows):
    assert set(rows) == {*KERNELS, *faults()}
