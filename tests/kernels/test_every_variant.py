"""Everything that a run on `auto` can pick compiles for every supported chip, and the record says what it takes.

`LIGHTFORCING_COMPILE_ALL=FILE pytest` compiles all of it, in half an hour of two cores; rows are kept in FILE, where
an interrupted run goes on. The record of the last such run is held to the code and to the variants as they are now.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")


from .compiling import compile_all, in_a_process
from .every_variant import every_name
from .resource_bounds import TENSOR_MEMORY, check, most_registers, most_stack
from .resource_table import RECORD, attention_table, digest, fused_table, record_of
from .resources import SHARED_KIB

EVERYTHING = "LIGHTFORCING_COMPILE_ALL"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_a_record_keeps_what_is_as_it_was_and_has_no_rows():
    row = {"variant": "90:bias:64:1560", "cc": 90, "registers": 20, "stack": 0, "shared": 0, "tensor_memory": 0}
    names = ["90:bias:64:1560", "90:score:bf16:64x64"]
    sources = {"bias": "one", "score": "two"}
    kept = {"sm_90 score bf16": [1, 78, 0, 32768, 0]}
    last = {"sources": sources, "variants": {"score": digest(names[1:])}, "kinds": kept | {"sm_90 bias": [9] * 5}}
    renewed = record_of(names, {names[0]: row}, sources, last)
    assert renewed["kinds"] == kept | {"sm_90 bias": [1, 20, 0, 0, 0]}
    for gone in ({"score": "three"}, {"score": "two", "select": "new"}):
        with pytest.raises(SystemExit, match="90:score:bf16:64x64" if len(gone) == 1 else "select"):
            record_of([*names, "90:select:512:32:1"], {names[0]: row}, sources | gone, last)


def test_the_record_is_within_every_chips_bounds(record):
    for kind, (_, registers, stack, shared, tensor_memory) in record["kinds"].items():
        cc = int(kind.split()[0].removeprefix("sm_"))
        assert registers <= most_registers(kind), kind
        assert stack <= most_stack(kind), kind
        assert shared <= SHARED_KIB[cc] * 1024, kind
        assert tensor_memory <= TENSOR_MEMORY, kind


@pytest.mark.skipif(not os.environ.get(EVERYTHING), reason=f"takes half an hour; {EVERYTHING}=FILE keeps rows in FILE")
def test_everything_that_a_run_can_pick_fits_every_chip(tmp_path, capsys):
    file = Path(os.environ[EVERYTHING])
    in_a_process("every_variant", str(file), cache=tmp_path, timeout=None)
    found = {row["variant"]: row for row in map(json.loads, file.read_text().splitlines())}
    rows = [found[name] for name in every_name()]
    with capsys.disabled():
        print("", *attention_table(rows), "", *fused_table(rows), sep="\n")
    for row in rows:
        check(row)


def test_chips_of_one_family_are_given_the_same_ptx(tmp_path):
    """What compiling everything relies on: PTX is made once per family, and only its label is changed."""
    names = [
        "ptx:80 86 89:128:128:128:bf16:int8:1:tail:cut",
        "ptx:100 103:64:64:128:bf16:bf16:1:sparse:tma cut",
        "ptx:80 86 89:store:bf16:int8:64:qkv+means+values+subs:16x3x128",
        "ptx:100 103:select:4096:64:8",
    ]
    for row in compile_all(names, tmp_path):
        assert len(row) >= 2
        assert len(set(row.values())) == 1, row
