"""Start of every script inside ComfyUI: ComfyUI on the CPU, and the pack loaded by its path like a custom node.

Scripts are called as `SCRIPT.py CHECKOUT PACK BASE`; BASE/models holds tiny weights.
"""

import gc
import importlib
import importlib.util
import itertools
import sys
from pathlib import Path

CHECKOUT, PACK, BASE = sys.argv[1:4]
sys.path.insert(0, CHECKOUT)

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = BASE

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy_api.latest import io  # noqa: E402

NAME = "odd_pack_name"
spec = importlib.util.spec_from_file_location(NAME, Path(PACK, "__init__.py"), submodule_search_locations=[PACK])
pack = importlib.util.module_from_spec(spec)
sys.modules[NAME] = pack
spec.loader.exec_module(pack)


def module(name):
    """A module of the pack, such as "nodes.model.patch"."""
    return importlib.import_module(f"{NAME}.{name}")


def modules(folder, *names):
    """Modules of a folder of the pack, such as ("nodes", "schedule", "model.patch")."""
    return [module(f"{folder}.{name}") for name in names]


def load(file):
    """A MODEL from models/diffusion_models as ComfyUI's own loader makes it."""
    return comfy.sd.load_diffusion_model(f"{BASE}/models/diffusion_models/{file}")


def prompt(batch=1, tokens=12):
    """CONDITIONING of random numbers."""
    return [[torch.randn(batch, tokens, 4096, generator=torch.Generator().manual_seed(9)), {}]]


def noise_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model, sampler, noise, *, seed=0, positive=None, callback=None, steps=4, latent=None):
    """Sample as SamplerCustomAdvanced with BasicGuider and BasicScheduler (simple) would."""
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive or prompt()})
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    latent = torch.zeros_like(noise) if latent is None else latent
    return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed)


inference = torch.inference_mode()  # the mode ends with this object


def infer():
    """Compute as ComfyUI runs every node, to the end of the script; on one thread, as layers are tiny."""
    inference.__enter__()
    torch.set_num_threads(1)


BUDGET = {"keep_frames": -1, "keep_sink": -1, "keep_near": -1}


def applied(model, family="unknown", block="64", backend="auto"):
    """The MODEL that Light Forcing Apply makes."""
    apply = module("nodes.model.loader").LightForcingApply
    return apply.execute(model, family, block=block, backend=backend, **BUDGET)[0]


def loaded(file, weight_dtype="default", family="self_forcing", *, lora="none", block="64"):
    """The MODEL that Light Forcing Model Loader makes of a file in models/diffusion_models."""
    node = module("nodes.model.loader").LightForcingModelLoader
    return node.execute(file, weight_dtype, "auto", lora, family, block=block, backend="auto", **BUDGET)[0]


def video_of(model, frames=6):
    """The latents that our sampler makes with a MODEL, patched or not."""
    patched = module("nodes.model.patch").patched(model, settings_of("self_forcing"))
    return sample(patched, chunk_sampler(frames), noise_of((1, 16, frames, 8, 12)))


def settings_of(family, **attention):
    """What the patch keeps for a family."""
    options = module("lightforcing_core.attention.options").AttentionOptions(**attention)
    return module("nodes.model.patch").Settings(module("lightforcing_core.families").FAMILIES[family], options)


def chunk_sampler(frames, *observers, decoder=None, **request):
    """Our sampler for so many latent frames in growing sparsity."""
    nodes, schedule = module("nodes.sampling.chunk_sampler"), module("lightforcing_core.rollout.schedule").Schedule
    plan = schedule(frames, 3, target=0.5, base=0.6)
    return nodes.ChunkSampler(nodes.Request(plan, **request), observers, decoder=decoder)


def sampling_node():
    """The sampling node as node 5 of a graph."""
    node = module("nodes.sampling.sampler").LightForcingSampler
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "5"}})


def small_vae(dim=8):
    """A VAE of random weights."""
    return comfy.sd.VAE(sd=module("lightforcing_core.vae.wan_vae").random_vae_state_dict(dim=dim))


def vae_with_nan(frame):
    """A VAE that decodes to NaN from latent frame number `frame` (from 1) on."""
    broken, count = small_vae(), itertools.count(1)
    last = broken.first_stage_model.decoder.head[-1]
    forward = last.forward

    def late(*given):  # not a hook, with which the VAE would not overlap
        return forward(*given) * (float("nan") if next(count) >= frame else 1.0)

    last.forward = late
    return broken


def with_lora(model):
    """The tiny LoRA as Load LoRA adds it."""
    lora = comfy.utils.load_torch_file(f"{BASE}/models/loras/tiny_lora.safetensors")
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def failing(action, call, error):
    """`action`, whose call number `call` (from 1) raises."""
    count = iter(range(1, 10000))

    def maybe(*arguments, **named):
        if next(count) == call:
            raise error
        return action(*arguments, **named)

    return maybe


def model_failing(model, call, error):
    """The MODEL, whose forward number `call` raises."""
    clone = model.clone()
    forward = failing(lambda run, *arguments, **named: run(*arguments, **named), call, error)
    clone.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, forward)
    return clone


def error_of(action, *arguments, **named):
    """What an action says when it raises, or None."""
    try:
        action(*arguments, **named)
    except Exception as error:
        return str(error)
    return None


def tensor_bytes():
    """Bytes of all living tensors, storages counted once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
