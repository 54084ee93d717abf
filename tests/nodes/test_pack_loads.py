"""The pack loads in a real ComfyUI, quietly and under any folder name."""

import pytest

from ..support.comfy_server import Failed
from ..support.graphs import graph, loader


def test_server_loads_the_pack_without_a_warning(server):
    about_us = [
        line for line in server.start_log.splitlines() if "Renamed_pack-2" in line or "light forcing" in line.lower()
    ]
    assert any("seconds" in line for line in about_us)  # ComfyUI's list of import times
    assert not [line for line in about_us if "FAILED" in line or "WARNING" in line or "Error" in line], about_us


def test_errors_are_shown_without_the_path_of_the_folder(server):
    prompt_id = server.queue(graph({"model": loader(weights="ema")}))
    with pytest.raises(Failed, match="has no weights named 'ema', but one set without a name"):
        server.wait(prompt_id)
    messages = dict(server.get(f"/history/{prompt_id}")[prompt_id]["status"]["messages"])
    assert messages["execution_error"]["exception_type"] == "light_forcing.CheckpointError"
