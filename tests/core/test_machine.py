"""Choices by measurement, with made-up candidates and an injected clock."""

import logging
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from lightforcing.lightforcing_core import fast_path, machine, profile

CPU = torch.device("cpu")
RIGHT = torch.arange(1.0, 9.0)
SPEEDS = {"usual": 0.1, "fast": 0.05, "faster": 0.025, "slow": 0.2, "slowest": 9.0, "same": 0.097}  # seconds of each
ONCE = []


def fails(error):
    def run():
        raise error

    return run


def unsteady():
    ONCE.append(1)
    return RIGHT + 1e-6 * len(ONCE)


CANDIDATES = dict.fromkeys(SPEEDS, RIGHT.clone) | {
    "wrong": lambda: RIGHT + 1.0,
    "NaN": lambda: RIGHT * float("nan"),
    "short": lambda: RIGHT[:4],
    "unsteady": unsteady,
    "raises": fails(RuntimeError("PTX was compiled with an unsupported toolchain")),
    "full": fails(torch.OutOfMemoryError("CUDA out of memory")),
}


@pytest.fixture
def restart(monkeypatch, tmp_path):
    """Forgets what was chosen, as a new process with the same cache folder does."""
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTFORCING_PROFILE")
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: SPEEDS.get(run.args[0], 0.1))

    def forget():
        for memory in (machine._checked, machine._skipped):
            memory.clear()
        profile.machine_of.cache_clear()
        fast_path.begin_run()

    forget()
    yield forget
    forget()


def choose(*names, measures=True, facts=(64, torch.bfloat16), run=lambda name: CANDIDATES[name]()):
    arguments = "sums of {} in {}", facts, CPU, ("usual", *names), run
    if not measures:
        return machine.choose(*arguments, incumbent="usual", tolerance=1e-3)
    with machine.measuring():
        return machine.choose(*arguments, incumbent="usual", tolerance=1e-3)


def never(name):
    pytest.fail(f"{name} ran")


def state_of(name):
    return next((rows[name].state for rows in profile.rows(CPU).values() if name in rows), "unknown")


def test_the_fastest_right_candidate_is_enabled_kept_and_noted_for_the_run(restart):
    assert choose("fast", "faster", "slow") == "faster"
    restart()
    assert choose("fast", "faster", "slow", measures=False) == "faster"
    assert [state_of(name) for name in ("fast", "slow")] == ["enabled", "verified"]
    said = {"measured sums of 64 in torch.bfloat16": "faster is 4.00 times as fast as usual (25 ms, not 100)"}
    assert fast_path.notes() == said
    fast_path.begin_run()
    assert not fast_path.notes()
    assert choose("fast", "faster", "slow", measures=False, run=None) == "faster"  # which was right in this process
    assert fast_path.notes() == said


@pytest.mark.parametrize("bad", ["slow", "slowest", "same", "wrong", "NaN", "short", "unsteady", "raises", "full"])
def test_bad_candidate_is_never_enabled(restart, bad):
    assert choose(bad) == "usual"
    restart()
    assert choose(bad) == choose(bad, measures=False) == "usual"
    restart()
    assert choose(bad, "fast") == "fast"  # and keeps no other from it


@pytest.mark.parametrize("bad", ["wrong", "raises"])
def test_quarantined_candidate_is_not_run_again(restart, bad, monkeypatch):
    choose(bad)
    restart()
    monkeypatch.setitem(CANDIDATES, bad, lambda: never(bad))
    assert choose(bad) == "usual"
    assert state_of(bad) == "quarantined"
    assert f"{bad} is not used, it " in fast_path.notes()["measured sums of 64 in torch.bfloat16"]


def test_times_that_overlap_enable_nothing(restart, monkeypatch):
    turns = {"usual": [0.1, 0.2] * 9, "fast": [0.05, 0.15] * 9}
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: turns[run.args[0]].pop())
    assert choose("fast") == "usual"
    assert state_of("fast") == "verified"


def test_nothing_is_tried_without_leave_or_time(restart, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "fast", lambda: never("fast"))
    assert choose("fast", measures=False) == "usual"
    assert choose("fast", run=None) == "usual"
    with fast_path.recording():
        assert choose("fast") == "usual"
    for stop in ({"should_stop": lambda: True}, {"seconds": 0.0}):
        with machine.measuring(**stop):
            assert not machine.has_time()
            assert choose("fast", measures=False) == "usual"


def test_profile_that_is_off_hides_enabled_candidates_and_measures_nothing(restart, monkeypatch):
    choose("fast")
    with machine.safe():
        assert choose("fast") == choose("faster", run=never) == "usual"
    monkeypatch.setenv("LIGHTFORCING_PROFILE", "off")
    restart()
    assert choose("fast") == choose("faster", run=never) == "usual"


def test_look_is_announced_once_and_not_if_all_is_known(restart):
    said = []
    for _ in range(2):
        with machine.measuring(said.append):
            for size in (1, 2):
                assert choose("fast", facts=(size, 0), measures=False) == "fast"
    assert said == ["measuring this machine, once, about 8 s"]


def test_choices_inside_the_incumbent_are_measured_first_and_those_inside_a_candidate_are_not(restart):
    def run(name):
        inner.append((name, choose("faster", facts=(f"in {name}", 0), measures=False)))
        return RIGHT.clone()

    inner = []
    assert choose("fast", run=run) == "fast"
    assert set(inner) == {("usual", "faster"), ("fast", "usual")}
    with machine.measuring():
        assert choose("faster", facts=("in fast", 0), measures=False) == "faster"


def test_candidate_that_turns_wrong_is_found_by_the_next_process(restart, monkeypatch, caplog):
    choose("fast")
    restart()
    monkeypatch.setitem(CANDIDATES, "fast", CANDIDATES["wrong"])
    with caplog.at_level(logging.WARNING):
        assert choose("fast", measures=False) == "usual"
    assert "sums of 64 in torch.bfloat16: fast is not used any more, it is wrong by 12.5%" in caplog.text
    restart()
    monkeypatch.setitem(CANDIDATES, "fast", RIGHT.clone)
    assert choose("fast") == "usual"


def test_candidate_that_fails_while_it_is_timed_is_quarantined(restart, monkeypatch):
    results = iter([RIGHT, RIGHT])
    monkeypatch.setitem(CANDIDATES, "fast", lambda: next(results))
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: 0.01 * run().numel())
    assert choose("fast") == "usual"
    assert state_of("fast") == "quarantined"


def test_each_process_compares_once(restart):
    choose("fast")
    restart()
    ran = []
    for _ in range(3):
        choose("fast", measures=False, run=lambda name: ran.append(name) or RIGHT)
    assert ran == ["usual", "fast"]


def test_work_too_slow_to_measure_in_time_is_left_alone(restart, monkeypatch):
    monkeypatch.setitem(SPEEDS, "usual", 1.0)
    monkeypatch.setitem(CANDIDATES, "fast", lambda: never("fast"))
    assert choose("fast") == "usual"


def test_a_lost_device_is_raised_and_its_cause_quarantined(restart, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "fast", fails(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(fast_path.DeviceLost):
        choose("fast")
    assert state_of("fast") == "quarantined"


def test_a_lost_device_is_raised_if_the_profile_is_lost_too(restart, monkeypatch):
    def lost():
        damaged(profile.folder())
        raise fast_path.DeviceLost("illegal memory access")

    monkeypatch.setitem(CANDIDATES, "fast", lost)
    with pytest.raises(fast_path.DeviceLost):
        choose("fast")


def test_measuring_again_forgets_no_winner_that_a_recording_needs(restart):
    assert choose("fast") == "fast"
    with machine.measuring(), fast_path.recording():
        assert choose("fast", measures=False) == "fast"


def test_incumbent_that_fails_decides_nothing(restart, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "usual", fails(RuntimeError("no kernel image")))
    assert choose("fast") == "usual"
    monkeypatch.setitem(CANDIDATES, "usual", RIGHT.clone)
    restart()
    assert choose("fast") == "fast"


def test_another_machine_or_shape_is_not_concerned(restart, monkeypatch):
    choose("fast")
    assert choose("fast", facts=(65, 0), measures=False) == "usual"
    monkeypatch.setattr(torch, "__version__", "2.99")
    restart()
    assert choose("fast", measures=False) == "usual"


CHILD = """
import os, sys, torch
from lightforcing.lightforcing_core import machine
machine.LEASE = {lease}
x = torch.ones(4)
machine.seconds_of = lambda run, device: 0.1 if run.args[0] == "usual" else 0.05
def run(name):
    return x * 1 if name == "usual" or not {crashes} else os._exit(7)
for number in range({keys}):
    with machine.measuring():
        names = "usual", "fast"
        print(machine.choose("sums", (sys.argv[1], number), x.device, names, run, incumbent="usual", tolerance=0.0))
"""


def child(name, *, crashes=False, keys=1, lease=0.0):
    code = CHILD.format(crashes=crashes, keys=keys, lease=lease)
    return subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True, env=os.environ)


def test_candidate_that_ends_the_process_twice_is_never_tried_again(restart):
    for name in "aba":
        assert child(name, crashes=True).wait() == 7
    assert child("b", lease=60.0).communicate()[0] == "usual\n"  # as if another process were still trying it
    assert state_of("fast") == "trying"
    assert child("a").communicate()[0] == "usual\n"
    assert sorted(rows["fast"].state for rows in profile.rows(CPU).values()) == ["quarantined", "trying"]
    assert child("b").communicate()[0] == "fast\n"  # whose process may have ended in a power cut


def test_an_interrupt_while_a_candidate_runs_is_no_crash(restart, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "fast", fails(KeyboardInterrupt()))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            choose("fast")
        assert state_of("fast") == "unknown"


def test_processes_that_write_at_once_lose_nothing(restart):
    children = [child(name, keys=20) for name in "ab"]
    assert [one.communicate()[0] for one in children] == ["fast\n" * 20] * 2
    assert len(profile.rows(CPU)) == 40


def damaged(place):
    (place / profile.FILE).write_bytes(b"no database" * 99)


def folder_of_that_name(place):
    (place / profile.FILE).unlink()
    (place / profile.FILE).mkdir()


def no_folder(place):
    (place / profile.FILE).unlink()
    place.rmdir()
    place.touch()


def of_another_shape(place):
    with closing(sqlite3.connect(place / profile.FILE)) as database:
        database.executescript("DROP TABLE proofs; CREATE TABLE proofs (key, value)")


@pytest.mark.parametrize("happens", [damaged, folder_of_that_name, no_folder, of_another_shape])
def test_profile_that_cannot_be_used_costs_a_warning_and_nothing_is_tried(restart, caplog, happens):
    choose("fast")
    happens(profile.folder())
    restart()
    assert choose("fast", "faster", run=never) == choose("fast", facts=(1, 2), run=never) == "usual"
    assert caplog.text.count("delete it or make it writable") == 1


def test_profile_that_another_process_holds_costs_a_warning(restart, monkeypatch, caplog):
    choose("fast")
    restart()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout, **how: connect(path, timeout=0.01, **how))
    with closing(connect(profile.folder() / profile.FILE, isolation_level="EXCLUSIVE")) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert choose("fast", run=never) == "usual"
        assert "locked); end the process that holds it" in caplog.text
    restart()
    assert choose("fast") == "fast"


def test_a_safe_run_uses_incumbents_alone(restart):
    choose("fast")
    restart()
    with machine.safe():
        assert choose("fast", run=never) == "usual"
    assert choose("fast") == "fast"


def test_profile_that_cannot_be_written_is_read(restart, monkeypatch):
    choose("fast")
    connect = profile.sqlite3.connect
    monkeypatch.setattr(profile.sqlite3, "connect", lambda path, **_: connect(f"file:{path}?mode=ro", uri=True))
    restart()
    assert choose("fast", measures=False) == "fast"
    assert choose("faster", facts=(1, 2)) == "usual"


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIGHTFORCING_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile.folder() == tmp_path / "lightforcing"
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path / "mine"))
    assert profile.folder() == tmp_path / "mine"


def test_the_drivers_own_version_is_part_of_the_machine(restart, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    chip = SimpleNamespace(name="GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(torch.version, "hip", None)
    assert profile.machine_of(torch.device("cuda"))[1]["driver"] == "570.86.15"


@pytest.mark.parametrize(("module", "version"), [(None, None), (SimpleNamespace(__version__="3.6.0"), "3.6.0")])
def test_a_triton_that_is_missing_or_has_another_distribution_is_no_error(restart, monkeypatch, module, version):
    monkeypatch.setitem(sys.modules, "triton", module)
    assert profile.machine_of(CPU)[1]["triton"] == version
