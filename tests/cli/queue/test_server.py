"""The client against a real HTTP server that plays ComfyUI's part, well and badly."""

import pytest

from lightforcing.cli.queue.prompt import UsageError
from lightforcing.cli.queue.run import output_files
from lightforcing.cli.queue.server import ComfyServer, QueueError, RemoteFile

from ...support.queue_samples import wait_until

PROMPT = {
    "1": {"class_type": "Load", "inputs": {}, "_meta": {"title": "Load Model"}},
    "2": {"class_type": "Sample", "inputs": {}, "_meta": {"title": "Chunk sampler"}},
}
VIDEO = RemoteFile("clip_00001_.mp4", "video", "output")


@pytest.fixture
def server(comfy):
    server = ComfyServer(comfy.url, patience=5)
    yield server
    server.close()


def submit(server):
    return server.submit(PROMPT, "7f2c", previews=False)


def test_refusal_names_node_input_and_message(comfy, server):
    wrong = {"message": "Value not in list", "details": "model: 'x.pt' not in ['a.pt']"}
    missing = {"message": "Required input is missing", "details": "vae"}
    error = {"message": "Prompt outputs failed validation", "details": "both, at length"}
    comfy.refusal = {"error": error, "node_errors": {"1": {"errors": [wrong, missing]}}}
    with pytest.raises(QueueError) as caught:
        submit(server)
    assert str(caught.value).splitlines() == [
        "Prompt outputs failed validation",
        "Load Model: Value not in list (model: 'x.pt' not in ['a.pt'])",
        "Load Model: Required input is missing (vae)",
    ]


@pytest.mark.parametrize(
    ("userinfo", "environment", "netrc", "authorization"),
    [
        ("me:a%20%3Ab@", "", "", "Basic bWU6YSA6Yg=="),  # me, "a :b"
        ("me:a%20%3Ab@", "other:b", "machine 127.0.0.1 login other password b", "Basic bWU6YSA6Yg=="),
        ("", "me:a :b", "machine 127.0.0.1 login other password b", "Basic bWU6YSA6Yg=="),
        ("", "abc.DEF-1", "", "Bearer abc.DEF-1"),
        ("", "", 'machine 127.0.0.1 login me password "a :b"', "Basic bWU6YSA6Yg=="),
    ],
)
def test_login_goes_to_the_server(comfy, tmp_path, monkeypatch, userinfo, environment, netrc, authorization):
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("LIGHTFORCING_LOGIN", environment)
    comfy.authorization = authorization
    comfy.files[VIDEO] = b"frames"
    server = ComfyServer(comfy.url.replace("http://", f"http://{userinfo}"))
    assert server.url == comfy.url
    submit(server)
    server.listen("client")
    wait_until(lambda: comfy.connections)
    assert server.download(VIDEO, tmp_path).read_bytes() == b"frames"


def test_wrong_login_is_refused_and_not_repeated(comfy, monkeypatch):
    comfy.authorization = "Bearer right"
    monkeypatch.setenv("LIGHTFORCING_HEADERS", "X-Key: 7\nAuthorization: Bearer secret")
    with pytest.raises(QueueError, match="HTTP 401") as caught:
        ComfyServer(comfy.url).object_info(["Load"])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("line", ["secret", "Na me: secret", "Name: s\u00e9cret", "Name:", ": secret"])
def test_header_that_is_none_is_refused_and_not_repeated(monkeypatch, line):
    monkeypatch.setenv("LIGHTFORCING_HEADERS", line)
    with pytest.raises(UsageError, match="LIGHTFORCING_HEADERS is not Name: value") as caught:
        ComfyServer("http://127.0.0.1:8188")
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        *("ftp://host", "http://", "http://host:port", "http://[::1", "a\udc80b", "host:99999"),
        *("http://xn--", "a" * 300, "http://..", "http://a..b"),
    ],
)
def test_address_of_another_kind_is_refused(address):
    with pytest.raises(UsageError, match="is not a server address"):
        ComfyServer(address)


def test_proxy_is_not_asked_for_this_machine(comfy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "odd://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = ComfyServer(comfy.url)
    server.listen("client")
    assert submit(server) == []


def test_message_of_another_kind_is_cut(comfy, server):
    comfy.answers = {"history": (400, b"x" * 2000)}
    with pytest.raises(QueueError, match=r"/history/7f2c answers HTTP 400 Bad Request: x{300}$"):
        server.history("7f2c")


def test_outputs_are_found_under_any_key_and_once():
    video = VIDEO._asdict()
    record = {
        "outputs": {
            "1": {"gifs": [video], "images": [video, {"filename": "p.png", "subfolder": "", "type": "temp"}]},
            "2": {"text": ["hello"], "animated": [True], "audio": [{"filename": "a.flac"}], "odd": 7},
            "3": None,
        }
    }
    assert output_files({}, record, temp=False) == [VIDEO, RemoteFile("a.flac", "", "output")]
    assert RemoteFile("p.png", "", "temp") in output_files({}, record, temp=True)


def test_download_is_whole_and_overwrites_nothing(comfy, server, tmp_path):
    comfy.files[VIDEO] = b"frames" * 1000
    paths = [server.download(VIDEO, tmp_path).relative_to(tmp_path).as_posix() for _ in range(2)]
    assert paths == ["video/clip_00001_.mp4", "video/clip_00001_-2.mp4"]
    assert (tmp_path / paths[1]).read_bytes() == b"frames" * 1000
