"""Scripts that assert what only ComfyUI's Python can see; the first line of each says what that is."""

import pytest

SCRIPTS = [
    "light_import",
    "node_texts",
    "single_nodes",
    "demo_files",
    "output_files",
    "model/fp8_saved",
    "model/lora_kinds",
    "model/patching",
    "model/published_formats",
    "model/step_graph",
    "sampling/against_core",
    "sampling/faults",
    "sampling/live_view",
    "sampling/other_patches",
    "memory/memory",
    "memory/low_memory",
    "memory/dynamic_vram",
    "memory/no_backend",
    "memory/joined",
    "vae/overlap",
    "vae/tae",
    "vae/vae_against_core",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_in_comfyui(run_inside, script):
    run_inside(script, returns=False)
