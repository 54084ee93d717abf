"""`lightforcing queue` as typed: exit codes, the event stream, and a command that is stopped or killed."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

from lightforcing.cli.main import app
from lightforcing.cli.queue import display

from ...support.queue_samples import GRAPH, events_of, hold, text_of, texts_below, wait_until


@pytest.fixture
def command(tmp_path, comfy):
    """Arguments of `lightforcing` for a batch of `count` prompts, more at the end."""

    def arguments(*more, count=4):
        (tmp_path / "prompts.txt").write_text("\n".join(f"text {number}" for number in range(1, count + 1)))
        return single(tmp_path, comfy, "--prompts", tmp_path / "prompts.txt", *more)

    return arguments


def single(tmp_path, fake, *more):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    given = ["queue", tmp_path / "graph.json", "--server", fake.url, "--out", tmp_path / "out", *more]
    return [str(argument) for argument in given]


def run(arguments):
    return CliRunner().invoke(app, arguments)


def start(arguments):
    """The command as a process of its own, with a Ctrl-C that works."""
    code = "from lightforcing.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def complete(count):
    return {f"{number:04d}": f"text {number}" for number in range(1, count + 1)}


def test_batch_ends_with_0_and_a_folder_each(comfy, command, tmp_path):
    result = run(command())
    assert result.exit_code == 0, result.stderr
    assert texts_below(tmp_path / "out") == complete(4)
    assert "4 of 4 prompts done, 0 failed, 0 left" in result.stdout
    assert result.stdout.count("wrote ") == 4
    again = run(command())
    assert again.exit_code == 0
    assert "4 of 4 prompts are done already" in again.stdout
    assert len(comfy.prompts) == 4


def test_failed_prompt_is_named_and_tried_again_by_the_next_start(comfy, command, tmp_path):
    failure = {"node_id": "3", "exception_message": "out of memory"}
    broken = {"outputs": {}, "status": {"status_str": "error", "messages": [["execution_error", failure]]}}
    good = comfy.render
    comfy.render = lambda body: broken if text_of(body) == "text 2" else good(body)
    result = run(command())
    assert result.exit_code == 1
    assert "lightforcing: 0002: My sampler: out of memory" in result.stderr
    assert "3 of 4 prompts done, 1 failed, 0 left" in result.stdout
    assert len(comfy.prompts) == 4
    comfy.render = good
    assert run(command()).exit_code == 0
    assert len(comfy.prompts) == 5
    assert texts_below(tmp_path / "out") == complete(4)


def test_json_is_all_there_is_on_stdout_and_as_described(comfy, command):
    rows = {row.split("|")[1].strip(): row.split("|")[3] for row in display.__doc__.splitlines() if row[:2] == "| "}
    fields = {name: re.findall(r"\w+", re.sub(r"\(.*?\)", "", row)) for name, row in rows.items()}
    result = run(command("--json"))
    assert result.exit_code == 0
    events = events_of(result.stdout)
    assert (events[0]["event"], events[-1]["event"]) == ("batch", "summary")
    counts = Counter(event["event"] for event in events)
    assert (counts["submitted"], counts["finished"]) == (4, 4)
    assert counts["progress"] >= 4
    for event in events:
        assert list(event) == ["event", "time", *fields[event["event"]]]
    end = {"prompts": 4, "done": 4, "failed": 0, "left": 0}
    assert {key: events[-1][key] for key in end} == end
    finished = next(event for event in events if event["event"] == "finished")
    assert finished["server"] == comfy.url
    assert finished["prompt_id"] in [body["prompt_id"] for body in comfy.prompts]


def test_single_prompt_has_files_and_events_and_no_ledger(comfy, tmp_path):
    result = run(single(tmp_path, comfy, "--json"))
    kinds = [event["event"] for event in events_of(result.stdout)]
    assert [kind for kind in kinds if kind != "progress"] == ["batch", "submitted", "finished", "summary"]
    files = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")]
    assert files == ["video/clip_00001_.txt"]
    assert run(single(tmp_path, comfy)).exit_code == 0
    assert (tmp_path / "out" / "video" / "clip_00002_.txt").exists()


def test_message_of_a_server_cannot_steer_the_terminal(comfy, tmp_path):
    comfy.refusal = {"error": {"message": "no\x1b[2J\u202e\ud800\nway"}}
    assert "lightforcing: no?[2J??\nway" in run(single(tmp_path, comfy)).stderr


def test_parts_that_the_server_left_out_are_named_and_exit_1(comfy, tmp_path):
    comfy.node_errors = {"3": {"errors": [{"message": "Bad", "details": "seed"}]}}
    result = run(single(tmp_path, comfy))
    assert result.exit_code == 1
    assert "left out by the server: My sampler: Bad (seed)" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "3.speed=1"], "My sampler (node 3) has no input 'speed'; it has block, cfg, mode, positive"),
        (["--prompt-node", "2"], "--prompt-node sets the input for the lines of --prompts"),
        (
            ["--server", "http://other"],
            "--server is given more than once, but a batch runs on one server; start one command per",
        ),
        (["--nonsense"], "No such option"),
        (["--seeds", "1-2", "--save-previews", "out"], "--save-previews out is a folder of results; choose another"),
        (["--seeds", "1-2", "--save-previews", "out/prompt-seed2/seen"], "is a folder of results"),
    ],
)
def test_options_that_do_not_fit_exit_2_and_send_nothing(comfy, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    result = run(single(tmp_path, comfy, *more))
    assert result.exit_code == 2
    assert message in result.stderr
    assert comfy.prompts == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [[], ["--seeds", "1-2"]])
def test_server_that_is_not_there_exits_1_at_once(comfy, tmp_path, more):
    comfy.url = "http://127.0.0.1:9"
    result = run(single(tmp_path, comfy, *more))
    assert result.exit_code == 1
    assert "lightforcing: no ComfyUI server answers at http://127.0.0.1:9" in result.stderr


def test_ctrl_c_interrupts_the_server_and_the_next_start_goes_on(comfy, command, tmp_path):
    hold(comfy, after=1)
    process = start(command("--json", count=3))
    try:
        wait_until(lambda: (tmp_path / "out" / "0001").exists() and comfy.held_prompt)
        at_work = comfy.held_prompt
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "start the same command again to continue" in errors
    assert comfy.interrupts == [at_work]
    events = events_of(output)
    assert [event["prompt_id"] for event in events if event["event"] == "cancelled"] == [at_work]
    assert (events[-1]["event"], events[-1]["done"], events[-1]["left"]) == ("summary", 1, 2)
    comfy.hold = False
    assert run(command(count=3)).exit_code == 0
    assert texts_below(tmp_path / "out") == complete(3)
    assert Counter(map(text_of, comfy.rendered)) == Counter(complete(3).values())


def test_killed_command_goes_on_with_what_its_server_did_meanwhile(comfy, command, tmp_path):
    hold(comfy, after=1)
    process = start(command(count=3))
    try:
        wait_until(lambda: len(comfy.rendered) == 1 and comfy.held_prompt)
    finally:
        process.kill()
        process.communicate()
    second = start(command("--json", count=3))
    try:
        still_at_work = comfy.held_prompt
        wait_until(lambda: comfy.connections == 2)
        refused = run(command(count=3))
        comfy.release()
        output, errors = second.communicate(timeout=30)
    finally:
        second.kill()
    assert (refused.exit_code, second.returncode) == (2, 0), errors
    assert "another command uses" in refused.stderr
    assert texts_below(tmp_path / "out") == complete(3)
    assert Counter(map(text_of, comfy.rendered)) == Counter(complete(3).values())
    assert still_at_work in [event["prompt_id"] for event in events_of(output) if event["event"] == "finished"]
    assert "progress" in [event["event"] for event in events_of(output)]
    assert len({body["client_id"] for body in comfy.prompts[:2]}) == 1
    assert comfy.interrupts == []
