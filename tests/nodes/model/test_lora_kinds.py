"""Kinds of LoRA that the library does not merge by itself, in the loader's `lora_name`."""

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("model/lora_kinds")


@pytest.mark.parametrize("kind", ["LoKr", "LoHa", "DoRA"])
def test_comfyuis_own_code_merges_it(facts, kind):
    assert facts[kind] < 1e-5


@pytest.mark.parametrize("fault", ["of another size", "half a LoKr"])
def test_one_that_does_not_fit_is_refused_by_its_kind(facts, fault):
    assert "1 are LoKr, which cannot be merged here (blocks.1.self_attn.q)" in facts[fault]
