"""Every reader of files from outside ends in its documented error, soon and in little memory, whatever the file.

CI tries 2,000 inputs per reader, another number with LIGHTFORCING_FUZZ; memory that torch takes to unpickle counts too.
"""

import json
import os
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from lightforcing.cli.queue.jobs import make_jobs, read_prompts
from lightforcing.cli.queue.prompt import UsageError, read_workflow
from lightforcing.lightforcing_core.checkpoint.files import CheckpointError, open_weights, tensor_groups
from lightforcing.lightforcing_core.checkpoint.load import describe, load_dit_state_dict
from lightforcing.lightforcing_core.checkpoint.lora import merge_lora
from lightforcing.lightforcing_core.checkpoint.scaled import read_quantisation
from lightforcing.lightforcing_core.files.tensors import read_tensors
from lightforcing.lightforcing_core.rollout.state import RunState, StateError, load_run_state, save_run_state
from lightforcing.lightforcing_core.rollout.text_embeds import FORMAT, load_embeds
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from .hostile_files import as_json, as_safetensors, as_torch, at_most, damaged, edits
from .support.checkpoint_samples import tiny_wan
from .support.queue_samples import GRAPH, OBJECT_INFO
from .support.rollouts import recipe_of

INPUTS = int(os.environ.get("LIGHTFORCING_FUZZ", "2000"))
MOST_BYTES = 1 << 30
DIT = {name: weight.to(torch.float8_e4m3fn) for name, weight in tiny_wan(layers=1, ffn_dim=128, text_dim=32).items()}
SCALED = DIT | {"blocks.0.ffn.0.weight_scale": torch.ones(128), "blocks.0.ffn.2.weight_scale": torch.ones(1)}
SCALED["blocks.0.ffn.2.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
FORMATS = json.dumps({"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}})
CONFIG = {"transformer": {"causal_ar": True, "text_dim": 32}}
DIT_METADATA = {"_quantization_metadata": FORMATS, "config": json.dumps(CONFIG)}
LAYER = "blocks.0.self_attn.q"
LORA = {f"{LAYER}.lora_A.weight": torch.ones(2, 128), f"{LAYER}.lora_B.weight": torch.ones(128, 2)}
LORA |= {f"{LAYER}.alpha": torch.tensor(2.0), "blocks.0.norm3.diff_b": torch.ones(128)}
LORA |= {"blocks.0.ffn.0.lokr_w1": torch.ones(2, 2), "blocks.0.ffn.0.lokr_w2": torch.ones(64, 64)}
LORA_METADATA = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})}
EMBEDS = {"0.cond": torch.ones(1, 3, 7), "0.pooled_output": torch.ones(1, 4), "1.cond": torch.ones(1, 2, 7)}
EMBEDS_METADATA = {"format": FORMAT, "entries": json.dumps([{"strength": 1.0}, {"pooled_output": None}])}
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a.x": "a.safetensors", "b.x": "b.safetensors"}}
LINES = [
    {"text": "a cat", "name": "cat", "seed": 3, "set": {"3.cfg": 2.0}},
    {"text": "a dog"},
    {"set": {"2.text": "x"}},
]


def small_state():
    options = {"frames_per_chunk": 3, "sigmas": (1.0, 0.5, 0.0), "growth": (0.0, 0.5), "window": 6, "sink_frames": 1}
    context = [Prompt(torch.ones(1, 3, 7)), Prompt(torch.ones(1, 2, 7), 1, "blend", 2)]
    given = {"initial_latents": torch.ones(1, 16, 1, 4, 4), "cfg": 2.0, "negative": torch.ones(1, 2, 7)}
    recipe = recipe_of(latent_shape=(1, 16, 7, 4, 4), context=context, chunk_seeds={1: 5}, **options, **given)
    return RunState(recipe, "wan", finished=(torch.ones(1, 16, 3, 4, 4),))


def read_state(path):
    state = load_run_state(path)
    state.latents, state.is_complete, list(state.recipe.guides)
    state.lengthened(20)


def read_model(path):
    state_dict, info = load_dit_state_dict(path)
    describe(info)
    kinds = read_quantisation(state_dict).comfyui_layers
    scaled = [layer for layer, kind in kinds.items() if kind == "float8_e4m3fn" and f"{layer}.weight" in state_dict]
    assert all({f"{layer}.weight_scale", f"{layer}.scale_weight"} & state_dict.keys() for layer in scaled)
    load_dit_state_dict(path, dequantise_all=True)


def read_batch(path):
    for job in make_jobs(GRAPH, OBJECT_INFO, lines=read_prompts(path)):
        _ = job.digest


def read_graph(path):
    prompt = read_workflow(path)
    for job in make_jobs(prompt, OBJECT_INFO, lines=[{"text": "a dog", "seed": 1}]):
        _ = job.digest


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
    """By kind of file, a function from edits to its contents."""
    state = read_tensors(save_run_state(small_state(), tmp_path_factory.mktemp("valid") / "x.safetensors"), copy=True)
    state[1]["state"] = json.dumps(json.loads(state[1]["state"]) | {"checksums": {}})  # as if they were right
    lines = [json.dumps(line) for line in LINES]

    def lora(changes):
        if changes[-1][1] % 4:
            return as_safetensors(LORA, LORA_METADATA, changes)
        return as_torch({"generator_lora": LORA, "x": {}}, changes)

    return {
        "model": lambda changes: as_safetensors(SCALED, DIT_METADATA, changes),
        "container": lambda changes: as_torch({"generator": LORA | {"a.b": torch.ones(2)}, "step": 3}, changes),
        "lora": lora,
        "x.index.json": lambda changes: damaged(as_json(INDEX, changes).encode(), changes),
        "state": lambda changes: as_safetensors(*state, changes),
        "embeds": lambda changes: as_safetensors(EMBEDS, EMBEDS_METADATA, changes),
        "workflow": lambda changes: damaged(as_json({"prompt": GRAPH}, changes).encode(), changes),
        "lines.jsonl": lambda changes: damaged("\n".join([as_json(LINES[0], changes), *lines]).encode(), changes),
    }


READERS = {
    "model": (read_model, CheckpointError),
    "container": (lambda path: tensor_groups(open_weights(path)[0]), CheckpointError),
    "lora": (lambda path: merge_lora(DIT, path), CheckpointError),
    "x.index.json": (open_weights, CheckpointError),
    "state": (read_state, StateError),
    "embeds": (load_embeds, ValueError),
    "workflow": (read_graph, UsageError),
    "lines.jsonl": (read_batch, UsageError),
}


@pytest.fixture
def folder(tmp_path):
    """In memory if the system can: a disk would take most of the time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def little_memory():
    """A limit on the address space of this process: what it has, and a gigabyte."""
    former = resource.getrlimit(resource.RLIMIT_AS)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MOST_BYTES, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, former)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_any_file_is_read_or_refused(kind, builders, folder, little_memory):
    build, (read, documented) = builders[kind], READERS[kind]
    path, read_whole, messages = folder / kind, [], []
    for shard in ("a", "b"):
        (path.parent / f"{shard}.safetensors").write_bytes(as_safetensors({f"{shard}.x": torch.ones(2)}, {}, []))

    @settings(max_examples=INPUTS, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(edits())
    def check(changes):
        path.write_bytes(build(changes))
        with at_most(5):
            try:
                read(path)
            except documented as error:
                messages.append(str(error))
            else:
                read_whole.append(changes)

    check()
    assert max(map(len, messages)) < 3000
    assert documented is UsageError or all(str(folder) in message for message in messages)
    assert read_whole  # the edits are small enough to reach the last check of the reader


def test_names_of_hundreds_of_parts_take_no_minutes(folder):
    lora = {"a." * 490 + f"{number}.lora_A.weight": torch.zeros(0) for number in range(1000)}
    (folder / "lora").write_bytes(as_safetensors(lora, {}, []))
    with at_most(5), pytest.raises(CheckpointError, match="keys match nothing in this model"):
        merge_lora(DIT, folder / "lora")
