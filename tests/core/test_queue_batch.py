"""A batch over fake servers that fail in every way a server can: nothing lost, nothing rendered twice."""

import json
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from lightforcing.lightforcing_core import queue_batch, queue_client
from lightforcing.lightforcing_core.comfy_server import ComfyServer
from lightforcing.lightforcing_core.queue_batch import BatchOptions, run_batch
from lightforcing.lightforcing_core.queue_board import Board
from lightforcing.lightforcing_core.queue_events import Events
from lightforcing.lightforcing_core.queue_jobs import Line, make_jobs
from lightforcing.lightforcing_core.queue_journal import Attempt, Journal
from lightforcing.lightforcing_core.queue_outputs import settle_folders, store_in_folders

from .fake_comfy import FakeComfy
from .queue_samples import GRAPH, OBJECT_INFO, render_text, text_of, texts_below, wait_until

JPEG = b"\xff\xd8\xff\xe0picture"
PNG = b"\x89PNG\r\n\x1a\npicture"


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(queue_client, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(queue_client, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(queue_batch, "RETRY_SECONDS", 0.1)


@pytest.fixture
def servers():
    """Two servers."""
    with ExitStack() as stack:
        fakes = [FakeComfy(), FakeComfy()]
        for fake in fakes:
            render_text(fake)
            stack.enter_context(fake.running())
        yield fakes


class Batch:
    """Prompts `text 1` … `text n` under the names `0001` …, and what happened to them."""

    def __init__(self, out, servers, count, store=None, **options):
        self.out, self.servers, self.events = out, servers, []
        self.jobs = make_jobs(GRAPH, OBJECT_INFO, lines=[Line(f"text {number}") for number in range(1, count + 1)])
        self.store = store or store_in_folders(out)
        self.options = BatchOptions(**{"patience": 0.3, **options})
        self._pool = ThreadPoolExecutor(1)

    def start(self):
        """Run in another thread; the future's result is the counts."""
        return self._pool.submit(self.run)

    def run(self):
        self.out.mkdir(exist_ok=True)
        journal = Journal(self.out, {"workflow": "same"})
        try:
            settle_folders(self.out, [job.name for job in self.jobs], journal)
            clients = [ComfyServer(fake.url, http_timeout=5) for fake in self.servers]
            emit = Events(self.events.append)
            return run_batch(self.jobs, clients, store=self.store, emit=emit, journal=journal, options=self.options)
        finally:
            journal.close()

    def of(self, kind):
        return [event for event in list(self.events) if event["event"] == kind]

    def rendered(self):
        """How often each text ran to its end, on all servers together."""
        return Counter(text_of(body) for fake in self.servers for body in fake.rendered)

    def check_complete(self):
        wanted = {job.name: text_of({"prompt": job.prompt}) for job in self.jobs}
        assert texts_below(self.out) == wanted
        assert not [name for name in os.listdir(self.out) if name.endswith(".part")]


def hold(fake, after=0):
    fake.hold, fake.hold_after = True, after


def test_one_of_two_servers_dies_half_way(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers, 20)
    for fake in servers:
        hold(fake, after=5)
    future = batch.start()
    wait_until(lambda: len(batch.of("finished")) == 10 and all(fake.running_prompt for fake in servers))
    lost = text_of(servers[1].prompts[-1])
    servers[1].crash()
    wait_until(lambda: batch.of("server_lost"))
    servers[0].release()
    assert future.result(30) == (20, 0, 0)
    batch.check_complete()
    assert batch.rendered() == Counter({f"text {number}": 1 for number in range(1, 21)})
    assert [text_of(body) for body in servers[0].rendered].count(lost) == 1
    finished = Counter(event["server"] for event in batch.of("finished"))
    assert finished == {servers[0].url: 15, servers[1].url: 5}
    assert len({event["prompt"] for event in batch.of("finished")}) == 20
    assert [event["server"] for event in batch.of("returned")] == [servers[1].url]
    assert max(fake.longest_queue for fake in servers) == 1


def test_free_server_takes_what_a_slow_one_has_not_started(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers, 8)
    hold(servers[1])
    future = batch.start()
    wait_until(lambda: len(servers[0].rendered) == 7)
    servers[1].release()
    assert future.result(20) == (8, 0, 0)
    batch.check_complete()
    assert len(servers[1].rendered) == 1


def test_lost_server_that_comes_back_delivers_what_nobody_took(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers, 2)
    for fake in servers:
        hold(fake)
    future = batch.start()
    wait_until(lambda: all(fake.running_prompt for fake in servers))
    servers[1].cut_off()
    wait_until(lambda: batch.of("returned"))
    servers[1].release()
    wait_until(lambda: servers[1].rendered)
    servers[1].come_back()
    wait_until(lambda: batch.of("finished"))
    servers[0].release()
    assert future.result(20) == (2, 0, 0)
    batch.check_complete()
    assert set(batch.rendered().values()) == {1}
    assert [event["server"] for event in batch.of("server_back")] == [servers[1].url]


def test_lost_server_that_comes_back_is_stopped_where_another_has_the_prompt(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers, 2)
    hold(servers[0], after=1)
    hold(servers[1])
    future = batch.start()
    wait_until(lambda: servers[1].running_prompt and len(servers[0].rendered) == 1)
    servers[1].cut_off()
    wait_until(lambda: servers[0].running_prompt)  # the lost one's prompt
    servers[1].come_back()
    wait_until(lambda: servers[1].interrupts)
    servers[0].release()
    assert future.result(20) == (2, 0, 0)
    batch.check_complete()
    assert set(batch.rendered().values()) == {1}
    assert servers[0].interrupts == []


def test_result_of_a_server_that_comes_back_ends_the_second_run(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers, 2)
    hold(servers[0], after=1)
    hold(servers[1])
    future = batch.start()
    wait_until(lambda: servers[1].running_prompt and len(servers[0].rendered) == 1)
    servers[1].cut_off()
    wait_until(lambda: servers[0].running_prompt)
    again = servers[0].running_prompt
    servers[1].release()
    wait_until(lambda: servers[1].rendered)
    servers[1].come_back()
    assert future.result(20) == (2, 0, 0)
    batch.check_complete()
    assert servers[0].interrupts == [again]
    assert set(batch.rendered().values()) == {1}


def test_short_outage_loses_nothing(servers, tmp_path):
    batch = Batch(tmp_path / "out", servers[:1], 1, patience=20)
    hold(servers[0])
    future = batch.start()
    wait_until(lambda: servers[0].running_prompt)
    servers[0].cut_off()
    servers[0].release()
    wait_until(lambda: servers[0].rendered)
    servers[0].come_back()
    assert future.result(20) == (1, 0, 0)
    batch.check_complete()
    assert batch.of("server_lost") == []


@pytest.mark.parametrize("request_kind", ["prompt", "view"])
def test_lost_answer_makes_no_second_run(servers, tmp_path, request_kind):
    servers[0].lose_next_answer_to = request_kind
    batch = Batch(tmp_path / "out", servers[:1], 2, patience=20)
    assert batch.run() == (2, 0, 0)
    batch.check_complete()
    assert len(servers[0].prompts) == 2
    assert servers[0].requests.count("view") == (3 if request_kind == "view" else 2)


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


def test_refused_prompt_fails_when_the_servers_left_have_all_refused_it(servers, tmp_path):
    servers[0].refusal = {"error": {"message": "Value not in list"}, "node_errors": {}}
    hold(servers[1])
    batch = Batch(tmp_path / "out", servers, 2)
    future = batch.start()
    wait_until(lambda: servers[1].running_prompt and servers[0].prompts)
    servers[1].crash()
    assert future.result(20) == (0, 2, 0)


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


def test_timeout_cancels_the_prompt_and_goes_on(servers, tmp_path):
    hold(servers[0], after=1)
    batch = Batch(tmp_path / "out", servers[:1], 2, timeout=0.6)
    assert batch.run() == (1, 1, 0)
    assert servers[0].interrupts == [servers[0].prompts[1]["prompt_id"]]
    assert "not finished after 0.6 s, cancelled" in batch.of("failed")[0]["message"]


def test_prompt_that_takes_its_server_down_is_given_up(servers, tmp_path):
    servers[0].record = servers[0].render = None  # forgets every prompt
    servers[0].events = ["drop"]
    batch = Batch(tmp_path / "out", servers[:1], 1)
    assert batch.run() == (0, 1, 0)
    assert len(servers[0].prompts) == 3
    assert "given up after it was lost 3 times" in batch.of("failed")[0]["message"]


def test_prompt_that_was_deleted_on_the_server_is_not_sent_again(servers, tmp_path):
    servers[0].record = servers[0].render = None
    batch = Batch(tmp_path / "out", servers[:1], 1)
    assert batch.run() == (0, 1, 0)
    assert len(servers[0].prompts) == 1
    assert "somebody deleted it there" in batch.of("failed")[0]["message"]


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
