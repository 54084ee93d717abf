"""Passes of several ranks as graphs: recorded and checked by all of them or by none, so that none waits for ever."""

import threading

import pytest
import torch

from lightforcing.lightforcing_core.model import cuda_graph
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.record import RunRecorder

from ...support.ranks import each_rank
from ...support.rollouts import TEXT, roll, text, video
from ...support.tape import TapeRecorder, opaque

FOUR = (1.0, 0.75, 0.5, 0.25, 0.0)
here = threading.local()  # the rank of each thread


class Verdicts(set):
    """Kinds of graphs that were checked, of which rank 1 knows none."""

    def __contains__(self, kind):
        return super().__contains__(kind) and here.rank == 0


class FailingRecorder(TapeRecorder):
    """Records on rank 0 alone."""

    def record(self, work):
        recorded = super().record(work)  # a graph would not exchange anything yet
        if here.rank == 1:
            raise RuntimeError("no memory for a graph")
        return recorded


@pytest.fixture
def of_rank(monkeypatch):
    """A run of a rank with graphs on tapes."""
    monkeypatch.setattr(cuda_graph, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(cuda_graph, "_checked", Verdicts())
    monkeypatch.setattr(TapeRecorder, "events", [])
    dit = wan_from_state_dict(random_state_dict(dim=256, ffn_dim=64, layers=2, text_dim=TEXT))

    def run(exchange, graphs="on"):
        here.rank, recorder = exchange.rank, RunRecorder(reads_blocks=False)
        exchange.all_to_all = opaque(exchange.all_to_all, lambda *_: ())
        options = {"latent_shape": (1, 16, 6, 10, 14), "frames_per_chunk": 2, "sigmas": FOUR, "growth": (0.0, 0.5)}
        made = video(roll(dit, text(1), exchange=exchange, cuda_graph=graphs, recorder=recorder, **options))
        return made, recorder.finish().facts

    return run


def test_ranks_record_and_check_the_same_passes(of_rank):
    plain = each_rank(2, lambda exchange: of_rank(exchange, "off")[0])
    for _ in range(2):  # rank 0 knows its graphs in the second run
        launched = each_rank(2, of_rank)
        assert all(torch.equal(made, plain[0]) for made, _ in launched)
        assert "passes launched as graphs" in launched[0][1]["CUDA graphs"]
        assert launched[1][1]["ranks"] == "2; this record is of the 1 heads of one"


def test_ranks_do_not_record_unasked(of_rank):
    for _, facts in each_rank(2, lambda exchange: of_rank(exchange, "auto")):
        assert "ask for them" in facts["CUDA graphs"]
    assert not TapeRecorder.events


def test_a_rank_that_cannot_record_ends_the_run_of_all(of_rank, monkeypatch):
    monkeypatch.setattr(cuda_graph, "CudaRecorder", FailingRecorder)

    def error(exchange):
        with pytest.raises(RuntimeError, match="cuda_graph 'on' is not possible") as caught:
            of_rank(exchange)
        return str(caught.value)

    assert "another rank could not" in each_rank(2, error)[0]
