"""Servers that fail in every way a server can while a batch runs: nothing lost, nothing rendered twice."""

from collections import Counter

import pytest

from lightforcing.lightforcing_core.queue_board import Board
from lightforcing.lightforcing_core.queue_jobs import Line, make_jobs

from .queue_samples import GRAPH, OBJECT_INFO, Batch, hold, text_of, wait_until


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


def test_refused_prompt_fails_when_the_servers_left_have_all_refused_it(servers, tmp_path):
    servers[0].refusal = {"error": {"message": "Value not in list"}, "node_errors": {}}
    hold(servers[1])
    batch = Batch(tmp_path / "out", servers, 2)
    future = batch.start()
    wait_until(lambda: servers[1].running_prompt and servers[0].prompts)
    servers[1].crash()
    assert future.result(20) == (0, 2, 0)


def test_prompt_that_takes_its_server_down_is_given_up(servers, tmp_path):
    servers[0].record = servers[0].render = None  # forgets every prompt
    servers[0].events = ["drop"]
    batch = Batch(tmp_path / "out", servers[:1], 1)
    assert batch.run() == (0, 1, 0)
    assert len(servers[0].prompts) == 3
    assert "given up after it was lost 3 times" in batch.of("failed")[0]["message"]


def test_result_is_not_fetched_from_a_server_that_lost_the_prompt_to_another():
    board = Board(make_jobs(GRAPH, OBJECT_INFO, lines=[Line("x")]), ["a", "b"], None, lambda name, **fields: None)
    _, first = board.take("a")
    board.lose("a", "no answer")
    _, second = board.take("b")
    assert not board.begin_fetch(first)
    assert board.begin_fetch(second)
