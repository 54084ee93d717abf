"""The pack's own model files, as if they were shipped: what ComfyUI lists and loads of them.

BASE/models holds tiny ones; here they stand in for workflows/models, and ComfyUI's folders are looked for elsewhere.
"""

import asyncio
import importlib
from pathlib import Path

import comfyui
import torch

demo_prompt, patch = comfyui.modules("nodes", "demo_prompt", "model.patch")


def has_prompt_node():
    """Whether ComfyUI is offered the demo prompt."""
    listed = asyncio.run(comfyui.module("nodes").LightForcingExtension().get_node_list())
    return demo_prompt.LightForcingDemoPrompt in listed


captions, demo_model = comfyui.module("lightforcing_core.demo.captions"), comfyui.module("lightforcing_core.demo.model")
folder_paths, nodes = comfyui.module("nodes.comfy").folder_paths, importlib.import_module("nodes")
KINDS = ("diffusion_models", "vae")


def folders():
    return {kind: folder_paths.get_folder_paths(kind) for kind in KINDS}


empty = Path(comfyui.BASE, "nothing")
for kind in KINDS:
    folder_paths.folder_names_and_paths[kind] = ([str(empty / kind)], {".safetensors"})
folder_paths.models_dir = str(empty)
before = folders()
clip, shipped = Path(folder_paths.get_input_directory(), "light_forcing_clip.mp4"), demo_prompt.SHIPPED
assert clip.stat().st_size < 300_000  # there since the pack was imported
demo_prompt.SHIPPED = empty
demo_prompt.offer_demo_files()
assert folders() == before
assert not has_prompt_node()
refusal = comfyui.error_of(demo_prompt.LightForcingDemoPrompt.execute, demo_model.DEFAULT_CAPTION)
assert "reinstall the pack" in refusal

demo_prompt.SHIPPED = Path(comfyui.BASE, "models")
demo_prompt.offer_demo_files()
assert has_prompt_node()
names = {kind: Path(file).name for kind, file in zip(KINDS, (demo_model.DIT, demo_model.VAE), strict=True)}
assert all(name in folder_paths.get_filename_list(kind) for kind, name in names.items())
(stock,) = nodes.UNETLoader().load_unet(names["diffusion_models"], "default")
(vae,) = nodes.VAELoader().load_vae(names["vae"])
ours = comfyui.loaded(names["diffusion_models"], family="auto", block="16")
assert type(stock.model).__name__ == "WAN21_CausalAR"
assert type(vae.first_stage_model).__name__ == "WanVAE"
assert patch.settings_of(ours).family.id == "demo"
for made in (stock, ours):
    assert made.model.diffusion_model.text_embedding[0].in_features == 32
((context, _),) = demo_prompt.LightForcingDemoPrompt.execute(demo_model.DEFAULT_CAPTION)[0]
table = demo_model.load_table(demo_prompt.find_table())
assert context.shape == (1, 18, 32)
assert torch.equal(context, captions.context_of_caption(table, demo_model.DEFAULT_CAPTION))

clip.write_bytes(b"the user's own")
demo_prompt.SHIPPED = shipped
demo_prompt.offer_demo_files()
assert clip.read_bytes() == b"the user's own"
clip.unlink()
