"""A batch on a server that fails in every way it can: nothing lost, nothing rendered twice, all resumable."""

import json
import sqlite3

import pytest

from lightforcing.cli.queue.batch import _Worker

from ...support.fake_comfy import SUCCESS
from ...support.queue_samples import Batch, hold, text_of, wait_until

JPEG = b"\xff\xd8\xff\xe0picture"
PNG = b"\x89PNG\r\n\x1a\npicture"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_next_prompt_is_sent_before_the_last_ones_files_are_fetched(comfy, out):
    batch = Batch(out, comfy, 3)
    assert batch.run() == (3, 0, 0)
    order = [kind for kind in comfy.requests if kind in ("prompt", "view")]
    assert order == ["prompt", "prompt", "view", "prompt", "view", "view"]
    assert comfy.longest_queue == 1
    batch.check_complete()


def test_timeout_cancels_the_prompt_and_goes_on(comfy, out):
    hold(comfy, after=1)
    batch = Batch(out, comfy, 2, timeout=0.6)
    assert batch.run() == (1, 1, 0)
    assert comfy.interrupts == [comfy.prompts[1]["prompt_id"]]
    assert "not finished after 0.6 s, cancelled" in batch.of("failed")[0]["message"]


def test_prompt_that_somebody_cancelled_on_the_server_fails(comfy, out):
    hold(comfy)
    batch = Batch(out, comfy, 1)
    future = batch.start()
    wait_until(lambda: comfy.held_prompt)
    comfy.interrupts.append(comfy.held_prompt)
    assert future.result(20) == (0, 1, 0)
    assert "the run was interrupted on the server" in batch.of("failed")[0]["message"]


def test_prompt_that_somebody_deleted_on_the_server_is_not_sent_again(comfy, out):
    comfy.record = comfy.render = None
    batch = Batch(out, comfy, 1)
    assert batch.run() == (0, 1, 0)
    assert len(comfy.prompts) == 1
    assert "somebody deleted it there" in batch.of("failed")[0]["message"]


def test_prompt_of_a_server_that_restarted_is_sent_again(comfy, out):
    hold(comfy, after=1)
    batch = Batch(out, comfy, 3, patience=20)
    future = batch.start()
    wait_until(lambda: comfy.held_prompt)
    comfy.crash()
    comfy.hold = False
    comfy.come_back()
    assert future.result(20) == (3, 0, 0)
    assert [event["prompt"] for event in batch.of("returned")] == ["0002"]
    batch.check_complete()


def test_prompt_that_takes_its_server_down_is_given_up(comfy, out):
    comfy.record = comfy.render = None  # forgets every prompt
    comfy.events = ["drop"]
    batch = Batch(out, comfy, 1)
    assert batch.run() == (0, 1, 0)
    assert len(comfy.prompts) == 3
    assert "given up after it was lost 3 times" in batch.of("failed")[0]["message"]


def test_lost_server_ends_the_batch_and_the_next_start_goes_on(comfy, out):
    hold(comfy, after=2)
    batch = Batch(out, comfy, 5)
    future = batch.start()
    wait_until(lambda: len(batch.of("finished")) == 2 and comfy.held_prompt)
    comfy.crash()
    assert future.result(20) == (2, 0, 3)
    assert [event["server"] for event in batch.of("server_lost")] == [comfy.url]
    comfy.hold = False
    comfy.come_back()
    assert batch.run() == (5, 0, 0)
    batch.check_complete()


def test_result_that_was_made_while_nobody_listened_is_fetched(comfy, out):
    hold(comfy)
    batch = Batch(out, comfy, 1)
    future = batch.start()
    wait_until(lambda: comfy.held_prompt)
    comfy.cut_off()
    assert future.result(20) == (0, 0, 1)
    comfy.release()
    wait_until(lambda: comfy.rendered)
    comfy.come_back()
    assert batch.run() == (1, 0, 0)
    batch.check_complete()


@pytest.mark.parametrize("kind", ["no answer", "a proxy answers for the server that restarts"])
def test_short_outage_loses_nothing(comfy, out, kind):
    hold(comfy)
    batch = Batch(out, comfy, 1, patience=20)
    future = batch.start()
    wait_until(lambda: comfy.held_prompt)
    if kind == "no answer":
        comfy.cut_off()
    else:
        comfy.answers = {"history": (502, b"bad gateway")}
    comfy.release()
    asked = len(comfy.requests)
    wait_until(lambda: comfy.rendered and len(comfy.requests) > asked + 1)
    comfy.answers = {}
    comfy.come_back()
    assert future.result(20) == (1, 0, 0)
    batch.check_complete()
    assert batch.of("server_lost") == []


@pytest.mark.parametrize("request_kind", ["prompt", "view"])
def test_lost_answer_makes_no_second_run(comfy, out, request_kind):
    comfy.lose_next_answer_to = request_kind
    batch = Batch(out, comfy, 2, patience=20)
    assert batch.run() == (2, 0, 0)
    batch.check_complete()
    assert len(comfy.prompts) == 2
    assert comfy.requests.count("view") == (3 if request_kind == "view" else 2)


def test_full_disk_ends_the_batch_and_the_result_waits_on_the_server(comfy, out, monkeypatch):
    def full(self, run):
        raise OSError(28, "No space left on device")

    batch = Batch(out, comfy, 3)
    with monkeypatch.context() as patched:
        patched.setattr(_Worker, "_store", full)
        with pytest.raises(OSError, match="No space left"):
            batch.run()
    assert batch.run() == (3, 0, 0)
    batch.check_complete(once=False)
    assert [text_of(body) for body in comfy.rendered].count("text 1") == 1


def test_folder_of_a_job_appears_whole_or_not_at_all(comfy, out):
    good = comfy.render

    def with_a_missing_file(body):
        record = good(body)
        missing = {"filename": "gone.txt", "subfolder": "", "type": "output"}
        return {**record, "outputs": {**record["outputs"], "5": {"images": [missing]}}}

    comfy.render = with_a_missing_file
    batch = Batch(out, comfy, 1)
    assert batch.run() == (0, 1, 0)
    assert "HTTP 404" in batch.of("failed")[0]["message"]
    assert not (out / "0001").exists()
    comfy.render = good
    assert batch.run() == (1, 0, 0)
    batch.check_complete(once=False)


def test_crash_between_the_folder_and_the_ledger_is_noticed(comfy, out):
    batch = Batch(out, comfy, 2)
    batch.run()
    ledger = sqlite3.connect(out / "queue.sqlite3")
    ledger.execute("UPDATE jobs SET state = 'sent', files = NULL WHERE name = '0002'")
    ledger.commit()
    (out / ".0001.part").mkdir()
    assert batch.run() == (2, 0, 0)
    batch.check_complete()
    (files,) = ledger.execute("SELECT files FROM jobs WHERE name = '0002'").fetchone()
    assert json.loads(files) == ["0002/video/clip_00002_.txt"]


@pytest.mark.parametrize(("nodes", "cached"), [(["1", "2", "4"], True), (["1", "2"], False)])
def test_answer_from_the_cache_is_said_and_fetched(comfy, out, nodes, cached):
    """It is one if the output nodes are cached; cached loaders alone are not."""
    good = comfy.render
    messages = [["execution_cached", {"nodes": nodes}]]
    comfy.render = lambda body: {
        **good(body),
        "prompt": [0, "id", {}, {}, ["4"]],
        "status": {**SUCCESS, "messages": messages},
    }
    batch = Batch(out, comfy, 1)
    batch.run()
    batch.check_complete()
    assert [event["cached"] for event in batch.of("finished")] == [cached]


def test_error_event_counts_even_if_history_calls_it_success(comfy, out):
    comfy.events = [("execution_error", {"node_id": "1", "exception_message": "no file\n"})]
    batch = Batch(out, comfy, 1)
    assert batch.run() == (0, 1, 0)
    assert batch.of("failed")[0]["message"] == "Load CLIP: no file"


def test_progress_follows_a_prompt_through_a_dropped_stream(comfy, out):
    comfy.events = [
        ("executing", {"node": None, "prompt_id": "another"}),
        ("execution_cached", {"nodes": ["1"]}),
        ("executing", {"node": "2"}),
        "drop",
        ("executing", {"node": "3"}),
        ("progress", {"node": "3", "value": 3, "max": 28}),
        ("progress", {"node": "3", "value": "x", "max": None}),
    ]
    batch = Batch(out, comfy, 1)
    assert batch.run() == (1, 0, 0)
    assert comfy.connections == 2
    shown = [(step["node"], step["value"], step["total"], step["nodes_done"]) for step in batch.of("progress")]
    assert [row for row in shown if "queue" not in row[0]] == [
        ("Prompt", 0.0, 1.0, 1),
        ("My sampler", 0.0, 1.0, 2),
        ("My sampler", 3.0, 28.0, 2),
    ]


def test_previews_of_both_forms_are_saved(comfy, out, tmp_path):
    def with_metadata(**about):
        words = json.dumps(about).encode()
        return (4).to_bytes(4, "big") + len(words).to_bytes(4, "big") + words + PNG

    plain = (1).to_bytes(4, "big") * 2 + JPEG
    foreign = with_metadata(prompt_id="another", node_id="9")
    noise = [b"", b"\0\0", (1).to_bytes(4, "big") * 2 + b"no picture", (4).to_bytes(4, "big") + b"\0\0\0\5oops!" + PNG]
    comfy.events += [plain, foreign, *noise, with_metadata(node_id="3:1", display_node_id="3")]
    batch = Batch(out, comfy, 1, previews=tmp_path / "previews")
    batch.run()
    folder = tmp_path / "previews" / "0001"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"00001.jpg": JPEG, "00002.png": PNG}
    assert [(event["node"], event["file"]) for event in batch.of("preview")] == [
        (None, str(folder / "00001.jpg")),
        ("3", str(folder / "00002.png")),
    ]
    assert comfy.client_messages[0]["data"] == {"supports_preview_metadata": True}
    assert comfy.prompts[0]["extra_data"]["preview_method"] == "auto"


def test_previews_are_neither_asked_for_nor_kept_unless_wanted(comfy, out):
    comfy.events.append((1).to_bytes(4, "big") * 2 + JPEG)
    batch = Batch(out, comfy, 1)
    assert batch.run() == (1, 0, 0)
    assert comfy.client_messages == batch.of("preview") == []
    assert "extra_data" not in comfy.prompts[0]
