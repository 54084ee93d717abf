"""A model in the loader's `fp8_rowwise`, saved by ComfyUI's Save Model: ours loads it again, the stock one refuses."""

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("model/fp8_saved", "tiny_wan.safetensors")


def test_our_loader_gives_back_the_very_rows_that_were_saved(facts):
    assert facts["held"] == ["LightForcingRowwiseFP8Layout", [256, 1]]
    assert facts["same latents"]
    assert facts["saved once more"]


def test_a_lora_is_saved_into_the_rows(facts):
    assert facts["LoRA changes"] > 0.2
    assert facts["LoRA saved with it"] < 1e-5


def test_the_stock_loader_refuses_the_file_by_the_name_of_who_can_read_it(facts):
    """It would take a scale per row for one per matrix."""
    assert "fp8_rowwise of Light Forcing Model Loader" in facts["stock loader"]


def test_rows_are_not_quantised_twice(facts):
    assert "is quantised already (fp8_rowwise of Light Forcing Model Loader" in facts["asked for rows"]
    assert facts["info"].startswith("fp8_rowwise of Light Forcing Model Loader in ComfyUI's format")
