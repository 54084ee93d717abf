"""How the prompts of a batch end on servers that answer: order, refusals, errors, the cache, previews."""

import json
import threading

from .queue_samples import Batch, hold, wait_until

JPEG = b"\xff\xd8\xff\xe0picture"
PNG = b"\x89PNG\r\n\x1a\npicture"


def test_next_prompt_is_sent_before_the_last_ones_files_are_fetched(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers[:1], 3)
    assert batch.run() == (3, 0, 0)
    order = [kind for kind in servers[0].requests if kind in ("prompt", "view")]
    assert order == ["prompt", "prompt", "view", "prompt", "view", "view"]
    assert servers[0].longest_queue == 1


def test_prompt_that_one_server_refuses_runs_on_the_other(servers, tmp_path):
    servers[1].refusal = {"error": {"message": "Value not in list"}, "node_errors": {}}
    hold(servers[0])
    batch = Batch(tmp_path / "out", servers, 3)
    future = batch.start()
    wait_until(lambda: len(servers[1].prompts) == 2)
    servers[0].release()
    assert future.result(20) == (3, 0, 0)
    batch.check_complete()


def test_prompt_that_every_server_refuses_fails(servers, tmp_path):
    for fake in servers:
        fake.refusal = {"error": {"message": "Value not in list"}, "node_errors": {}}
    batch = Batch(tmp_path / "out", servers, 3)
    assert batch.run() == (0, 3, 0)
    assert {event["message"] for event in batch.of("failed")} == {"Value not in list"}
    assert {len(fake.prompts) for fake in servers} == {3}


def test_timeout_cancels_the_prompt_and_goes_on(servers, tmp_path):
    hold(servers[0], after=1)
    batch = Batch(tmp_path / "out", servers[:1], 2, timeout=0.6)
    assert batch.run() == (1, 1, 0)
    assert servers[0].interrupts == [servers[0].prompts[1]["prompt_id"]]
    assert "not finished after 0.6 s, cancelled" in batch.of("failed")[0]["message"]


def test_prompt_that_was_deleted_on_the_server_is_not_sent_again(servers, tmp_path):
    servers[0].record = servers[0].render = None
    batch = Batch(tmp_path / "out", servers[:1], 1)
    assert batch.run() == (0, 1, 0)
    assert len(servers[0].prompts) == 1
    assert "somebody deleted it there" in batch.of("failed")[0]["message"]


def test_answer_from_the_cache_is_said_and_fetched(servers, tmp_path):
    good = servers[0].render

    def cached(body):
        record = good(body)
        messages = [["execution_cached", {"nodes": ["1", "2", "4"]}]]
        return {**record, "prompt": [0, "id", {}, {}, ["4"]], "status": {"status_str": "success", "messages": messages}}

    servers[0].render = cached
    batch = Batch(tmp_path / "out", servers[:1], 1)
    batch.run()
    batch.check_complete()
    assert [event["cached"] for event in batch.of("finished")] == [True]


def test_run_with_cached_loaders_is_not_called_cached(servers, tmp_path):
    good = servers[0].render

    def half(body):
        messages = [["execution_cached", {"nodes": ["1", "2"]}]]
        return {**good(body), "status": {"status_str": "success", "messages": messages}}

    servers[0].render = half
    batch = Batch(tmp_path / "out", servers[:1], 1)
    batch.run()
    assert [event["cached"] for event in batch.of("finished")] == [False]


def test_previews_of_both_forms_are_saved(servers, tmp_path):
    def with_metadata(**told):
        words = json.dumps(told).encode()
        return (4).to_bytes(4, "big") + len(words).to_bytes(4, "big") + words + PNG

    plain = (1).to_bytes(4, "big") * 2 + JPEG
    foreign = with_metadata(prompt_id="another", node_id="9")
    noise = [b"", b"\0\0", (1).to_bytes(4, "big") * 2 + b"no picture", (4).to_bytes(4, "big") + b"\0\0\0\5oops!" + PNG]
    servers[0].events += [plain, foreign, *noise, with_metadata(node_id="3:1", display_node_id="3")]
    previews = tmp_path / "previews"
    batch = Batch(tmp_path / "out", servers[:1], 1, previews=previews)
    batch.run()
    folder = previews / "0001"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"00001.jpg": JPEG, "00002.png": PNG}
    assert [(event["node"], event["file"]) for event in batch.of("preview")] == [
        (None, str(folder / "00001.jpg")),
        ("3", str(folder / "00002.png")),
    ]
    assert servers[0].client_messages[0]["data"] == {"supports_preview_metadata": True}
    assert servers[0].prompts[0]["extra_data"]["preview_method"] == "auto"


def test_previews_are_neither_asked_for_nor_kept_unless_wanted(servers, tmp_path):
    servers[0].events.append((1).to_bytes(4, "big") * 2 + JPEG)
    batch = Batch(tmp_path / "out", servers[:1], 1)
    assert batch.run() == (1, 0, 0)
    assert servers[0].client_messages == []
    assert "extra_data" not in servers[0].prompts[0]
    assert batch.of("preview") == []


def test_threads_are_gone_when_the_batch_is(servers, tmp_path):
    before = threading.active_count()
    batch = Batch(tmp_path / "out", servers, 4)
    batch.run()
    assert threading.active_count() == before
