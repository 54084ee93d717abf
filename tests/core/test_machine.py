"""Choices by measurement, with made-up candidates and an injected clock."""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lightforcing.lightforcing_core import fast_path, machine

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


def test_a_triton_that_is_missing_or_has_another_distribution_is_no_error(restart, monkeypatch):
    for module, version in ((None, None), (SimpleNamespace(__version__="3.6.0"), "3.6.0")):
        monkeypatch.setitem(sys.modules, "triton", module)
        restart()
        assert machine._machine(CPU)[1]["triton"] == version


@pytest.fixture
def restart(monkeypatch, tmp_path):
    """Forgets what was read and chosen, as a new process with the same cache folder does."""
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTFORCING_PROFILE")
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: SPEEDS[name_of(run)])

    def forget():
        for name in ("settled", "checked", "skipped", "unfinished", "known", "machines"):
            getattr(machine, f"_{name}").clear()
        fast_path.begin_run()

    forget()
    yield forget
    forget()


def name_of(run):
    return getattr(run, "name", "usual")


class Named:
    """A candidate that the clock knows, and that counts its runs."""

    def __init__(self, name):
        self.name, self.runs = name, 0

    def __call__(self):
        self.runs += 1
        return CANDIDATES[self.name]()


def choose(*names, measures=True, key=(64, torch.bfloat16), **rest):
    candidates = {name: Named(name) for name in ("usual", *names)}
    if not measures:
        return machine.choose("sums", key, CPU, candidates, incumbent="usual", tolerance=1e-3, **rest)
    with machine.measuring():
        return machine.choose("sums", key, CPU, candidates, incumbent="usual", tolerance=1e-3, **rest)


def state_of(name):
    return next(rows[name]["state"] for rows in machine.profile(CPU)["choices"].values() if name in rows)


def test_the_fastest_right_candidate_is_enabled_and_kept(restart):
    assert choose("fast", "faster", "slow") == "faster"
    restart()
    assert choose("fast", "faster", "slow", measures=False) == "faster"
    assert [state_of(name) for name in ("fast", "slow")] == ["enabled", "verified"]
    because = "4.00 times as fast as usual (25 ms, not 100)"
    assert machine.explain() == [f"sums (64, torch.bfloat16): faster {because}"]
    assert machine.reason("sums", (64, torch.bfloat16), CPU, "usual", "faster") == because


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
    monkeypatch.setitem(CANDIDATES, bad, lambda: pytest.fail("it ran"))
    assert choose(bad) == "usual"
    assert state_of(bad) == "quarantined"


def test_times_that_overlap_enable_nothing(restart, monkeypatch):
    turns = {"usual": [0.1, 0.2] * 9, "fast": [0.05, 0.15] * 9}
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: turns[name_of(run)].pop())
    assert choose("fast") == "usual"
    assert state_of("fast") == "verified"


def test_nothing_is_tried_without_leave_or_time(restart, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "fast", lambda: pytest.fail("it ran"))
    assert choose("fast", measures=False) == "usual"
    assert choose("fast", allowed=False) == "usual"
    with fast_path.recording():
        assert choose("fast") == "usual"
    with machine.safe():
        assert choose("fast") == "usual"
    for stop in ({"should_stop": lambda: True}, {"seconds": 0.0}):
        with machine.measuring(**stop):
            assert choose("fast", measures=False) == "usual"
    monkeypatch.setenv("LIGHTFORCING_PROFILE", "off")
    assert choose("fast") == "usual"


def test_profile_that_is_off_hides_enabled_candidates_too(restart, monkeypatch):
    choose("fast")
    with machine.safe():
        assert choose("fast", measures=False) == "usual"
    monkeypatch.setenv("LIGHTFORCING_PROFILE", "off")
    restart()
    assert choose("fast", measures=False) == "usual"


def test_look_is_announced_once_and_not_if_all_is_known(restart):
    said = []
    for _ in range(2):
        with machine.measuring(said.append):
            for key in (1, 2):
                assert choose("fast", key=key, measures=False) == "fast"
    assert said == ["measuring this machine, once, about 8 s"]


def test_candidate_that_chooses_itself_measures_nothing_inside(restart, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "fast", lambda: RIGHT if choose("faster", key="inner", measures=False) else None)
    assert choose("fast") == "fast"
    with machine.measuring():
        assert choose("faster", key="inner", measures=False) == "faster"


def test_candidate_that_turns_wrong_is_found_by_the_next_process(restart, monkeypatch, caplog):
    choose("fast")
    restart()
    monkeypatch.setitem(CANDIDATES, "fast", CANDIDATES["wrong"])
    with caplog.at_level(logging.WARNING):
        assert choose("fast", measures=False) == "usual"
    assert "fast is not used any more for sums | (64, torch.bfloat16) | usual: it is wrong by 12.5%" in caplog.text
    restart()
    monkeypatch.setitem(CANDIDATES, "fast", RIGHT.clone)
    assert choose("fast") == "usual"


def test_candidate_that_fails_while_it_is_timed_is_quarantined(restart, monkeypatch):
    results = iter([RIGHT, RIGHT])
    monkeypatch.setitem(CANDIDATES, "fast", lambda: next(results))
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: run().numel())
    monkeypatch.setattr(machine, "SHARE", 10.0)
    assert choose("fast") == "usual"
    assert state_of("fast") == "quarantined"


def test_each_process_compares_once(restart):
    choose("fast")
    restart()
    candidates = {name: Named(name) for name in ("usual", "fast")}
    for _ in range(3):
        machine.choose("sums", (64, torch.bfloat16), CPU, candidates, incumbent="usual", tolerance=1e-3)
    assert [run.runs for run in candidates.values()] == [1, 1]


def test_work_too_slow_to_measure_in_time_is_left_alone(restart, monkeypatch):
    monkeypatch.setitem(SPEEDS, "usual", 1.0)
    monkeypatch.setitem(CANDIDATES, "fast", lambda: pytest.fail("it ran"))
    assert choose("fast") == "usual"


def test_a_closer_reference_is_held_too(restart):
    far, near = (lambda: RIGHT.double() * 1.01), RIGHT.double
    assert choose("fast", reference=far) == "usual"
    assert choose("faster", reference=near, key=1) == "faster"


def test_a_lost_device_is_raised_and_its_cause_quarantined(restart, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "fast", fails(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(fast_path.DeviceLost):
        choose("fast")
    restart()
    monkeypatch.setitem(CANDIDATES, "fast", RIGHT.clone)
    assert choose("fast") == "usual"
    assert state_of("fast") == "quarantined"


def test_incumbent_that_fails_decides_nothing(restart, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "usual", fails(RuntimeError("no kernel image")))
    assert choose("fast") == "usual"
    monkeypatch.setitem(CANDIDATES, "usual", RIGHT.clone)
    restart()
    assert choose("fast") == "fast"


def test_another_machine_or_shape_is_not_concerned(restart, monkeypatch):
    choose("fast")
    assert choose("fast", key=65, measures=False) == "usual"
    monkeypatch.setattr(torch, "__version__", "2.99")
    restart()
    assert choose("fast", measures=False) == "usual"


CHILD = """
import os, sys, torch
from lightforcing.lightforcing_core import machine
x = torch.ones(4)
machine.seconds_of = lambda run, device: 0.1 if run == x.clone else 0.05
for number in range({keys}):
    with machine.measuring():
        run = {{"usual": x.clone, "fast": {fast}}}
        print(machine.choose("sums", (sys.argv[1], number), x.device, run, incumbent="usual", tolerance=0.0))
"""


def child(name, fast="lambda: x * 1", keys=1):
    code = CHILD.format(fast=fast, keys=keys)
    return subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True, env=os.environ)


def test_candidate_that_ends_the_process_is_never_tried_again(restart, caplog):
    assert child("a", fast="lambda: os._exit(7)").wait() == 7
    (left,) = machine.folder().iterdir()
    assert "trying" in left.name
    again = child("a")
    assert again.communicate()[0] == "usual\n"
    (kept,) = machine.folder().iterdir()
    assert "ended or froze the process that tried it, 20" in kept.read_text()
    assert child("b").communicate()[0] == "fast\n"  # of another shape it is


def test_processes_that_write_at_once_lose_nothing(restart):
    children = [child(name, keys=20) for name in "ab"]
    assert [one.communicate()[0] for one in children] == ["fast\n" * 20] * 2
    assert len(machine.profile(CPU)["choices"]) == 40


def test_candidate_that_another_process_is_trying_is_left_alone(restart):
    with machine._trying(machine.Choice("sums", ("a", 0), CPU, "usual"), "fast"):
        assert child("a").communicate()[0] == "fast\n"


@pytest.mark.parametrize(
    "damage", ["{", "[" * 500, '["a"]', '["a", "b", "c", "enabled", "d", "x"]', '["a", "b", 1, "sure", "d", 1]', "\0"]
)
def test_damaged_lines_are_reported_once_and_ignored(restart, damage, caplog):
    choose("fast")
    path = machine.folder() / machine.FILE
    path.write_text(f"{damage}\n{damage}\n{path.read_text()}")
    restart()
    with caplog.at_level(logging.WARNING):
        assert choose("fast", measures=False) == "fast"
    assert caplog.text.count("damaged lines") == 1


def test_file_that_is_too_large_or_no_file_is_ignored(restart, monkeypatch, caplog):
    choose("fast")
    monkeypatch.setattr(machine, "MOST_BYTES", 10)
    restart()
    assert choose("fast", measures=False) == "usual"
    (machine.folder() / machine.FILE).mkdir()
    restart()
    assert choose("fast") == "fast"
    assert "a folder, not a file" in caplog.text
    assert "not kept for the next run" in caplog.text


def test_folder_that_cannot_be_written_costs_a_warning_and_nothing_is_tried(restart, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setitem(CANDIDATES, "fast", lambda: pytest.fail("it ran"))
    assert choose("fast") == "usual"
    assert caplog.text.count("cannot be written") == 1


def test_profile_is_json_and_names_no_path(restart):
    choose("fast", "wrong")
    text = json.dumps(machine.profile(CPU))
    assert "/" not in text
    assert os.uname().nodename not in text


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIGHTFORCING_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.folder() == tmp_path / "lightforcing"
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path / "mine"))
    assert machine.folder() == tmp_path / "mine"
