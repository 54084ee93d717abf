"""Steps recorded inside ComfyUI's own wrapper of the model, where that is safe, and the reason where it is not."""

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("model/step_graph")


@pytest.mark.parametrize("model", ["plain", "core's causal model", "LoRA"])
def test_recorded_steps_give_the_same_latents(facts, model):
    same, launches, said, without, words = facts[model]
    assert same
    assert launches == 9  # three of four steps of each of three chunks
    assert said == "9 steps launched as graphs"
    assert (without, words) == (0, None)


def test_weights_that_are_unpacked_or_moved_while_they_are_used_are_not_recorded(facts):
    for model, layer in (("fp8_rowwise", "patch_embedding"), ("weights that move", "blocks.0.self_attn.q")):
        same, launches, said, *_ = facts[model]
        assert same
        assert launches == 0
        assert said == f"not used: ComfyUI moves, casts or patches the weights of {layer} while they are used"
