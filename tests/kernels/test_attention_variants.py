"""The set of variants that is compiled ahead of time is exactly what a run on `auto` can bring to the kernel."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightforcing.kernels import block_sparse
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.dispatch import dense_attention_8bit, sparse_attention

from .attention_variants import BLOCKS, HEAD_DIM, kind_of, kinds, launch_of, launches, name_of
from .resources import SHARED_KIB


class Asked(Exception):
    """Stops a call where launch parameters are chosen; its argument is the kind of work."""


def asked_for(attend, *arguments, **options):
    """The kind of work that a call of the front door brings to the kernel."""

    def stop(kind, *rest):
        raise Asked(kind)

    with mock.patch.object(block_sparse, "_launch_for", stop), pytest.raises(Asked) as stopped:
        attend(*arguments, backend="triton", **options)
    return stopped.value.args[0]


def kind_of_a_call(tokens_per_frame, block, dtype, stored, tail, dense):
    """What rollouts ask for: a selection with blocks of one size, or dense attention over an 8-bit cache."""
    q, k = (torch.zeros(1, tokens_per_frame, 1, HEAD_DIM, dtype=x) for x in (dtype, stored))
    blocks = FrameBlocks(tokens_per_frame, block).per_frame
    scales = (torch.ones(1, blocks, 1),) * 2 if stored != dtype else None
    if dense:
        return asked_for(dense_attention_8bit, q, k, k, scales, tokens_per_frame=tokens_per_frame, block_k=block)
    return asked_for(
        sparse_attention,
        q,
        k,
        k,
        selection=(torch.zeros(1, 1, blocks, 1).int(), torch.ones(1, 1, blocks).int()),
        tokens_per_frame=tokens_per_frame,
        block=(block, block),
        scales=scales,
        tail=(torch.zeros(1, blocks, 1, HEAD_DIM, dtype=dtype),) * 2 if tail else None,
    )


def test_every_kind_of_work_in_the_set_is_asked_for_by_some_call():
    for kind in kinds():
        tokens = next(n for n in range(1, 512) if (n % kind.block_q != 0, n % kind.block_k != 0) == kind.ragged)
        assert kind_of_a_call(tokens, kind.block_k, kind.dtype, kind.stored, kind.tail, kind.dense) == kind


@given(
    tokens_per_frame=st.integers(1, 300),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from(block_sparse.DTYPES),
    stored=st.sampled_from([None, *block_sparse.EIGHT_BIT]),
    tail=st.booleans(),
    dense=st.booleans(),
)
def test_no_call_of_a_run_asks_for_a_kind_of_work_that_is_not_in_the_set(dtype, stored, dense, **options):
    kind = kind_of_a_call(dtype=dtype, stored=stored or dtype, dense=dense and stored is not None, **options)
    assert kind in kinds()


def test_blocks_are_those_that_the_nodes_offer():
    nodes = Path(block_sparse.__file__).parents[1] / "nodes" / "model" / "options.py"
    (offered,) = re.findall(r'"block",\s*options=\[([^]]*)\]', nodes.read_text(encoding="utf-8"))
    assert [int(size) for size in re.findall(r"\d+", offered)] == list(BLOCKS)


def test_names_say_what_a_variant_is():
    for kind in kinds():
        for launch in launches(kind, 90, SHARED_KIB[90]):
            _, *shape, how = name_of(90, kind, launch).split(":")
            assert (kind_of(*shape), launch_of(kind, how)) == (kind, launch)
