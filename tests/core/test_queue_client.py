"""The queue client against a real HTTP and WebSocket server that plays ComfyUI's part."""

import os
import socket
import uuid

import pytest

from lightforcing.lightforcing_core import queue_client
from lightforcing.lightforcing_core.comfy_server import (
    ComfyServer,
    PromptRejected,
    QueueError,
    RemoteFile,
    RunFailed,
    ServerUnreachable,
)
from lightforcing.lightforcing_core.queue_client import output_files, run_prompt

from .fake_comfy import FakeComfy

PROMPT = {
    "1": {"class_type": "Load", "inputs": {}, "_meta": {"title": "Load Model"}},
    "2": {"class_type": "Sample", "inputs": {}, "_meta": {"title": "Chunk sampler"}},
}
VIDEO = {"filename": "clip_00001_.mp4", "subfolder": "video", "type": "output"}


@pytest.fixture
def comfy(monkeypatch):
    monkeypatch.setattr(queue_client, "IDLE_SECONDS", 0.2)
    fake = FakeComfy()
    with fake.running():
        yield fake


def failed(*messages):
    return {"outputs": {}, "status": {"status_str": "error", "completed": False, "messages": [*messages]}}


def test_run_reports_progress_and_lists_what_it_wrote(comfy):
    comfy.events = [
        ("execution_start", {}),
        ("execution_cached", {"nodes": ["1"]}),
        ("executing", {"node": "2"}),
        ("progress", {"node": "2", "value": 3, "max": 28}),
        b"\0\0\0\1preview",
        ("execution_success", {}),
    ]
    comfy.record["outputs"] = {"2": {"images": [VIDEO], "animated": [True]}}
    seen = []
    result = run_prompt(ComfyServer(comfy.url), PROMPT, canvas={"nodes": []}, on_progress=seen.append)
    assert result.files == [RemoteFile("clip_00001_.mp4", "video", "output")]
    assert [(step.title, step.value, step.total, step.nodes_done) for step in seen] == [
        ("waiting in the server's queue", 0.0, 1.0, 0),
        ("Chunk sampler", 0.0, 1.0, 1),
        ("Chunk sampler", 3.0, 28.0, 1),
    ]
    (sent,) = comfy.prompts
    assert sent["prompt"] == PROMPT
    assert str(uuid.UUID(sent["prompt_id"])) == sent["prompt_id"] == result.prompt_id
    assert sent["extra_data"]["extra_pnginfo"]["workflow"] == {"nodes": []}


def test_events_of_other_prompts_are_ignored(comfy):
    comfy.events = [("executing", {"node": None, "prompt_id": "another"}), ("executing", {"node": "1"})]
    seen = []
    run_prompt(ComfyServer(comfy.url), PROMPT, on_progress=seen.append)
    assert [step.title for step in seen][1:] == ["Load Model"]


def test_error_at_the_end_is_no_success(comfy):
    # `executing: null` follows an error too; only the history tells.
    error = {
        "node_id": "2",
        "exception_message": "height 500 is not a multiple of 16\n",
        "exception_type": "ValueError",
    }
    comfy.record = failed(["execution_start", {}], ["execution_error", error])
    with pytest.raises(RunFailed, match=r"^Chunk sampler: height 500 is not a multiple of 16$"):
        run_prompt(ComfyServer(comfy.url), PROMPT)


def test_error_event_counts_even_when_history_calls_it_success(comfy):
    comfy.events = [("execution_error", {"node_id": "1", "exception_message": "no file"})]
    with pytest.raises(RunFailed, match="Load Model: no file"):
        run_prompt(ComfyServer(comfy.url), PROMPT)


def test_interruption_on_the_server_is_reported(comfy):
    comfy.record = failed(["execution_interrupted", {"node_id": "2"}])
    with pytest.raises(RunFailed, match="Chunk sampler: the run was interrupted on the server"):
        run_prompt(ComfyServer(comfy.url), PROMPT)


def test_refusal_names_node_input_and_message(comfy):
    comfy.refusal = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"},
        "node_errors": {
            "1": {
                "errors": [
                    {
                        "message": "Value not in list",
                        "details": "model: 'x.pt' not in ['a.pt']",
                        "extra_info": {"input_name": "model"},
                    },
                    {"message": "Required input is missing", "details": "vae", "extra_info": {"input_name": "vae"}},
                ]
            }
        },
    }
    with pytest.raises(PromptRejected) as caught:
        run_prompt(ComfyServer(comfy.url), PROMPT)
    assert str(caught.value).splitlines() == [
        "Prompt outputs failed validation",
        "Load Model: model: Value not in list ('x.pt' not in ['a.pt'])",
        "Load Model: vae: Required input is missing",
    ]


def test_refusal_by_a_node_itself_reads_as_its_own_words(comfy):
    """The host writes `input - reason` for it."""
    said = "caption - word 1 of the caption is 'a'; use on"
    error = {"message": "Custom validation failed for node", "details": said, "extra_info": {"input_name": "caption"}}
    comfy.node_errors = {"1": {"errors": [error]}}
    assert run_prompt(ComfyServer(comfy.url), PROMPT).left_out == [
        "Load Model: caption: Custom validation failed for node (word 1 of the caption is 'a'; use on)"
    ]


def test_parts_that_the_server_leaves_out_are_listed(comfy):
    comfy.node_errors = {"2": {"errors": [{"message": "Bad", "details": "", "extra_info": {"input_name": "seed"}}]}}
    assert run_prompt(ComfyServer(comfy.url), PROMPT).left_out == ["Chunk sampler: seed: Bad"]


def test_dropped_event_stream_is_opened_again(comfy):
    comfy.events = [("executing", {"node": "1"}), "drop", ("executing", {"node": "2"})]
    seen = []
    run_prompt(ComfyServer(comfy.url), PROMPT, on_progress=seen.append)
    assert comfy.connections == 2
    assert seen[-1].title == "Chunk sampler"


def test_run_that_vanished_from_the_server_ends(comfy):
    comfy.record = None
    with pytest.raises(RunFailed, match="neither in the server's queue nor in its history"):
        run_prompt(ComfyServer(comfy.url), PROMPT)


def test_timeout_cancels_the_run(comfy):
    comfy.hold = True
    with pytest.raises(RunFailed, match=r"not finished after 0\.5 s, cancelled"):
        run_prompt(ComfyServer(comfy.url), PROMPT, timeout=0.5)
    sent = comfy.prompts[0]["prompt_id"]
    assert (comfy.interrupts, comfy.deleted) == ([sent], [sent])


def test_nobody_at_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerUnreachable, match=f"no ComfyUI server answers at http://127.0.0.1:{port}"):
        run_prompt(ComfyServer(f"127.0.0.1:{port}"), PROMPT)


def test_address_of_another_kind_is_refused():
    with pytest.raises(ServerUnreachable, match="ftp://host is not a server address"):
        ComfyServer("ftp://host")


def test_login_in_the_address_goes_to_the_server_and_nowhere_else(comfy, tmp_path):
    comfy.authorization = "Basic bWU6YSA6Yg=="  # me, "a :b"
    comfy.record = {"outputs": {"2": {"images": [VIDEO]}}, "status": {"status_str": "success", "messages": []}}
    comfy.files["clip_00001_.mp4", "video", "output"] = b"frames"
    server = ComfyServer(comfy.url.replace("http://", "http://me:a%20%3Ab@"))
    assert server.url == comfy.url
    (video,) = run_prompt(server, PROMPT).files
    assert server.download(video, tmp_path).read_bytes() == b"frames"
    with pytest.raises(QueueError, match="HTTP 401"):
        ComfyServer(comfy.url).get("/object_info")


def test_http_error_keeps_the_servers_words(comfy):
    with pytest.raises(QueueError, match=r"/nowhere answers HTTP 404 Not Found: 404: Not Found"):
        ComfyServer(comfy.url).get("/nowhere")


def test_outputs_are_found_under_any_key_and_once():
    record = {
        "outputs": {
            "1": {"gifs": [VIDEO], "images": [VIDEO, {"filename": "p.png", "subfolder": "", "type": "temp"}]},
            "2": {"text": ["hello"], "animated": [True], "audio": [{"filename": "a.flac"}]},
        }
    }
    video, audio = RemoteFile("clip_00001_.mp4", "video", "output"), RemoteFile("a.flac", "", "output")
    assert output_files(record) == [video, audio]
    assert RemoteFile("p.png", "", "temp") in output_files(record, include_temp=True)


def test_download_is_whole_and_overwrites_nothing(comfy, tmp_path):
    comfy.files["clip.mp4", "video", "output"] = b"frames" * 1000
    remote = RemoteFile("clip.mp4", "video", "output")
    server = ComfyServer(comfy.url)
    paths = [server.download(remote, tmp_path) for _ in range(2)]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["video/clip.mp4", "video/clip-2.mp4"]
    assert paths[1].read_bytes() == b"frames" * 1000


def test_broken_download_leaves_nothing(comfy, tmp_path):
    comfy.files["clip.mp4", "", "output"] = b"frames"
    comfy.truncate_downloads = True
    with pytest.raises(QueueError):
        ComfyServer(comfy.url).download(RemoteFile("clip.mp4", "", "output"), tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("filename", "subfolder", "expected"),
    [
        ("../../etc/passwd", "", "etc/passwd"),
        ("a.mp4", "/root/..", "root/a.mp4"),
        ("a.mp4", "C:\\x", "C_/x/a.mp4"),
        ("..", "", "unnamed"),
        ("/", "clips", "clips/unnamed"),
        ("a\0b\n.mp4", "", "a_b_.mp4"),
    ],
)
def test_server_cannot_write_outside_the_folder(filename, subfolder, expected):
    assert RemoteFile(filename, subfolder, "output").relative_path.as_posix() == expected
