"""`lightforcing queue` as typed: exit codes, the event stream, and a client that is stopped or killed."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

from lightforcing.cli.main import app
from lightforcing.lightforcing_core import queue_events

from .queue_samples import GRAPH, events_of, text_of, texts_below, wait_until


@pytest.fixture
def command(tmp_path, servers):
    """Arguments of `lightforcing` for a batch of `count` prompts over both servers, more at the end."""
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))

    def arguments(*more, count=4):
        (tmp_path / "prompts.txt").write_text("\n".join(f"text {number}" for number in range(1, count + 1)))
        given = ["queue", tmp_path / "graph.json", "--out", tmp_path / "out", "--prompts", tmp_path / "prompts.txt"]
        for fake in servers:
            given += ["--server", fake.url]
        return [str(one) for one in (*given, *more)]

    return arguments


def run(arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def single(tmp_path, fake, *more):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    return run(["queue", tmp_path / "graph.json", "--server", fake.url, "--out", tmp_path / "out", *more])


def start(arguments):
    """The command as a process of its own, with a Ctrl-C that works."""
    code = "from lightforcing.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_batch_over_two_servers_ends_with_0_and_a_folder_each(servers, command, tmp_path):
    result = run(command())
    assert result.exit_code == 0, result.stderr
    assert texts_below(tmp_path / "out") == {f"{number:04d}": f"text {number}" for number in range(1, 5)}
    assert "4 of 4 prompts done, 0 failed, 0 left" in result.stdout
    assert result.stdout.count("wrote ") == 4
    again = run(command())
    assert again.exit_code == 0
    assert "4 of 4 prompts are done already" in again.stdout
    assert sum(len(fake.prompts) for fake in servers) == 4


def test_failed_prompt_is_named_and_exits_1(servers, command):
    failure = {"node_id": "3", "exception_message": "out of memory"}
    broken = {"outputs": {}, "status": {"status_str": "error", "messages": [["execution_error", failure]]}}
    for fake in servers:
        good = fake.render
        fake.render = lambda body, good=good: broken if text_of(body) == "text 2" else good(body)
    result = run(command())
    assert result.exit_code == 1
    assert "lightforcing: 0002: My sampler: out of memory" in result.stderr
    assert "3 of 4 prompts done, 1 failed, 0 left" in result.stdout


def test_json_is_all_there_is_on_stdout(servers, command):
    result = run(command("--json"))
    assert result.exit_code == 0
    events = events_of(result.stdout)
    assert (events[0]["event"], events[-1]["event"]) == ("batch", "summary")
    counts = Counter(event["event"] for event in events)
    assert (counts["submitted"], counts["finished"]) == (4, 4)
    assert counts["progress"] >= 4
    for event in events:
        assert set(event) == {"event", "time", *queue_events.FIELDS[event["event"]]}
    assert {key: events[-1][key] for key in ("prompts", "done", "failed", "left")} == {
        "prompts": 4,
        "done": 4,
        "failed": 0,
        "left": 0,
    }
    finished = next(event for event in events if event["event"] == "finished")
    assert finished["server"] in [fake.url for fake in servers]
    assert finished["prompt_id"] in [body["prompt_id"] for fake in servers for body in fake.prompts]


def test_json_is_ascii_whatever_the_prompts_are_called(servers, tmp_path):
    servers[0].events = [("executing", {"node": "3"})]
    (tmp_path / "prompts.jsonl").write_text('{"name": "小熊猫", "text": "x"}', encoding="utf-8")
    result = single(tmp_path, servers[0], "--json", "--prompts", tmp_path / "prompts.jsonl")
    assert result.exit_code == 0
    assert result.stdout.isascii()
    assert {event["prompt"] for event in events_of(result.stdout) if event["event"] == "finished"} == {"小熊猫"}


def test_every_event_and_field_is_described():
    rows = {row.split("|")[1].strip(): row for row in queue_events.__doc__.splitlines() if row.startswith("| ")}
    for name, fields in queue_events.FIELDS.items():
        assert set(fields) <= set(re.findall(r"\w+", rows[name].split("|")[3])), name


def test_single_prompt_streams_events_too(servers, tmp_path):
    result = single(tmp_path, servers[0], "--json")
    kinds = [event["event"] for event in events_of(result.stdout)]
    assert [kind for kind in kinds if kind != "progress"] == ["batch", "submitted", "finished", "summary"]
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["clip_00001_.txt"]


def test_overrides_reach_the_server(servers, tmp_path):
    result = single(tmp_path, servers[0], "--set", "My sampler.mode=growth", "--set", "2.text=a cat")
    assert result.exit_code == 0, result.stderr
    sent = servers[0].prompts[0]["prompt"]
    below = {"mode.target": 0.6, "mode.curve": "linear", "mode.note": ""}
    assert sent["3"]["inputs"] == {**GRAPH["3"]["inputs"], "mode": "growth", **below}
    assert sent["2"]["inputs"]["text"] == "a cat"


def test_single_prompt_answered_from_the_cache_says_so(servers, tmp_path):
    messages = [["execution_cached", {"nodes": ["1", "2", "3", "4"]}]]
    servers[0].render = lambda body: {"outputs": {}, "status": {"status_str": "success", "messages": messages}}
    result = single(tmp_path, servers[0])
    assert result.exit_code == 0
    assert "nothing new: the server answered from its cache" in result.stdout


def test_single_prompt_that_writes_nothing_says_so(servers, tmp_path):
    servers[0].render = None
    result = single(tmp_path, servers[0])
    assert result.exit_code == 0
    assert "wrote no file; add a save node" in result.stdout


def test_seeds_alone_make_a_batch(servers, tmp_path):
    result = single(tmp_path, servers[0], "--seeds", "7,9-10")
    assert result.exit_code == 0, result.stderr
    assert [body["prompt"]["3"]["inputs"]["seed"] for body in servers[0].prompts] == [7, 9, 10]
    assert sorted(texts_below(tmp_path / "out")) == ["prompt-seed10", "prompt-seed7", "prompt-seed9"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "3.speed=1"], "My sampler (node 3) has no input 'speed'; it has block, cfg, mode, positive"),
        (["--set", "7.seed=1"], "no node is called '7'"),
        (["--seeds", "x"], "is no seed and no range"),
        (["--prompt-node", "2"], "--prompt-node says where the lines of --prompts go"),
        (["--prompts", "/nowhere.txt"], "cannot read /nowhere.txt"),
        (["--nonsense"], "No such option"),
    ],
)
def test_options_that_do_not_fit_exit_2_and_send_nothing(servers, tmp_path, more, message):
    result = single(tmp_path, servers[0], *more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert servers[0].prompts == []


def test_refused_start_leaves_no_folder_and_no_journal(servers, command, tmp_path):
    assert run(command("--set", "3.speed=1")).exit_code == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "0002").mkdir(parents=True)
    assert "is there already and not from this batch" in run(command()).stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0002"]


@pytest.mark.parametrize("folder", ["out", "out/0002", "out/0002/seen"])
def test_previews_may_not_lie_where_results_go(servers, command, tmp_path, folder):
    result = run(command("--save-previews", tmp_path / folder))
    assert result.exit_code == 2
    assert "is where results go; choose another folder" in result.stderr
    assert servers[0].prompts == servers[1].prompts == []


def test_changed_batch_is_refused_with_the_way_out(servers, command):
    assert run(command()).exit_code == 0
    for more, count, part in ((["--set", "3.cfg=2"], 4, "options"), ([], 5, "prompt file")):
        result = run(command(*more, count=count))
        assert result.exit_code == 2
        assert f"belongs to a batch with another {part}" in result.stderr
        assert "choose another --out" in result.stderr
    assert sum(len(fake.prompts) for fake in servers) == 4


def test_server_named_twice_is_refused(servers, tmp_path):
    assert "named twice" in single(tmp_path, servers[0], "--server", servers[0].url + "/").stderr


def test_missing_server_is_told_and_the_other_does_all(servers, command, tmp_path):
    result = run(command("--server", "127.0.0.1:9"))
    assert result.exit_code == 0
    assert "no ComfyUI server answers at http://127.0.0.1:9" in result.stderr
    assert len(texts_below(tmp_path / "out")) == 4


def test_no_server_at_all_exits_1(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    arguments = ["queue", tmp_path / "graph.json", "--out", tmp_path / "out", "--seeds", "1-2"]
    result = run([*arguments, "--server", "127.0.0.1:9", "--server", "127.0.0.1:19"])
    assert result.exit_code == 1
    for port in (9, 19):
        assert f"no ComfyUI server answers at http://127.0.0.1:{port}" in result.stderr


def test_ctrl_c_interrupts_every_server_and_the_next_start_goes_on(servers, command, tmp_path):
    for fake in servers:
        fake.hold, fake.hold_after = True, 1
    process = start(command("--json", count=6))
    try:
        wait_until(lambda: all(len(fake.rendered) == 1 and fake.running_prompt for fake in servers))
        at_work = [fake.running_prompt for fake in servers]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "start the same command again to go on" in errors
    assert [fake.interrupts for fake in servers] == [[one] for one in at_work]
    events = events_of(output)
    assert {event["prompt_id"] for event in events if event["event"] == "cancelled"} == set(at_work)
    assert (events[-1]["event"], events[-1]["done"], events[-1]["left"]) == ("summary", 2, 4)
    for fake in servers:
        fake.hold = False
    assert run(command(count=6)).exit_code == 0
    assert texts_below(tmp_path / "out") == {f"{number:04d}": f"text {number}" for number in range(1, 7)}
    assert Counter(text_of(body) for fake in servers for body in fake.rendered) == Counter(
        {f"text {number}": 1 for number in range(1, 7)}
    )


def test_killed_client_goes_on_with_what_its_servers_did_meanwhile(servers, command, tmp_path):
    for fake in servers:
        fake.hold, fake.hold_after = True, 1
    process = start(command(count=6))
    try:
        wait_until(lambda: all(len(fake.rendered) == 1 and fake.held_prompt for fake in servers))
    finally:
        process.kill()
        process.communicate()
    servers[0].release()
    wait_until(lambda: len(servers[0].rendered) == 2)  # finished with nobody there
    still_at_work = servers[1].running_prompt
    second = start(command("--json", count=6))
    try:
        wait_until(lambda: len(servers[0].rendered) == 4)  # everything but what the other server still has
        servers[1].release()
        output, errors = second.communicate(timeout=30)
    finally:
        second.kill()
    assert second.returncode == 0, errors
    assert texts_below(tmp_path / "out") == {f"{number:04d}": f"text {number}" for number in range(1, 7)}
    assert Counter(text_of(body) for fake in servers for body in fake.rendered) == Counter(
        {f"text {number}": 1 for number in range(1, 7)}
    )
    finished = [event["prompt_id"] for event in events_of(output) if event["event"] == "finished"]
    assert still_at_work in finished
    assert len({body["client_id"] for fake in servers for body in fake.prompts}) == 1
    assert [fake.interrupts for fake in servers] == [[], []]


def test_reader_that_goes_away_stops_the_batch(servers, command):
    for fake in servers:
        fake.hold = True
    process = start(command("--json"))
    try:
        process.stdout.readline()
        wait_until(lambda: all(fake.running_prompt for fake in servers))
        process.stdout.close()
        servers[0].release()
        assert process.wait(20) == 1
    finally:
        process.kill()
    assert servers[1].interrupts == [servers[1].prompts[0]["prompt_id"]]
