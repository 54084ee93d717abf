"""`lightforcing render --engine ray`: whatever is killed, each video is made, and no finished chunk is made again."""

import os
import signal

import pytest

from ...support.render_command import CAPTION, ENVIRONMENT, finished, processes_of, prompts, started

pytest.importorskip("ray", reason="Ray is not installed: pip install -e .[ray]")

CHUNKS = 4


@pytest.fixture
def command(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE=disabled", "RAY_USAGE_STATS_ENABLED=0"):
        monkeypatch.setitem(ENVIRONMENT, *name.split("="))
    lines = [{"text": CAPTION, "length": 12 * CHUNKS - 3, "seed": seed} for seed in range(3)]
    return [prompts(tmp_path, *lines), "--out", tmp_path / "out", "--engine", "ray"]


def until(events, name, chunk):
    return next(e for e in events if e["event"] == "progress" and (e["prompt"], e["value"] >= chunk) == (name, True))


def by_name(events):
    """The last event about each video, which are all finished and in one piece."""
    ends = {event["prompt"]: event for event in events if event["event"] in ("finished", "failed")}
    assert all(end["made"] + end["found"] in (0, CHUNKS) for end in ends.values() if end["event"] == "finished")
    return ends


def test_a_killed_worker_is_replaced_and_goes_on_where_it_was(command):
    with started([*command, "--workers", "2"]) as (process, events):
        until(events, "0001", 2)
        workers = processes_of(process.pid, "ray::Worker")
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        ends = by_name(events)
        assert process.wait(60) == 0
    assert {end["event"] for end in ends.values()} == {"finished"}
    assert len(ends) == 3
    assert ends["0001"]["found"] >= 2


def test_a_killed_rank_takes_its_gang_along_and_another_gang_goes_on(command):
    with started([*command, "--gpus-per-video", "2"]) as (process, events):
        until(events, "0001", 2)
        (follower,) = processes_of(process.pid, "ray::Follower")
        os.kill(follower, signal.SIGKILL)
        ends = by_name(events)
        assert process.wait(60) == 0
    assert len(ends) == 3
    assert ends["0001"]["found"] >= 2


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_the_same_command_continues_after_the_driver_has_ended(command, tmp_path, stop, code):
    with started(command) as (process, events):
        until(events, "0001", 2)
        process.send_signal(stop)
        assert process.wait(60) == code
    assert not (tmp_path / "out" / "0001.mp4").exists()
    code, events, error = finished(command)
    ends = by_name(events)
    assert code == 0, error
    assert ends["0001"]["found"] >= 2


def test_a_video_that_ends_its_workers_fails_alone(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".0002.tries").write_text("3")
    code, events, _ = finished(command)
    ends = by_name(events)
    assert code == 1
    assert "3 processes ended" in ends["0002"]["message"]
    assert [ends[name]["event"] for name in ("0001", "0003")] == ["finished"] * 2
