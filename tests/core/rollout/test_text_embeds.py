"""Text embeddings return from their file as they were; another file is one clear error."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.rollout.text_embeds import FORMAT, load_embeds, save_embeds


def test_conditioning_survives_the_file(tmp_path):
    mask = torch.ones(1, 5)
    stored = [[torch.randn(1, 5, 7), {"pooled_output": None, "attention_mask": mask}], [torch.randn(1, 5, 7), {"a": 1}]]
    save_embeds(tmp_path / "x.safetensors", stored)
    (cond, extras), (other, numbers) = load_embeds(tmp_path / "x.safetensors")
    assert torch.equal(cond, stored[0][0])
    assert torch.equal(other, stored[1][0])
    assert torch.equal(extras.pop("attention_mask"), mask)
    assert (extras, numbers) == ({"pooled_output": None}, {"a": 1})
    assert cond.data_ptr() % 64 == other.data_ptr() % 64 == 0  # whatever their place in the file


def test_what_no_file_can_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the prompt has hooks"):
        save_embeds(tmp_path / "x.safetensors", [[torch.ones(1, 5, 7), {"hooks": object()}]])


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (None, "entries"),
        ("[" * 2000, "nested deeper"),
        ("[{}, {}]", "is damaged"),
        ('[{"pooled_output": "a cat"}]', "another value where a tensor belongs"),
    ],
)
def test_damaged_entries_are_refused(tmp_path, entries, reason):
    metadata = {"format": FORMAT} | ({} if entries is None else {"entries": entries})
    save_file({"0.cond": torch.zeros(1, 5, 7)}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=reason) as caught:
        load_embeds(tmp_path / "x.safetensors")
    assert "save the prompt again" in str(caught.value)


@pytest.mark.parametrize(
    "cond", [torch.zeros(5, 7), torch.zeros(0, 5, 7), torch.full((1, 5, 7), float("nan")), torch.ones(1, 5, 7).int()]
)
def test_tensors_that_are_no_prompt_are_refused(tmp_path, cond):
    metadata = {"format": FORMAT, "entries": json.dumps([{}])}
    save_file({"0.cond": cond}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        load_embeds(tmp_path / "x.safetensors")
