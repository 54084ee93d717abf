"""No node of ComfyUI that changes a MODEL does so in vain: it acts as with ComfyUI's sampler, or is refused by name."""

import pytest

# These change nothing on a Wan model, or on this machine, with ComfyUI's sampler either.
NEUTRAL = {
    "ChromaRadianceOptions": "read by Chroma Radiance alone",
    "DifferentialDiffusion": "acts on noise masks, which a rollout refuses",
    "MultiGPU_WorkUnits": "there is one device",
    "SelectModelDevice": "there is one device",
    "UNetCrossAttentionMultiply": "Wan's layers have other names",
    "UNetSelfAttentionMultiply": "Wan's layers have other names",
    "UNetTemporalAttentionMultiply": "Wan's layers have other names",
    "WanAnimate2Cache": "read by Wan Animate 2 alone",
    "wanBlockSwap": "does nothing since ComfyUI 0.3",
}
# These compare the two prompts' predictions, and cfg 1 makes only one.
GUIDANCE = {
    *("CFGNorm", "CFGZeroStar", "FreSca", "Mahiro", "RescaleCFG", "TCFG"),
    *("VideoLinearCFGGuidance", "VideoTriangleCFGGuidance"),
}
# These fail on a Wan model with ComfyUI's sampler too.
NOT_FOR_WAN = {"FreeU", "FreeU_V2", "RenormCFG", "TripoSplatSamplingPreview"}
# These need a file of another kind of model; the kinds of patches that they add.
WITH_FILES = {
    "HypernetworkLoader": ("attn1_patch", "attn2_patch"),
    "QwenImageDiffsynthControlnet": ("double_block", "noise_refiner"),
    "SUPIRApply": ("middle_block_after_patch", "output_block_patch"),
    "USOStyleReference": ("post_input",),
    "WanInfiniteTalkToVideo": ("attn1_patch", "attn2_patch"),
    "WanUni3CControlnetApply": ("double_block",),
}
# How a refusal names a patch, if not by the node.
ALIASES = {
    "AnimaLLLiteApply": "AnimaLLLitePatch",
    "ContextWindowsManual": "context windows",
    "EasyCache": "easycache",
    "FluxKVCache": "KV_Attn_Input",
    "LTXVContextWindows": "context windows",
    "LazyCache": "lazycache",
    "ModelAttentionBackend": "attention override",
    "ScaleROPE": "scaled RoPE",
    "SkipLayerGuidanceSD3": "SkipLayerGuidanceDiT",
    "WanContextWindowsManual": "context windows",
}
STARTS = "ARVideoI2V"  # acts in samplers for autoregressive video alone; see against_core.py
ROUNDS = "ModelComputeDtype"  # to 16 bits, which makes a batch of two prompts differ from one at a time


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("sampling/other_patches")


def why_wrong(name, cfg, rows, place):
    """Why a node's effect is not what it should be, or None."""
    stock, acts, off = rows[f"stock, cfg {cfg}"], *rows[f"{place}, cfg {cfg}"].values()
    if isinstance(acts, str):
        if name in NOT_FOR_WAN and acts == stock:
            return None
        return None if acts.startswith("ValueError: this MODEL ") and ALIASES.get(name, name) in acts else acts
    if name == STARTS:
        return None if acts > 1 else "it does nothing"
    if not off < 1e-3 and not (name == ROUNDS and cfg == 3):
        return f"it is {off} off"
    is_neutral = name in NEUTRAL or (cfg == 1 and name in GUIDANCE)
    return None if is_neutral == (acts < 1e-4) else f"it changes the video by {acts}"


@pytest.mark.parametrize("cfg", [1, 3])
@pytest.mark.parametrize("place", ["before", "after"])
def test_nodes_act_as_with_comfyuis_sampler_or_are_refused_by_name(facts, place, cfg):
    assert len(facts["nodes"]) > 80
    walked = {name: rows for name, rows in facts["nodes"].items() if f"{place}, cfg {cfg}" in rows}
    assert {name: why for name, rows in walked.items() if (why := why_wrong(name, cfg, rows, place))} == {}


def test_nodes_that_were_not_walked_have_a_reason(facts):
    """New ones need a value in the script, or a place in a list above."""
    failed = {name: rows["stock"] for name, rows in facts["nodes"].items() if "stock" in rows}
    assert {name: why for name, why in failed.items() if name not in NOT_FOR_WAN | WITH_FILES.keys()} == {}
    for kind in {kind for kinds in WITH_FILES.values() for kind in kinds}:
        assert f"({kind}: plain)" in facts["refused"][kind]


def test_one_chunk_equals_comfyuis_sampler(facts):
    """At cfg 3 to rounding: ComfyUI runs both prompts in one batch."""
    assert facts["without"]["1.0"] == 0.0
    assert facts["without"]["3.0"] < 1e-4


def test_shift_of_a_model_sampling_node_sets_the_noise_levels(facts):
    """Shift 3: steps 1000, 750, 500 and 250 of the first chunk, and 1000 and 500 of the next, of Causal Forcing++."""
    assert facts["levels"] == [1.0, 0.9, 0.75, 0.5, 0.0, 1.0, 0.75]
