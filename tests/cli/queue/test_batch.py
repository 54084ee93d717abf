"""A batch on a server that fails in every way it can: nothing lost or rendered twice, all resumable; and its ledger."""

import json

import pytest

from lightforcing.cli.queue.batch import Batch, Ledger
from lightforcing.cli.queue.jobs import Job
from lightforcing.cli.queue.prompt import UsageError

from ...support.queue_samples import TextBatch, hold, text_of, wait_until

PNG = b"\x89PNG\r\n\x1a\npicture"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_prompt_that_somebody_cancelled_on_the_server_fails(comfy, out):
    hold(comfy)
    batch = TextBatch(out, comfy, 1)
    future = batch.start()
    wait_until(lambda: comfy.held_prompt)
    comfy.interrupts.append(comfy.held_prompt)
    assert future.result(20) == (0, 1, 0)
    assert "the run was interrupted on the server" in batch.of("failed")[0]["message"]


@pytest.mark.parametrize(
    ("events", "sent", "message"),
    [([], 1, "somebody deleted it there"), (["drop"], 3, "given up after it was lost 3 times")],
)
def test_prompt_that_the_server_forgets_fails_and_is_sent_again_only_after_a_restart(comfy, out, events, sent, message):
    comfy.record = comfy.render = None
    comfy.events = events
    batch = TextBatch(out, comfy, 1)
    assert batch.run() == (0, 1, 0)
    assert len(comfy.prompts) == sent
    assert message in batch.of("failed")[0]["message"]


def test_prompt_of_a_server_that_restarted_is_sent_again(comfy, out):
    hold(comfy, after=1)
    batch = TextBatch(out, comfy, 3, patience=20)
    future = batch.start()
    wait_until(lambda: comfy.held_prompt)
    comfy.crash()
    comfy.hold = False
    comfy.come_back()
    assert future.result(20) == (3, 0, 0)
    assert [event["prompt"] for event in batch.of("returned")] == ["0002"]
    batch.check_complete()


def test_lost_server_ends_the_batch_and_the_next_start_goes_on(comfy, out):
    hold(comfy, after=2)
    batch = TextBatch(out, comfy, 5)
    future = batch.start()
    wait_until(lambda: len(batch.of("finished")) == 2 and comfy.held_prompt)
    comfy.crash()
    assert future.result(20) == (2, 0, 3)
    assert [event["server"] for event in batch.of("server_lost")] == [comfy.url]
    comfy.hold = False
    comfy.come_back()
    assert batch.run() == (5, 0, 0)
    batch.check_complete()


@pytest.mark.parametrize("request_kind", ["prompt", "view"])
def test_lost_answer_makes_no_second_run(comfy, out, request_kind):
    comfy.lose_next_answer_to = request_kind
    batch = TextBatch(out, comfy, 2, patience=20)
    assert batch.run() == (2, 0, 0)
    batch.check_complete()
    assert len(comfy.prompts) == 2
    assert comfy.requests.count("view") == (3 if request_kind == "view" else 2)


def test_full_disk_ends_the_batch_and_the_result_waits_on_the_server(comfy, out, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    batch = TextBatch(out, comfy, 3)
    with monkeypatch.context() as patched:
        patched.setattr(Batch, "_store", full)
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
    batch = TextBatch(out, comfy, 1)
    assert batch.run() == (0, 1, 0)
    assert "HTTP 404" in batch.of("failed")[0]["message"]
    assert not (out / "0001").exists()
    comfy.render = good
    assert batch.run() == (1, 0, 0)
    batch.check_complete(once=False)


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
    batch = TextBatch(out, comfy, 1)
    assert batch.run() == (1, 0, 0)
    assert comfy.connections == 2
    shown = [(step["node"], step["value"], step["total"], step["nodes_done"]) for step in batch.of("progress")]
    assert [row for row in shown if "queue" not in row[0]] == [
        ("Prompt", 0.0, 1.0, 1),
        ("My sampler", 0.0, 1.0, 2),
        ("My sampler", 3.0, 28.0, 2),
    ]


def test_timeout_cancels_the_prompt_and_the_next_one_runs(comfy, out):
    hold(comfy, after=1)
    batch = TextBatch(out, comfy, 2, timeout=0.6)
    assert batch.run() == (1, 1, 0)
    assert comfy.interrupts == [comfy.prompts[1]["prompt_id"]]
    assert "not finished after 0.6 s, cancelled" in batch.of("failed")[0]["message"]


def test_previews_of_the_run_alone_are_saved(comfy, out, tmp_path):
    def frame(**about):
        words = json.dumps(about).encode()
        return (4).to_bytes(4, "big") + len(words).to_bytes(4, "big") + words + PNG

    noise = [b"", b"\0\0", (1).to_bytes(4, "big") * 2 + PNG, (4).to_bytes(4, "big") + b"\0\0\0\5oops!" + PNG]
    batch = TextBatch(out, comfy, 1, previews=tmp_path / "previews")
    comfy.events += [*noise, frame(prompt_id="another", node_id="9")]
    comfy.previews = lambda prompt_id: frame(prompt_id=prompt_id, node_id="3:1", display_node_id="3")
    batch.run()
    path = tmp_path / "previews" / "0001" / "00001.png"
    assert [(event["node"], event["file"]) for event in batch.of("preview")] == [("3", str(path))]
    assert [one.read_bytes() for one in path.parent.iterdir()] == [PNG]
    assert comfy.client_messages[0]["data"] == {"supports_preview_metadata": True}
    assert comfy.prompts[0]["extra_data"]["preview_method"] == "auto"


DOG, CAT, COW, HEN = (Job(name, {"1": {"class_type": name}}) for name in ("dog", "cat", "cow", "hen"))
OTHER_CAT = Job("cat", {"1": {"class_type": "lion"}})


def test_batch_may_grow_but_not_change(tmp_path):
    first = Ledger(tmp_path, [DOG, CAT, COW])
    first.set("dog", "done")
    for name in ("cat", "cow"):
        first.set(name, "sent", f"id of {name}")
    first.close()
    (tmp_path / "cow").mkdir()  # as after a crash between the folder and the ledger
    grown = Ledger(tmp_path, [DOG, CAT, COW, HEN])
    grown.close()
    assert (grown.done, grown.sent["cat"], grown.client_id) == ({"dog", "cow"}, "id of cat", first.client_id)
    with pytest.raises(UsageError) as caught:
        Ledger(tmp_path, [DOG, OTHER_CAT, COW])
    assert "has another prompt named cat" in str(caught.value)
    assert "undo that to continue the batch, choose another --out" in str(caught.value)


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0 of another kind"])
def test_other_file_under_the_ledgers_name_is_refused_and_kept(tmp_path, content):
    (tmp_path / "queue.sqlite3").write_bytes(content * 100)
    with pytest.raises(UsageError, match=r"cannot use .*queue\.sqlite3: .*, or choose another --out"):
        Ledger(tmp_path, [DOG])
    assert (tmp_path / "queue.sqlite3").read_bytes() == content * 100


@pytest.mark.parametrize("state", ["new", "waiting"])
def test_foreign_folder_in_the_way_is_refused(tmp_path, state):
    if state == "waiting":
        Ledger(tmp_path, [DOG]).close()
    (tmp_path / "dog").mkdir()
    with pytest.raises(UsageError, match="exists already and is not from this batch; choose another --out"):
        Ledger(tmp_path, [DOG])
    assert (tmp_path / "queue.sqlite3").exists() == (state == "waiting")
