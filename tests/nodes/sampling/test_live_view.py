"""What a client sees while the sampler runs: a line, a sheet that fills up, or every new picture once."""

import base64
import io
import json
import re
import shutil
import struct
import uuid
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from ...support.graphs import (
    HEIGHT,
    WIDTH,
    apply,
    core_loader,
    demo_graph,
    empty,
    empty_image,
    encoded,
    graph,
    link,
    loader,
    vae_loader,
)

LENGTH = 45  # video frames: four chunks


class Client:
    """A page as the server sees it: everything that was sent to it while a prompt ran."""

    def __init__(self, server, *, plays=False):
        self.server, self.id = server, uuid.uuid4().hex
        address = f"{server.url.replace('http', 'ws')}/ws?clientId={self.id}"
        self.socket = connect(address, max_size=None).__enter__()  # the fixture closes it
        self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        server.post("/light_forcing/page", {"client_id": self.id, "plays": plays})
        self.lines, self.executed = [], {}  # of the sampler; by node
        self.sheets, self.messages, self.node_ids = [], [], set()

    def run(self, prompt, **extra):
        prompt_id = str(uuid.uuid4())
        body = {"prompt": prompt, "prompt_id": prompt_id, "client_id": self.id, "extra_data": extra}
        self.server.post("/prompt", body).raise_for_status()
        while True:
            data = self.socket.recv(timeout=120)
            if isinstance(data, bytes):
                self._binary(data)
                continue
            message = json.loads(data)
            if message["type"] == "light_forcing.preview":
                self.messages.append(message["data"])
            if message["type"] == "light_forcing.status":
                assert (message["data"]["node"], message["data"]["prompt_id"]) == ("sampler", prompt_id)
                self.lines.append(message["data"])
            if message["type"] == "executed":
                self.executed[message["data"]["node"]] = message["data"]["output"]
            if message["type"] == "execution_error":
                raise AssertionError(message["data"]["exception_message"])
            if message["type"] == "execution_success" and message["data"]["prompt_id"] == prompt_id:
                return self.server.wait(prompt_id)

    def _binary(self, data):
        kind, size = struct.unpack(">II", data[:8])
        assert kind != 3  # ComfyUI's line, for which our page has its own
        if kind == 4:
            self.node_ids.add(json.loads(data[8 : 8 + size])["node_id"])
            self.sheets.append(Image.open(io.BytesIO(data[8 + size :])).convert("RGB"))


@pytest.fixture
def client(server):
    made = []

    def connect(**options):
        made.append(Client(server, **options))
        return made[-1]

    yield connect
    for one in made:
        one.socket.close()


def run_of(seed, *, vae=True):
    return graph({"model": loader()}, latent=empty(length=LENGTH), vae=vae, seed=seed)


def filled_cells(sheet, latent_frames=12):
    """Whether each cell of the sheet holds a picture: its mean is not the empty colour."""
    columns = int(np.ceil(np.sqrt(1.3 * latent_frames * HEIGHT / WIDTH)))
    means = sheet.resize((columns, -(-latent_frames // columns)), Image.Resampling.BOX)
    cells = np.asarray(means, dtype=np.int16).reshape(-1, 3)[:latent_frames]
    return [bool(abs(cell - (32, 36, 42)).max() > 8) for cell in cells]


def cells_of(strip):
    """(video frame, pixels) of every picture in a strip."""
    encoded, width, height = strip["image"].removeprefix("data:image/jpeg;base64,"), strip["width"], strip["height"]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), dtype=np.int16)
    for index, at in enumerate(strip["at"]):
        top, left = index // strip["columns"] * height, index % strip["columns"] * width
        yield at, sheet[top : top + height, left : left + width]


def test_any_client_sees_a_sheet_that_fills_up(client):
    one = client()
    one.run(run_of(1))
    counts = [sum(filled_cells(sheet)) for sheet in one.sheets]
    assert counts == sorted(counts)
    assert len(set(counts)) >= 3
    assert counts[-1] == 12  # a cell for each latent frame
    assert all(cells == sorted(cells, reverse=True) for cells in map(filled_cells, one.sheets))  # from the start on
    assert not one.messages
    assert one.node_ids == {"sampler"}


def test_page_that_plays_gets_every_frame_once_decoded(client, server):
    one = client(plays=True)
    entry = one.run(run_of(2))
    assert not one.sheets
    assert {message["node"] for message in one.messages} == {"sampler"}
    assert {message["frames"] for message in one.messages} == {LENGTH}
    shown, ends = {}, []
    for strip in (strip for message in one.messages for strip in message["strips"]):
        shown = {at: cell for at, cell in shown.items() if not strip["start"] <= at < strip["stop"]}
        shown |= dict(cells_of(strip))
        ends.append(strip["stop"])
    assert ends == sorted(ends)
    assert len(set(ends)) >= 3
    frames = [np.asarray(Image.open(path), dtype=np.int16) for path in server.files(entry) if path.suffix == ".png"]
    assert list(shown) == list(range(0, LENGTH, 2))
    for at, cell in shown.items():
        assert cell.shape == frames[at].shape
        assert abs(cell - frames[at]).mean() < 6, at  # JPEG
    first, last = shown[0], shown[LENGTH - 1]
    assert abs(first - last).mean() > 6  # so the comparison above could have failed


def test_demo_model_is_shown_decoded_only_and_within_the_first_chunk(client):
    """In the colours that ComfyUI has for Wan's latents its drafts would be a wild pattern."""
    one = client(plays=True)
    one.run(demo_graph(seed=11))
    first, *shown = [strip["at"] for message in one.messages for strip in message["strips"]]
    assert first == [0]  # the first frame, for the whole chunk
    assert shown
    # A draft has a picture for every latent frame, a decoded chunk one for every second video frame.
    assert not any(after - before > 2 for at in shown for before, after in pairwise(at))


def test_line_tells_chunk_density_pace_and_time_left(client):
    one = client(plays=True)
    one.run(run_of(3))
    lines = [status["line"] for status in one.lines]
    assert "chunk 1/4 · density 100 %" in lines
    assert any(re.fullmatch(r"chunk 4/4 · density \d+ % · .* s per chunk · \d+ s left", line) for line in lines)
    assert re.fullmatch(r"4 of 4 chunks · .* s per chunk · done", lines[-1])
    assert any(status["details"].startswith("step 1/4\nneeds about ") for status in one.lines)


def test_a_start_image_alone_in_a_chunk_wise_model_is_warned_of(server):
    parts = {"model": loader(), "vae": vae_loader(), "image": empty_image(), "start": encoded()}
    ran = server.run(graph(parts, latent=empty(25), start_latent=link("start"), seed=77))
    (text,) = ran["outputs"]["sampler"]["text"]
    assert text.startswith("one start image fills 1 of the 3 latent frames that this model makes at a time")
    assert "repeat the image 9 times" in text


OWN = {"keep_near": 2}  # no other test has these, so the node is not cached
ASSUMED = "No file name shows which checkpoint this is. Assumed: chunks of 3 latent frames"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (loader(**OWN), ASSUMED),
        (apply(link("file"), **OWN), ASSUMED),
        (loader(model_name="causal_forcing.safetensors"), "assumed to be Causal Forcing, chunk by chunk"),
        (loader(family="self_forcing", **OWN), None),
    ],
)
def test_assumed_family_is_shown_on_the_node_and_sent_with_its_result(client, models, node, words):
    folder = models / "models" / "diffusion_models"
    shutil.copy(folder / "tiny_wan.safetensors", folder / "causal_forcing.safetensors")
    one = client()
    one.run(graph({"file": core_loader("tiny_wan.safetensors"), "model": node}, latent=empty(length=9)))
    texts = one.executed.get("model", {}).get("text", [])
    assert [text.startswith(words) for text in texts] == [True] * (words is not None)


def test_without_a_vae_the_preview_method_decides(client):
    silent, draft = client(), client()
    silent.run(run_of(4, vae=False))
    assert silent.lines
    assert not silent.sheets
    draft.run(run_of(5, vae=False), preview_method="latent2rgb")
    assert sum(filled_cells(draft.sheets[-1])) == 12
