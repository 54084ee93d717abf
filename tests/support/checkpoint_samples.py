"""Tiny Wan 2.1 T2V weights written out by hand, and the ways in which published files wrap and rename them."""

import torch
from torch import Tensor

LINEARS = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in LINEARS]


def tiny_wan(
    *, dim=128, ffn_dim=192, layers=2, text_dim=4096, freq_dim=256, in_dim=16, out_dim=16, seed=0, dtype=torch.float32
):
    """Original names → random tensors, spelled out here so that the loader's own table is not its judge."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = {"patch_embedding.weight": new(dim, in_dim, 1, 2, 2), "patch_embedding.bias": new(dim)}
    for name, out_features, in_features in (
        ("text_embedding.0", dim, text_dim),
        ("text_embedding.2", dim, dim),
        ("time_embedding.0", dim, freq_dim),
        ("time_embedding.2", dim, dim),
        ("time_projection.1", 6 * dim, dim),
        ("head.head", out_dim * 4, dim),
    ):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = new(out_features, in_features), new(out_features)
    weights["head.modulation"] = new(1, 2, dim)
    for i in range(layers):
        weights[f"blocks.{i}.modulation"] = new(1, 6, dim)
        for name in LINEARS:
            out_features = ffn_dim if name == "ffn.0" else dim
            weights[f"blocks.{i}.{name}.weight"] = new(out_features, ffn_dim if name == "ffn.2" else dim)
            weights[f"blocks.{i}.{name}.bias"] = new(out_features)
        for name in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k", "norm3"):
            weights[f"blocks.{i}.{name}.weight"] = new(dim)
        weights[f"blocks.{i}.norm3.bias"] = new(dim)
    return weights


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def fsdp_wrapped(weights):
    """model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.weight"""
    wrapper = "_fsdp_wrapped_module."
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            name = ".".join(parts[:2]) + "." + wrapper + ".".join(parts[2:])
        renamed[f"model.{wrapper}{name}"] = value
    return renamed


def in_diffusers_names(weights):
    """Names of diffusers' WanTransformer3DModel, one plain replacement after another."""
    renamed = {}
    for name, value in weights.items():
        for ours, theirs in (
            ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
            ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
            ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
            ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
            ("time_projection.1", "condition_embedder.time_proj"),
            ("head.head", "proj_out"),
            ("head.modulation", "scale_shift_table"),
            (".modulation", ".scale_shift_table"),
            ("self_attn.", "attn1."),
            ("cross_attn.", "attn2."),
            (".ffn.0", ".ffn.net.0.proj"),
            (".ffn.2", ".ffn.net.2"),
            (".norm3", ".norm2"),
            *(
                (f"{attention}.{letter}.", f"{attention}.to_{letter}.")
                for attention in ("attn1", "attn2")
                for letter in "qkv"
            ),
            ("attn2.k_img.", "attn2.add_k_proj."),
            ("img_emb.", "condition_embedder.image_embedder."),
            ("attn1.o.", "attn1.to_out.0."),
            ("attn2.o.", "attn2.to_out.0."),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def assert_same(loaded, weights):
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        assert loaded[name].dtype == value.dtype, name
        assert torch.equal(loaded[name], value), name
