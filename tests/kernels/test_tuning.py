"""Launch parameters: what is worth timing, which one wins, and how the winner is kept on disk."""

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightforcing.kernels import tuning
from lightforcing.kernels.tuning import Kind, Launch, candidates, cut, default_launch, known, rounds, shared_bytes

SLOW, FAST, BROKEN = Launch(64, 64, 4, 2), Launch(128, 64, 8, 3), Launch(128, 128, 8, 2)


def kind(block_q=64, block_k=64, head_dim=128, dtype=torch.bfloat16, stored=None, **rest):
    return Kind(block_q, block_k, head_dim, dtype, stored or dtype, (False, False), **rest)


@pytest.fixture
def new_process(monkeypatch, tmp_path):
    """Forgets what was read and chosen, as a new process with the same cache folder would."""
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path / "cache"))

    def forget():
        monkeypatch.setattr(tuning, "_known", {})
        monkeypatch.setattr(tuning, "_read", set())

    forget()
    return forget


def fastest(key, launches, time):
    """One round of launches, of which the first is the default."""
    return tuning.fastest(key, launches[0], [lambda best: launches], time)


class Timer:
    def __init__(self, times):
        self.times, self.asked = times, []

    def __call__(self, launch):
        self.asked.append(launch)
        if isinstance(self.times[launch], Exception):
            raise self.times[launch]
        return self.times[launch]


def test_fastest_candidate_wins_and_is_timed_once_for_all_processes(new_process):
    timer = Timer({SLOW: 2.0, FAST: 1.0})
    assert fastest("gpu | kind", [SLOW, FAST], timer) == FAST
    assert fastest("gpu | kind", [SLOW, FAST], timer) == FAST
    assert timer.asked == [SLOW, FAST]
    new_process()
    assert known("gpu | kind") == FAST
    assert fastest("gpu | kind", [SLOW, FAST], Timer({})) == FAST
    assert known("another gpu | kind") is None


def test_winners_of_other_processes_stay_in_the_file(new_process):
    fastest("a", [SLOW], Timer({SLOW: 1.0}))
    path = tuning.cache_file()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"written meanwhile": list(FAST)}))
    fastest("b", [SLOW], Timer({SLOW: 1.0}))
    new_process()
    assert [known(key) for key in ("a", "b", "written meanwhile")] == [SLOW, SLOW, FAST]
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_candidates_that_do_not_run_lose_and_when_none_runs_the_default_is_not_kept(new_process):
    refused = RuntimeError("out of resource: shared memory")
    assert fastest("a", [BROKEN, SLOW], Timer({BROKEN: refused, SLOW: 2.0})) == SLOW
    assert fastest("b", [BROKEN, FAST], Timer({BROKEN: refused, FAST: refused})) == BROKEN
    assert list(json.loads(tuning.cache_file().read_text())) == ["a"]


def test_each_round_is_given_the_winner_of_all_before(new_process):
    refined = [FAST._replace(descriptors=True), FAST._replace(per_sm=1)]
    timer = Timer({SLOW: 2.0, FAST: 1.0, refined[0]: 0.9, refined[1]: 1.1, refined[0]._replace(per_sm=1): 0.8})
    steps = [
        lambda best: [SLOW, FAST],
        lambda best: [best._replace(descriptors=True), best._replace(per_sm=1)],
        lambda best: [best._replace(per_sm=1)],
    ]
    winner = tuning.fastest("a", SLOW, steps, timer)
    assert winner == refined[0]._replace(per_sm=1)
    new_process()
    assert known("a") == winner  # the file keeps every field


def test_running_out_of_memory_is_not_mistaken_for_a_bad_candidate(new_process):
    with pytest.raises(torch.OutOfMemoryError):
        fastest("a", [SLOW, FAST], Timer({SLOW: torch.OutOfMemoryError("full"), FAST: 1.0}))


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": [1, 2]}', '{"a": [64, 64, "4", 2]}', '{"a": 7}'])
def test_damaged_file_is_reported_and_written_anew(new_process, content, caplog):
    path = tuning.cache_file()
    path.parent.mkdir()
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert fastest("a", [SLOW], Timer({SLOW: 1.0})) == SLOW
    assert str(path) in caplog.text
    new_process()
    assert known("a") == SLOW


def test_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(new_process, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        assert fastest("a", [SLOW, FAST], Timer({SLOW: 2.0, FAST: 1.0})) == FAST
    assert "not kept for the next run" in caplog.text
    assert known("a") == FAST


def test_full_disk_leaves_the_old_file_and_no_half_of_a_new_one(new_process, monkeypatch, caplog):
    fastest("a", [SLOW], Timer({SLOW: 1.0}))
    write = Path.write_text

    def full(path, text, **options):
        write(path, text[:10], **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with caplog.at_level(logging.WARNING):
        assert fastest("b", [FAST], Timer({FAST: 1.0})) == FAST
    assert "No space left" in caplog.text
    path = tuning.cache_file()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    new_process()
    assert (known("a"), known("b")) == (SLOW, None)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIGHTFORCING_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning.os, "name", "posix")
    assert tuning.cache_file() == tmp_path / "lightforcing" / "launches.json"
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path / "mine"))
    assert tuning.cache_file() == tmp_path / "mine" / "launches.json"


KINDS = [
    kind(block_q, block_k, dim, dtype, stored, tail=tail)
    for block_q in (16, 64, 128, 256)
    for block_k in (16, 64, 128)
    for dim in (24, 64, 128)
    for dtype, stored in ((torch.bfloat16, None), (torch.float16, torch.int8), (torch.float32, None))
    for tail in (False, True)
]


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_candidates_are_few_divide_the_blocks_and_fit(shared_kib):
    for each in KINDS:
        launches = candidates(each, shared_kib * 1024)
        assert launches[0] == default_launch(each)
        assert len(set(launches)) == len(launches) <= 7
        for launch in launches:
            assert each.block_q % launch.tile_q == each.block_k % launch.tile_k == 0
            assert shared_bytes(each, launch) <= shared_kib * 1024
            assert launch.num_warps * 32 >= launch.tile_q  # 128 rows on 4 warps spill


def test_tiles_that_are_known_to_spill_are_not_timed():
    for each in KINDS:
        for descriptors in (False, True):
            for launch in rounds(each, 227 * 1024, descriptors=descriptors)[0](default_launch(each)):
                assert each.dtype != torch.float32 or (launch.tile_q <= 32 and launch.tile_k <= 32)
                assert launch.tile_k <= 64 or (descriptors and each.stored == each.dtype and not each.tail)
    wide = kind(block_q=128, block_k=128)
    assert any(launch.tile_k == 128 for launch in rounds(wide, 227 * 1024, descriptors=True)[0](default_launch(wide)))


@pytest.mark.parametrize(
    "small", [kind(dtype=torch.float32), kind(block_q=32), kind(block_k=16), kind(head_dim=32), kind(head_dim=96)]
)
def test_what_is_not_worth_a_users_compilations_is_only_cut(small):
    default = default_launch(small)
    first, last = rounds(small, 227 * 1024, descriptors=True)
    assert first(default) == [default]
    assert last(default) == [default._replace(per_sm=1), default._replace(per_sm=2)]


def test_rounds_end_with_tma_where_there_is_any_and_with_cuts():
    best = Launch(64, 64, 4, 4)
    for each, descriptors, tma in [
        (kind(), True, [best._replace(descriptors=True, num_stages=stages) for stages in (2, 3)]),
        (kind(), False, None),
        (kind(head_dim=24), True, None),
    ]:
        first, *others = rounds(each, 227 * 1024, descriptors=descriptors)
        assert first(best) == candidates(each, 227 * 1024)
        assert [after(best) for after in others] == [
            *([tma] if tma else []),
            [best._replace(per_sm=1), best._replace(per_sm=2)],
        ]
    (_, through, _) = rounds(kind(), 99 * 1024, descriptors=True)
    assert through(best) == [best._replace(descriptors=True, num_stages=2)]  # three stages do not fit the chip


@given(units=st.integers(1, 2000), at_once=st.integers(0, 400), blocks=st.integers(1, 600))
def test_cuts_fill_the_last_wave_and_no_more(units, at_once, blocks):
    whole, parts = cut(units, at_once, blocks)
    assert parts >= 1
    if parts == 1:
        assert whole == units
        rest = units % at_once if at_once else 0
        assert not rest or 2 * rest > at_once or blocks < 2 * tuning.MIN_BLOCKS  # what else could be cut
    else:
        rest = units - whole
        assert whole % at_once == 0
        assert 0 < rest < at_once
        assert rest * parts <= at_once
        assert blocks // parts >= tuning.MIN_BLOCKS


def test_the_published_shape_is_cut_as_the_arithmetic_says():
    assert cut(864, 264, 60) == (792, 3)
    assert cut(864, 132, 60) == (864, 1)  # 72 of 132: no two parts of each fit into one wave
    assert cut(432, 132, 60) == (396, 3)
    assert cut(864, 0, 60) == (864, 1)
