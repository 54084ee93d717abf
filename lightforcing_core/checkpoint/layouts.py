"""Key names of Wan checkpoints mapped to the original ones; names for other models."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

# Name components added by training wrappers: FSDP, activation checkpointing, torch.compile, DataParallel.
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})
# Names that a quantised layer stores in addition to its weight, in ComfyUI and LightX2V; a whole file has one more.
SCALE_NAMES = (
    "weight_scale",
    "scale_weight",
    "input_scale",
    "scale_input",
    "weight_scale_2",
    "weight_global_scale",
    "input_global_scale",
    "input_absmax",
    "alpha",
    "pre_quant_scale",
    "weight_s_rel",
    "weight_s_channel",
    "weight_codebook",
    "comfy_quant",
)
FILE_SCALE = "scaled_fp8"
ATTENTION_MARK = ".comfy_attention.config"  # ComfyUI's choice of a kernel for one attention module
# Tables that a model computes itself and need not be loaded.
_COMPUTED = re.compile(r"(^|\.)(freqs|inv_freq|_extra_state)(\.|$)")
_LAYER = re.compile(r"(?:^|\.)blocks\.\d+\.(?:self_attn|attn1)\.")

_DIFFUSERS_TOP = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    # Only to recognise models for image to video, which are refused.
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "condition_embedder.image_embedder": "img_emb",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_DIFFUSERS_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "comfy_attention": "comfy_attention",
    "add_k_proj": "k_img",
}
# Diffusers numbers norms by position: its norm2 precedes cross-attention and is Wan's norm3.
_DIFFUSERS_LAYER = {
    **{f"attn1.{name}": f"self_attn.{ours}" for name, ours in _DIFFUSERS_ATTENTION.items()},
    **{f"attn2.{name}": f"cross_attn.{ours}" for name, ours in _DIFFUSERS_ATTENTION.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}

_USE_CORE = "use ComfyUI's own nodes for it, and an autoregressive text-to-video checkpoint here"
_USE_T2V = "for image to video use a text-to-video checkpoint and start it from the encoded image"
# Pattern of a weight that only this model has → its name; specific models before general ones.
_OTHER_WANS = {
    r"vace_(patch_embedding|blocks)\.": "Wan VACE",
    r"control_adapter\.": "Wan Fun Camera",
    r"casual_audio_encoder\.|audio_injector\.": "Wan 2.2 S2V (speech to video)",
    r"audio_proj\.audio_proj_glob_1\.": "HuMo",
    r"face_adapter\.|motion_encoder\.": "Wan 2.2 Animate",
    r"audio_proj\.": "a talking-head Wan (audio_proj weights)",
    r"patch_embedding_mask\.": "SCAIL 2",
    r"patch_embedding_pose\.": "SCAIL",
    r"patch_embedding_global\.": "WanDancer",
    r"ref_conv\.": "Wan Fun Control",
}
# Pattern of a key → kind of file, for files without a Wan transformer.
_OTHER_FILES = {
    r"token_embedding\.weight|encoder\.block\.0\.": "a text encoder (T5 or umT5); load it with Load CLIP",
    r"decoder\.(middle\.0\.residual|mid_block\.|conv_in\.)": "a VAE; load it with Load VAE",
    r"decoder\.1\.weight": "a tiny autoencoder (TAE); load it with Load VAE",
    r"double_blocks\.0\.|single_transformer_blocks\.0\.": "a Flux or HunyuanVideo model",
    r"joint_blocks\.0\.": "a Stable Diffusion 3 model",
    r"(input|down)_blocks\.0\.": "a Stable Diffusion UNet",
    r"transformer_blocks\.0\.": "another video transformer, such as LTX or CogVideoX",
    r"vision_model\.": "a CLIP vision model",
    r"text_model\.": "a CLIP text encoder; load it with Load CLIP",
}


@dataclass(frozen=True)
class Layout:
    """The way a file names Wan's weights.

    title: a description for users. stored: original name → the file's key. extra: keys that are not of the transformer.
    """

    prefix: str
    diffusers: bool
    title: str
    stored: dict[str, str]
    extra: tuple[str, ...]


def read_layout(keys: Iterable[str]) -> Layout | None:
    """Recognise how `keys` name a Wan transformer; None if there is none. Raises ValueError if there are several."""
    keys = list(keys)
    bare = {key: without_wrappers(key) for key in keys}
    prefixes = {
        name[: match.start() + (match[0][0] == ".")] for name in bare.values() if (match := _LAYER.search(name))
    }
    if not prefixes:
        return None
    if len(prefixes) > 1:
        found = ", ".join(prefix[:80] for prefix in sorted(prefixes)[:3])
        raise ValueError(f"contains {len(prefixes)} models, with the prefixes {found}; save one as its own file")
    prefix = prefixes.pop()
    diffusers = any(name.startswith(f"{prefix}condition_embedder.") or ".attn1." in name for name in bare.values())
    stored: dict[str, str] = {}
    extra = []
    for key, name in bare.items():
        original = original_name(name, prefix, diffusers) if name.startswith(prefix) else None
        if original is None or original in stored:
            extra.append(key)
        else:
            stored[original] = key
    wrapped = sorted({part for key in keys for part in key.split(".") if part in WRAPPERS})
    title = "diffusers names" if diffusers else "original names"
    title += f", prefix {prefix}" if prefix else ""
    title += f", wrapped in {', '.join(wrapped)}" if wrapped else ""
    return Layout(prefix, diffusers, title, stored, tuple(extra))


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def original_name(name: str, prefix: str = "", diffusers: bool = False) -> str | None:
    """Wan's name of a weight, a layer or a layer's scale; None for a table that models compute themselves."""
    name = name.removeprefix(prefix)
    if _COMPUTED.search(name):
        return None
    if diffusers:
        layer = re.match(r"blocks\.\d+\.", name)
        start = layer[0] if layer else ""
        rest = name.removeprefix(start)
        for theirs, ours in (_DIFFUSERS_LAYER if start else _DIFFUSERS_TOP).items():
            if rest == theirs or rest.startswith(f"{theirs}."):
                return start + ours + rest[len(theirs) :]
    return name


def other_wan(shapes: Mapping[str, Shape]) -> str | None:
    """The kind of a Wan transformer, by original name → shape, and the remedy; None for Wan 2.1 text-to-video."""
    for pattern, title in _OTHER_WANS.items():
        if any(re.match(pattern, name) for name in shapes):
            return f"this is {title}; {_USE_CORE}"
    patch = shapes.get("patch_embedding.weight", ())
    in_dim = patch[1] if len(patch) == 5 else 16
    head = shapes.get("head.head.weight", ())
    out_dim = head[0] // 4 if len(head) == 2 else 16
    has_image = any(name.startswith("img_emb.") or ".k_img." in name for name in shapes)
    if out_dim == 48:
        return (
            f"this is Wan 2.2 TI2V 5B or a fine-tune of it, such as LongLive 2 ({in_dim} latent channels, another "
            f"VAE), which is not supported; {_USE_CORE} that is based on Wan 2.1"
        )
    if has_image:
        kind = "FLF2V (first and last frame to video)" if "img_emb.emb_pos" in shapes else "I2V, image to video"
        return f"this is Wan 2.1 {kind}, with img_emb weights and {in_dim} input channels; {_USE_T2V}"
    if in_dim == 36:
        return f"this is Wan 2.2 I2V A14B, image to video ({in_dim} input channels); {_USE_T2V}"
    if in_dim != 16 or out_dim != 16:
        return f"this is a Wan with {in_dim} input and {out_dim} output channels instead of 16 and 16; {_USE_CORE}"
    return None


def other_file(keys: Iterable[str]) -> str:
    """The likely kind of a file without a Wan transformer, judged by its keys."""
    keys = list(keys)
    for pattern, title in _OTHER_FILES.items():
        if any(re.search(pattern, key) for key in keys):
            return f"contains no Wan transformer; this is {title}"
    return (
        f"contains no Wan transformer ({len(keys)} weights, such as {', '.join(key[:80] for key in sorted(keys)[:3])})"
    )
