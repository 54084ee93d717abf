"""A batch that is started again: what is done stays, the rest goes on, a folder of results is whole or absent."""

import json

import pytest

from lightforcing.lightforcing_core.queue_board import Board
from lightforcing.lightforcing_core.queue_jobs import Line, make_jobs
from lightforcing.lightforcing_core.queue_journal import Attempt, Journal
from lightforcing.lightforcing_core.queue_outputs import store_in_folders

from .queue_samples import GRAPH, OBJECT_INFO, Batch, hold, render_text, text_of, wait_until


def test_batch_without_servers_ends_and_the_next_start_goes_on(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers, 6)
    for fake in servers:
        hold(fake, after=2)
    future = batch.start()
    wait_until(lambda: len(batch.of("finished")) == 4 and all(fake.running_prompt for fake in servers))
    for fake in servers:
        fake.crash()
    assert future.result(20) == (4, 0, 2)
    for fake in servers:
        fake.hold = False
        fake.come_back()
    assert batch.run() == (6, 0, 0)
    batch.check_complete()
    assert set(batch.rendered().values()) == {1}
    assert batch.of("batch")[-1]["done"] == 4


def test_prompt_of_an_earlier_start_is_kept_for_its_server_until_that_is_lost(tmp_path):
    jobs = make_jobs(GRAPH, OBJECT_INFO, lines=[Line("x")])
    first = Journal(tmp_path, {})
    first.submitted(Attempt("0001", "http://a", "its id"))
    first.close()
    board = Board(jobs, ["http://a", "http://b"], Journal(tmp_path, {}), lambda name, **fields: None)
    assert board.take("http://b") is None
    board.lose("http://a", "no answer")
    assert board.take("http://b")[0] is jobs[0]
    assert not board.reclaim(Attempt("0001", "http://a", "its id"), finished=False)


def test_finished_batch_sends_nothing(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers, 2)
    batch.run()
    assert batch.run() == (2, 0, 0)
    assert sum(len(fake.prompts) for fake in servers) == 2


def test_full_disk_ends_the_batch_and_the_result_waits_on_the_server(servers, tmp_path):
    out = tmp_path / "out"
    whole = store_in_folders(out)

    def full(job, files, download):
        if job.name == "0002":
            raise OSError(28, "No space left on device")
        return whole(job, files, download)

    batch = Batch(out, servers[:1], 3, store=full)
    with pytest.raises(OSError, match="No space left"):
        batch.run()
    batch.store = whole
    assert batch.run() == (3, 0, 0)
    batch.check_complete()
    assert batch.rendered()["text 2"] == 1


def test_folder_of_a_job_appears_whole_or_not_at_all(servers, tmp_path):
    good = servers[0].render

    def with_a_missing_file(body):
        record = good(body)
        missing = {"filename": "gone.txt", "subfolder": "", "type": "output"}
        return {**record, "outputs": {**record["outputs"], "5": {"images": [missing]}}}

    servers[0].render = with_a_missing_file
    batch = Batch(tmp_path / "out", servers[:1], 1)
    assert batch.run() == (0, 1, 0)
    assert "HTTP 404" in batch.of("failed")[0]["message"]
    assert not (tmp_path / "out" / "0001").exists()
    servers[0].render = good
    assert batch.run() == (1, 0, 0)
    batch.check_complete()


def test_crash_between_the_folder_and_the_journal_is_noticed(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers[:1], 2)
    batch.run()
    path = tmp_path / "out" / "queue.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    (done,) = [
        line for line in lines if json.loads(line).get("note") == "done" and json.loads(line)["prompt"] == "0002"
    ]
    path.write_text("".join(line for line in lines if line != done))
    (tmp_path / "out" / ".0001.part").mkdir()
    assert batch.run() == (2, 0, 0)
    assert len(servers[0].prompts) == 2
    batch.check_complete()
    assert [json.loads(line)["files"] for line in path.read_text().splitlines() if '"0002"' in line and "files" in line]


def test_prompts_sent_to_a_server_that_is_not_named_now_run_elsewhere(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers[:1], 1)
    hold(servers[0])
    future = batch.start()
    wait_until(lambda: servers[0].running_prompt)
    servers[0].crash()
    future.result(20)
    batch.servers = servers[1:]
    assert batch.run() == (1, 0, 0)
    assert batch.of("returned")[-1]["reason"] == "not among the servers now"


def test_failed_prompt_is_not_tried_elsewhere_but_the_next_start_tries_it(servers, tmp_path):
    failure = {"node_id": "3", "exception_message": "out of memory"}
    broken = {"outputs": {}, "status": {"status_str": "error", "messages": [["execution_error", failure]]}}
    for fake in servers:
        good = fake.render
        fake.render = lambda body, good=good: broken if text_of(body) == "text 2" else good(body)
    batch = Batch(tmp_path / "out", servers, 3)
    assert batch.run() == (2, 1, 0)
    (event,) = batch.of("failed")
    assert (event["prompt"], event["message"]) == ("0002", "My sampler: out of memory")
    assert sum(len(fake.prompts) for fake in servers) == 3
    for fake in servers:
        render_text(fake)
    assert batch.run() == (3, 0, 0)
    batch.check_complete()
    assert sum(len(fake.prompts) for fake in servers) == 4
