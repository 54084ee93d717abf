"""Start of every script inside ComfyUI: ComfyUI on the CPU, and the pack loaded by its path like a custom node.

Scripts are called as `SCRIPT.py CHECKOUT PACK BASE`; BASE/models holds tiny weights.
"""

import gc
import importlib
import importlib.util
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


def tensor_bytes():
    """Bytes of all living tensors, storages counted once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
