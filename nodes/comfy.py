"""Everything this pack uses of ComfyUI beyond its public API, `comfy_api.latest`.

The rest of nodes/ imports ComfyUI through this file, so a change in ComfyUI is fixed here. The one exception is
`model/rowwise.py`, which extends ComfyUI's quantised tensors.
"""

import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.quant_ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.cli_args import args
from comfy.model_management import VRAMState
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_aimdo import model_vbar
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..lightforcing_core.attention.backends.base import DenseAttention
from ..lightforcing_core.files.output import missing_folders, remove_empty
from ..lightforcing_core.pinned import Weights
from .browser import watching_page

Interrupted: type[BaseException] = comfy.model_management.InterruptProcessingException
out_of_memory: type[Exception] = comfy.model_management.OOM_EXCEPTION  # after it ComfyUI frees its memory
ProgressBar = comfy.utils.ProgressBar
Sampler = comfy.samplers.Sampler
is_interrupted: Callable[[], bool] = comfy.model_management.processing_interrupted
raise_if_interrupted: Callable[[], None] = comfy.model_management.throw_exception_if_processing_interrupted
# The device and dtype with which results are passed on.
result_device: Callable[[], torch.device] = comfy.model_management.intermediate_device
result_dtype: Callable[[], torch.dtype] = comfy.model_management.intermediate_dtype
calc_cond_batch: Callable[..., list[Tensor]] = comfy.samplers.calc_cond_batch  # each prompt's x0; None is not run
# By kind of model, such as "loras": the names of its files, and a file's path, which may be missing.
model_files: Callable[[str], list[str]] = folder_paths.get_filename_list
model_path: Callable[[str, str], str] = folder_paths.get_full_path_or_raise
find_model: Callable[[str, str], str | None] = folder_paths.get_full_path
__all__ = ["ExecutionBlocker", "Interrupted", "ModelPatcher", "ProgressBar", "Sampler", "WrappersMP"]

# --- memory and devices


def memory_for_a_run(device: torch.device) -> int:
    """Bytes that a run may take once ComfyUI has unloaded all other models."""
    management = comfy.model_management
    loaded = sum(
        model.model_loaded_memory()
        for model in management.current_loaded_models
        if model.device == device and model.model
    )
    return max(0, int(management.get_free_memory(device) + loaded - management.extra_reserved_memory()))


def load_on_device(patcher: ModelPatcher, memory_required: int = 0) -> None:
    """Load a model's weights, with `memory_required` bytes left free for its work."""
    comfy.model_management.load_models_gpu([patcher], memory_required=memory_required)


def load_if_away(patcher: ModelPatcher, memory_required: int) -> None:
    """Load a model's weights again if ComfyUI has moved all of them off the device."""
    is_away = patcher.current_loaded_device() != patcher.load_device
    if patcher.is_dynamic():  # the device stays, but the small weights, which have no pages, are gone
        is_away = patcher.model.model_loaded_weight_memory == 0
    if is_away:
        load_on_device(patcher, memory_required)


def weight_bytes_on_device(patcher: ModelPatcher) -> int:
    """Bytes of a model's weights that stay on the device; with --novram none do."""
    return 0 if comfy.model_management.vram_state == VRAMState.NO_VRAM else patcher.model_size()


class PagedWeights(Weights):
    """Weights under DynamicVRAM, kept on the GPU as ComfyUI keeps those of the layer that it runs.

    ComfyUI reserves pages of GPU memory for each module (`_v`) and fills them when the module runs. While pages are
    pinned they are not taken away, and a signature of theirs changes with every new reservation. The contents are
    the module's weights if the signature with which they were filled (`_v_signature`) is that of the pages.
    """

    def __init__(self, tree: torch.nn.Module, device: torch.device, apart: Iterable[torch.nn.Module]) -> None:
        super().__init__(tree, device)
        self._apart = [module for one in apart for module in one.modules()]
        self._pages: list[tuple[torch.nn.Module, Any, Any]] = []

    def hold(self) -> str | None:
        before, self._pages, self.kept = self._pages, [], set(self._apart)
        try:
            for module in self.tree.modules():
                if module not in self.kept and (pages := getattr(module, "_v", None)) is not None:
                    signature = model_vbar.vbar_fault(pages)
                    if signature is None:
                        self.release()
                        return "the GPU has no memory for all weights at once"
                    self._pages.append((module, pages, signature))
                    self.kept.add(module)
        finally:
            self._unpin(before)  # only now, for work that is not finished may read them
        return super().hold()

    def release(self) -> None:
        self._unpin(self._pages)
        self._pages, self.kept = [], set(self._apart)

    @staticmethod
    def _unpin(held: Iterable[tuple[torch.nn.Module, Any, Any]]) -> None:
        for module, pages, _ in held:
            vars(module).pop("_prefetch", None)
            model_vbar.vbar_unpin(pages)

    def are_ready(self) -> bool:
        if not (self._are_filled() and super().are_ready()):
            return False
        # With this ComfyUI uses the pages as they are. Asking for each anew may wait for the GPU.
        for module, _, signature in self._pages:
            vars(module)["_prefetch"] = {"signature": signature, "resident": True}
        return True

    def signature(self) -> Hashable:
        return self._are_filled(), *(bytes(signature) for _, _, signature in self._pages), super().signature()

    def _are_filled(self) -> bool:
        compare = model_vbar.vbar_signature_compare
        return all(compare(signature, module._v_signature) for module, _, signature in self._pages)

    def __del__(self) -> None:
        self.release()


def weights_of(patcher: ModelPatcher, tree: torch.nn.Module, apart: Iterable[torch.nn.Module] = ()) -> Weights:
    """The weights of a model's module tree, for work that needs all but those `apart` in place."""
    device = patcher.load_device
    return PagedWeights(tree, device, apart) if patcher.is_dynamic() else Weights(tree, device)


def is_out_of_memory(error: BaseException) -> bool:
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    return cpu or isinstance(error, MemoryError) or comfy.model_management.is_oom(error)


# --- models

FORMATS: Mapping[str, Any] = comfy.quant_ops.QUANT_ALGOS  # by name, those of quantised weights
WAN_T2V = (comfy.model_base.WAN21, comfy.model_base.WAN21_CausalAR)
STEP_CACHES = ("easycache", "lazycache")  # ComfyUI's own: they skip forwards that the KV cache needs
MODEL_CALLS = {"calc_cond_batch", "calc_cond_uncond_batch", "sampling_function", "apply_model"}
FORWARD_PATCH = re.compile(r"^diffusion_model(\..*forward\w*|\.blocks\.\d+(\.(self|cross)_attn)?)?$")


def why_no_rows() -> str | None:
    """The reason why FP8 with a scale per row cannot be used, or None."""
    if find_spec("comfy_kitchen") is None:
        return "comfy_kitchen is not installed"
    return "MPS has no float8" if comfy.model_management.get_torch_device().type == "mps" else None


def load_model(
    state_dict: dict[str, Tensor],
    *,
    options: Mapping[str, Any],
    metadata: dict[str, str] | None,
    disable_dynamic: bool,
    again: tuple[Callable[..., ModelPatcher], tuple[Any, ...]],
) -> ModelPatcher | None:
    """A MODEL from a state dict, None if this ComfyUI does not know its kind.

    again: the function and arguments that make a second copy, which ComfyUI needs for hooks and several GPUs.
    """
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options=dict(options), metadata=metadata, disable_dynamic=disable_dynamic
    )
    if model is not None:
        model.cached_patcher_init = again
    return model


def with_lora(weight: Tensor, parts: Mapping[str, Tensor], strength: float) -> Tensor | None:
    """A float32 weight with a LoRA of any kind that ComfyUI knows, see `Adapter`."""
    lora = {f"x.{name}.weight" if name.startswith("lora_") else f"x.{name}": part for name, part in parts.items()}
    try:
        patch = comfy.lora.load_lora(lora, {"x": "x"}, log_missing=False)["x"]
        if lora.keys() - patch.loaded_keys:
            return None
        made = comfy.lora.calculate_weight([(strength, patch, 1.0, None, None)], weight.clone(), "x")
    except Exception as error:  # parts that do not fit together can raise anything
        if is_out_of_memory(error):
            raise
        return None
    return None if torch.equal(made, weight) else made  # ComfyUI only logs most of its failures


def file_of(patcher: ModelPatcher) -> str:
    """Path of the file that a model was loaded from, "" if it is not recorded."""
    made_by = patcher.cached_patcher_init
    return next((part for part in made_by[1] if isinstance(part, str)), "") if made_by else ""


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Flow matching with a family's shift, as ComfyUI's own model-sampling nodes set theirs."""


def set_shift(model: ModelPatcher, shift: float) -> None:
    """Give a MODEL a flow shift, unless a node has set its sampling."""
    if isinstance(model.object_patches.get("model_sampling"), FlowSampling | None):
        sampling = FlowSampling(model.model.model_config)
        sampling.set_parameters(shift=shift, multiplier=1000)
        model.add_object_patch("model_sampling", sampling)


def flow_shift(model: ModelPatcher) -> float:
    """The shift of a MODEL's flow matching. Raises ValueError if its sampling is another than Wan's."""
    sampling = model.get_model_object("model_sampling")
    kinds = comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST
    if not all(isinstance(sampling, kind) for kind in kinds):
        problem = f"{name_of(sampling)}, which is not Wan's flow matching"
    elif sampling.multiplier != 1000:
        problem = f"timesteps up to {sampling.multiplier:g} (ModelSamplingAuraFlow), and Wan takes them up to 1000"
    elif (scale := getattr(sampling, "noise_scale", 1.0)) != 1.0:
        problem = f"noise of {scale:g} times the usual strength (ModelNoiseScale), which a rollout cannot follow"
    elif not sampling.shift > 0.0:
        problem = f"shift {sampling.shift:g}, which leaves no noise to start from"
    else:
        return float(sampling.shift)
    raise ValueError(f"this MODEL samples with {problem}; remove the node that sets it, or use ModelSamplingSD3")


def name_of(patch: Any) -> str:
    """A function's or an object's name; most of ComfyUI's nodes define theirs inside the node, which is named then."""
    return str(getattr(patch, "__qualname__", type(patch).__qualname__)).partition(".")[0]


def guidance_of(model_options: Mapping[str, Any]) -> list[Any]:
    """The functions in a run's options that change how a step's predictions are mixed."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.PREDICT_NOISE, {})
    found = [function for functions in wrappers.values() for function in functions]
    for name in ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"):
        functions = model_options.get(name, [])
        found += functions if isinstance(functions, list) else [functions]
    return found


def conflicting_patches(model: ModelPatcher, model_options: Mapping[str, Any], own: str) -> Iterator[str]:
    """Describe patches on a MODEL, or a run's options, that a rollout cannot follow; wrappers under `own` can stay."""
    options = model_options.get("transformer_options", {})
    for name in model.object_patches:
        if FORWARD_PATCH.search(name):
            yield f"another patch of the model's forward ({name})"
    for table in (model.wrappers, options.get("wrappers", {})):
        for kind, by_key in table.items():
            for key, functions in by_key.items():
                if functions and key != own and (kind == WrappersMP.DIFFUSION_MODEL or key in STEP_CACHES):
                    yield f"another patch of the model's forward ({key or ''} {name_of(functions[0])})"
    whole = {
        "a split over several GPUs (multigpu)": model.get_additional_models_with_key("multigpu"),
        "context windows (context_handler)": model_options.get("context_handler"),
        "scaled RoPE (rope_options)": options.get("rope_options"),
        "an attention override (optimized_attention_override)": options.get("optimized_attention_override"),
    }
    yield from (description for description, is_set in whole.items() if is_set)
    for name, patches in options.get("patches", {}).items():
        if patches:
            yield f"a patch inside the layers ({name}: {name_of(patches[0])})"
    for name, replaced in options.get("patches_replace", {}).items():
        for block, patch in list(replaced.items())[:1]:
            yield f"replaced blocks ({name} {block}: {name_of(patch)})"
    if other := model_options.get("sampler_calc_cond_batch_function"):
        yield f"another way to call the model ({name_of(other)})"
    for function in guidance_of(model_options):
        names = getattr(getattr(function, "__code__", None), "co_names", ())
        if not MODEL_CALLS.isdisjoint(names):
            yield f"guidance that runs the model again ({name_of(function)})"


def dense_attentions() -> dict[str, DenseAttention]:
    """Attention over [B, L, H, D] by the function that ComfyUI has chosen, then by the fast ones that it offers."""
    module = comfy.ldm.modules.attention
    usual = module.optimized_attention
    functions = {f"ComfyUI's {usual.__name__}": usual}  # which one it is depends on ComfyUI's flags
    for name in ("pytorch", "sage", "sage3", "flash", "xformers"):
        function = module.REGISTERED_ATTENTION_FUNCTIONS.get(name)
        if function not in (None, usual):
            functions[name] = function
    return {name: _over_heads(function) for name, function in functions.items()}


def preferred_attentions(dit: torch.nn.Module) -> dict[torch.nn.Module, DenseAttention]:
    """By attention module the function that its checkpoint asks for, which ComfyUI keeps in the module since 0.38."""
    found = {module: getattr(module, "comfy_attention", None) for module in dit.modules()}
    functions = {module: getattr(kept, "function", None) for module, kept in found.items()}
    return {module: _over_heads(function) for module, function in functions.items() if function is not None}


@cache  # one object for each function, by which `FastestDense` knows the same ways in the next run
def _over_heads(function: Callable[..., Tensor]) -> DenseAttention:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[2]
        return function(q.flatten(2), k.flatten(2), v.flatten(2), heads=heads).unflatten(-1, (heads, -1))

    return dense


# --- sampling


def encode_text(clip: Any, text: str) -> list[Any]:
    """CONDITIONING, as CLIP Text Encode makes it."""
    conditioning: list[Any] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return conditioning


def empty_latents(model: ModelPatcher, latent: Mapping[str, Any]) -> Tensor:
    """The samples of a LATENT; empty ones get the model's number of channels."""
    spatial, temporal = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], spatial, temporal)


def guider_for(model: ModelPatcher, vae: Any, positive: list, negative: list | None, cfg: float, key: str) -> Any:
    """A guider that loads the VAE, if any, with the model; `key` names it there."""
    if vae is not None:
        model = model.clone()
        model.set_additional_models(key, [vae.patcher])
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    if cfg != 1.0:
        guider.set_cfg(cfg)
        guider.inner_set_conds({"negative": negative or []})
    return guider


def is_plain_guider(guider: Any) -> bool:
    """Whether a guider calls the model once per prompt, as CFGGuider does."""
    return type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise


def request_memory(guider: Any, key: str, memory: Callable[[int], int]) -> None:
    """Make ComfyUI free the bytes that a run needs before it loads the guider's model.

    memory: bytes needed in addition to the model's weights, given ComfyUI's own estimate for one latent frame.
    """
    base = guider.model_patcher.model

    def prepare_sampling(executor: Any, model: Any, shape: Sequence[int], conds: Any, *rest: Any, **named: Any) -> Any:
        # ComfyUI's estimate grows linearly with the frames of `shape`, so the bytes are converted to frames.
        one_frame = base.memory_required([*shape[:2], 1, *shape[3:]])
        frames = memory(one_frame) / max(one_frame, 1)
        return executor(model, [*shape[:2], -int(-frames // 1), *shape[3:]], conds, *rest, **named)

    add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, prepare_sampling, guider.model_options, True)


def progress_bars_hidden() -> bool:
    return not comfy.utils.PROGRESS_BAR_ENABLED


class Preview:
    """Latent previews of one MODEL, by the method chosen in ComfyUI's settings.

    is_foreign: whether another pack has replaced ComfyUI's previews.
    """

    def __init__(self, model: ModelPatcher) -> None:
        self._model, self._format = model, model.model.latent_format
        self._previewer = previewer = latent_preview.get_previewer(model.load_device, self._format)
        self.is_on = previewer is not None
        self.is_foreign = self.is_on and type(previewer).__module__ != latent_preview.__name__
        self.has_tiny_vae = isinstance(previewer, latent_preview.TAESDPreviewerImpl)

    def callback(self) -> Callable[[int, Tensor, Tensor, int], None]:
        return latent_preview.prepare_callback(self._model, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [n, H, W, 3] that the tiny VAE makes of latents [1, 16, f, h, w]."""
        return self._previewer.taesd.decode(latents)[0]

    def colours(self, latents: Tensor) -> Tensor:
        """Approximate colours of latents [16, f, h, w]: [f, h, w, 3] uint8."""
        factors = torch.tensor(self._format.latent_rgb_factors, device=latents.device, dtype=latents.dtype)
        bias = torch.tensor(self._format.latent_rgb_factors_bias, device=latents.device, dtype=latents.dtype)
        colours = torch.nn.functional.linear(latents.movedim(0, -1), factors.t(), bias)
        return ((colours + 1) * 127.5).clamp(0, 255).to(torch.uint8)


# --- server

_queued: ContextVar[Mapping[str, Any] | None] = ContextVar("queued", default=None)


def running_server() -> Any:
    """ComfyUI's server, None in a script that uses the nodes without one."""
    from server import PromptServer  # imported late: without a server the module may not exist

    return getattr(PromptServer, "instance", None)


def keep_queued_prompts(server: Any) -> None:
    """Keep each prompt for `queued_prompt` while ComfyUI checks it."""

    def keep(request: dict[str, Any]) -> dict[str, Any]:
        _queued.set(request.get("prompt"))
        return request

    server.add_on_prompt_handler(keep)


def queued_prompt() -> Mapping[str, Any]:
    """The prompt whose nodes are being checked; ComfyUI shows `validate_inputs` nothing of it but the node's values."""
    return _queued.get() or {}


def executing_node() -> tuple[str, str] | None:
    """(node id, prompt id) of the node that is running, None outside a prompt."""
    context = get_executing_context()
    return None if context is None else (context.node_id, context.prompt_id)


def is_prompt_waiting() -> bool:
    """Whether ComfyUI has another prompt to run after this one."""
    server = running_server()
    return server is not None and server.prompt_queue.get_tasks_remaining() > 1


def show_text(line: str, notes: Sequence[str] = (), details: str = "") -> None:
    """Show a line on the running node, with notes that must be seen and details that need not."""
    server, node = running_server(), executing_node()
    if server is None or node is None:
        return
    if watching_page(server) is None:
        server.send_progress_text("\n".join(filter(None, (line, *notes, details))), node[0], server.client_id)
        return
    message = {"node": node[0], "prompt_id": node[1], "line": line, "notes": "\n".join(notes), "details": details}
    server.send_sync("light_forcing.status", message, server.client_id)


def metadata_wanted() -> bool:
    """Whether files shall contain the graph that made them (--disable-metadata)."""
    return not args.disable_metadata


# --- folders


def model_folder(kind: str) -> Path:
    """The first folder for models of a kind, where new files are written."""
    return Path(folder_paths.get_folder_paths(kind)[0]).resolve()


def models_root() -> Path:
    return Path(folder_paths.models_dir)


def add_model_kind(kind: str, suffix: str) -> None:
    """Add a kind of models, unless it exists, as a folder in the models folder."""
    folder_paths.folder_names_and_paths.setdefault(kind, ([str(models_root() / kind)], {suffix}))


def add_model_folder(folder: Path) -> None:
    """Search `folder` too, after the user's, for models of the kind it is named."""
    folder_paths.add_model_folder_path(folder.name, str(folder))


def named_file(folder: Path, name: str) -> Path:
    """The path of a safetensors file in `folder`; ValueError for one outside it. Links count as what they are named."""
    path = Path(os.path.normpath(folder / f"{name.strip().removesuffix('.safetensors')}.safetensors"))
    if path.name.startswith(".") or not path.is_relative_to(folder) or "\0" in name:
        raise ValueError(f"name {name!r:.300} is not a file name inside {folder}; use letters, digits and /")
    return path


def version_of(path: str | Path) -> str:
    """A text that changes when the file does, for `fingerprint_inputs`."""
    status = os.stat(path)
    return f"{status.st_mtime_ns}/{status.st_size}"


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def output_folder() -> Path:
    return Path(os.path.abspath(folder_paths.get_output_directory()))


def numbered_output(prefix: str, *, width: int = 0, height: int = 0) -> tuple[Path, str]:
    """Folder, which may not exist, and file name of a prefix with %fields% filled in, by ComfyUI's rules."""
    root = output_folder()
    missing = missing_folders(Path(os.path.normpath(root / prefix[:4096])))
    folder, name, *_ = folder_paths.get_save_image_path(prefix, str(root), width, height)
    path = Path(os.path.normpath(folder))
    remove_empty(one for one in (path, *path.parents) if one in missing)  # ComfyUI makes them for any prefix
    return path, name
