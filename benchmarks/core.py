"""`bench core`: whole videos by ComfyUI core's own autoregressive sampler and by ours, in one process of ComfyUI.

The variables COMFYUI_PATH and COMFYUI_PYTHON name a checkout of ComfyUI and the Python that runs it.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..lightforcing_core.families import FAMILIES, Family
from ..lightforcing_core.model.wan import random_state_dict
from ..lightforcing_core.rollout.schedule import HEADROOM, Schedule, latent_frames_of
from .console import Put
from .settings import CoreBench, Say
from .step import TEXT_DIM
from .timing import facts, ratio, spread, take_turns

PACK = Path(__file__).resolve().parents[1]
TEXT_TOKENS, QUICK_FRAMES = 64, 33
PUBLISHED, UNTRAINED = FAMILIES["light_forcing_short"], FAMILIES["self_forcing"]
# Loads ComfyUI with PyTorch's attention, its usual one on GPUs, then this pack by its folder as ComfyUI does.
START = """
import importlib.util, sys
checkout, pack, settings = sys.argv[1:]
del sys.argv[1:]
sys.path.insert(0, checkout)
import comfy.cli_args, torch
comfy.cli_args.args.cpu = not torch.cuda.is_available()
comfy.cli_args.args.use_pytorch_cross_attention = True
place = importlib.util.spec_from_file_location("lightforcing", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules["lightforcing"] = importlib.util.module_from_spec(place)
place.loader.exec_module(sys.modules["lightforcing"])
importlib.import_module("lightforcing.benchmarks.core").inside(settings)
"""


def measure(bench: CoreBench, put: Put, say: Say = str) -> None:
    """Measure every arm. Raises ValueError if no ComfyUI is given or it fails."""
    checkout, python = (os.environ.get(name, "") for name in ("COMFYUI_PATH", "COMFYUI_PYTHON"))
    if not (Path(checkout, "comfy").is_dir() and Path(python).is_file()):
        raise ValueError(
            f"COMFYUI_PATH {checkout!r} and COMFYUI_PYTHON {python!r} are not a checkout of ComfyUI and its Python; "
            "set both"
        )
    for family in families(bench.target).values():
        Schedule.of_family(family, latent_frames_of(bench.frames))  # refuses what cannot be met before ComfyUI starts
    if bench.quick:
        bench = replace(bench, frames=QUICK_FRAMES, rounds=1)
    put("arguments", "core", asdict(bench))
    say("videos by ComfyUI core and by Light Forcing")
    command = [python, "-c", START, checkout, str(PACK), json.dumps(asdict(bench))]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        for line in child.stdout or ():
            if line.startswith('["'):
                put(*json.loads(line))
            else:
                last = line.strip() or last
    if child.returncode:
        raise ValueError(f"ComfyUI stopped with exit code {child.returncode}: {last}")


def inside(text: str) -> None:
    """Measure with settings as JSON, in the Python of ComfyUI, whose modules are loaded; print each row as JSON."""
    put, given = _print, json.loads(text)
    samplers, sd = (import_module(f"comfy.{name}") for name in ("samplers", "sd"))
    nodes = "model.patch", "model.loader", "sampling.chunk_sampler"
    patch, loader, sampling = (import_module(f"..nodes.{name}", __package__) for name in nodes)
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    versions = {"ComfyUI": import_module("comfyui_version").__version__, "dtype": str(dtype).removeprefix("torch.")}
    for name, fact in (facts(device) | versions).items():
        put("facts", name, fact)
    weights = random_state_dict(**given["model"], text_dim=TEXT_DIM, dtype=dtype)
    causal = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    stock, plain = (sd.load_diffusion_model_state_dict(dict(weights), metadata=kind) for kind in (causal, None))
    frames, generator = latent_frames_of(given["frames"]), torch.Generator().manual_seed(0)
    height, width = (side // 8 for side in (given["picture"]["height"], given["picture"]["width"]))
    noise = torch.randn(1, 16, frames, height, width, generator=generator)
    prompt = [[torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator), {}]]

    def video(model: Any, sampler_for: Callable[[int], Any], frames: int) -> None:
        guider = samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": prompt})
        sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
        sampler, own = sampler_for(frames), noise[:, :, :frames]
        guider.sample(own, torch.zeros_like(own), sampler, sigmas, disable_pbar=True, seed=0)

    def ours(family: Family, dense: bool, frames: int) -> Any:
        schedule = Schedule.of_family(family, frames)
        return sampling.ChunkSampler(sampling.Request(schedule.dense() if dense else schedule))

    core = samplers.ksampler("ar_video", {"num_frame_per_block": UNTRAINED.frames_per_chunk})
    arms = {"core": partial(video, stock, lambda _: core)}
    for name, family in families(given["target"]).items():
        options = loader.settings_from(family, block=given["picture"]["block"][0], backend=given["backend"])
        arms[name] = partial(video, patch.patched(plain, options), partial(ours, family, name == "dense"))
    for arm in arms.values():  # compiles what the arm runs
        arm(2 * UNTRAINED.frames_per_chunk)
    spent: dict[str, list[float]] = {name: [] for name in arms}

    def timed(name: str) -> None:
        begun = time.process_time()
        arms[name](frames)
        spent[name].append(1e3 * (time.process_time() - begun))

    taken = take_turns({name: partial(timed, name) for name in arms}, given["rounds"], device, put, warm_up=0)
    for name, ms in taken.items():
        put("video", name, {"ms": spread(ms), "times as fast as core": ratio(taken["core"], ms)})
        if device.type == "cpu":  # other work on the machine changes this less
            put("video", name, {"by CPU time": ratio(spent["core"], spent[name])})
    put("ms", "video", taken)
    put("ms", "CPU time", spent)


def families(targets: Sequence[float]) -> Mapping[str, Family]:
    """The settings of our arms: dense, published, the default of models trained without sparsity, and other targets."""
    others = {
        f"target {target:g}": replace(UNTRAINED, target=target, base=min(target + HEADROOM, 1.0)) for target in targets
    }
    return {"dense": UNTRAINED, "published": PUBLISHED, "default": UNTRAINED} | others


def _print(section: str, row: str, value: Any) -> None:
    print(json.dumps([section, row, value]), flush=True)
