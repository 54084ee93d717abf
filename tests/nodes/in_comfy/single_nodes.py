"""Single nodes, executed without a graph: what they ask for, make and refuse."""

import comfyui
import torch
from comfyui import comfy

decode, encode, loader, patch, schedule = comfyui.modules(
    "nodes", "vae.decode", "vae.encode", "model.loader", "model.patch", "schedule"
)
requests, asked = [], {}
load = comfy.model_management.load_models_gpu
comfy.model_management.load_models_gpu = lambda models, memory_required=0, **options: (
    requests.append(memory_required) or load(models, memory_required=memory_required, **options)
)


def refusal(vae, latents):
    return comfyui.error_of(decode.LightForcingDecode.execute, {"samples": latents}, vae)


for dim in (8, 16):
    vae = comfyui.small_vae(dim)
    for frames in (1, 5, 9):
        result = decode.LightForcingDecode.execute({"samples": torch.randn(2, 16, frames, 4, 6)}, vae)
        asked[dim, frames] = requests[-1]
        assert result[0].shape == (2 * (4 * frames - 3), 32, 48, 3)
assert asked[8, 1] == asked[8, 5] == asked[8, 9] > 0
assert 1.8 * asked[8, 9] < asked[16, 9] < 2 * asked[8, 9]  # all but the frames themselves
assert "[1, 16, 4, 6]" in refusal(vae, torch.zeros(1, 16, 4, 6))
assert "NaN" in refusal(vae, torch.full((1, 16, 2, 4, 6), float("nan")))
other = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=16).state_dict())
other = refusal(other, torch.zeros(1, 16, 2, 4, 6))
assert ("TAESD" in other, "VAE Decode" in other) == (True, True)

# What a video starts or ends with, as latents.
vae = comfyui.small_vae()
pixels = torch.rand(8, 32, 48, 3, generator=torch.Generator().manual_seed(2))


def encoded(count, **options):
    return encode.LightForcingEncode.execute(pixels[:count], vae, **options)[0]["samples"]


assert [encoded(count).shape[2] for count in (1, 4, 5, 8)] == [1, 1, 2, 2]
assert [encoded(count, place="end").shape[2] for count in (1, 3, 4, 5, 8)] == [1, 1, 1, 2, 2]
behind = vae.encode(torch.cat([pixels[:1].expand(5, -1, -1, -1), pixels]))  # an end is what core encodes behind a still
assert (encoded(8, place="end") - behind[:, :, 2:]).abs().max() <= 1e-5

# Apply reads the family from the file that another loader has loaded, and keeps the options that are set.
options = {"backend": "auto", "block": "32", "keep_frames": -1, "keep_sink": 2, "keep_near": -1}
framewise = comfyui.load("causal_forcing-framewise.safetensors")
for family, expected in (
    ("auto", ("causal_forcing_framewise", (32, 32), 6, 2, 2)),
    ("light_forcing_long", ("light_forcing_long", (32, 32), 3, 2, 1)),
):
    settings = patch.settings_of(loader.LightForcingApply.execute(framewise, family, **options)[0])
    attention = settings.attention
    kept = attention.keep_frames, attention.sink_frames, attention.near_frames
    assert (settings.family.id, attention.block, *kept) == expected

# A schedule takes the family of the connected model.
plan = schedule.LightForcingSchedule.execute(81, {"preset": "auto"}, comfyui.applied(framewise, "auto"))[0]
assert (plan.frames_per_chunk, plan.target) == (1, 0.7)
# If Light Forcing Apply is bypassed, that of its file, or one that any model can have.
for preset in ("auto", "gentle", "dense"):
    plan = schedule.LightForcingSchedule.execute(81, {"preset": preset}, framewise)[0]
    assert plan.frames_per_chunk == 1
    assert (
        schedule.LightForcingSchedule.execute(81, {"preset": preset}, comfyui.load("tiny_wan.safetensors"))[
            0
        ].frames_per_chunk
        == 3
    )
assert "connect the MODEL" in comfyui.error_of(schedule.LightForcingSchedule.execute, 81, {"preset": "auto"})
