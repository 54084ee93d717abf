"""An attention module's own function, as ComfyUI keeps one since 0.38, runs the dense attention of that module alone.

The modules and functions here are small ones with the attributes that ComfyUI's have.
"""

import comfyui
import torch

comfy, attention = comfyui.comfy, comfyui.comfy.ldm.modules.attention
module = comfyui.module("nodes.comfy")
comfyui.infer()
calls = []


class Kept(torch.nn.Module):
    """The module for a marker in the checkpoint; without one it has no function."""

    def __init__(self, function=None):
        super().__init__()
        self.config, self.function = None, function


def counting(q, k, v, heads, mask=None, **kwargs):
    """Takes tensors; containers are for calls that hand their tensors over."""
    assert not kwargs
    assert all(type(one) is torch.Tensor and one.dim() == 3 for one in (q, k, v))
    calls.append(tuple(q.shape))
    return attention.attention_pytorch(q, k, v, heads, mask=mask)


def nothing(q, k, v, heads, **kwargs):
    return torch.zeros_like(q)


counting.container_function = None


def video(**kept):
    """A video of two chunks; kept: the function of "self_attn" or "cross_attn" in the last layer."""
    model = comfyui.load("tiny_wan.safetensors")
    for block in model.model.diffusion_model.blocks:
        block.self_attn.comfy_attention, block.cross_attn.comfy_attention = Kept(), Kept()
    for name, function in kept.items():
        getattr(block, name).comfy_attention.function = function
    assert len(module.preferred_attentions(model.model.diffusion_model)) == len(kept)
    return comfyui.video_of(model)


usual = video()
assert torch.equal(usual, comfyui.video_of(comfyui.load("tiny_wan.safetensors")))
assert torch.allclose(video(self_attn=counting), usual, atol=1e-5)
assert len(calls) == 4  # the first chunk's steps; the second is sparse, and a clean pass ends before this
calls.clear()
assert torch.allclose(video(cross_attn=counting), usual, atol=1e-5)
assert len(calls) == 8  # the steps of both chunks
for name in ("self_attn", "cross_attn"):
    assert not torch.allclose(video(**{name: nothing}), usual, atol=1e-3)

# ComfyUI's choice is read when a run starts; the same function is the same object to the next run.
attention.optimized_attention = counting
calls.clear()
assert torch.allclose(comfyui.video_of(comfyui.load("tiny_wan.safetensors")), usual, atol=1e-5)
assert len(calls) == 2 * (4 + 8) + 2  # and the first layer in the clean pass
assert module.dense_attentions() == module.dense_attentions()
