"""The weights of q, k and v in one memory: ComfyUI patches, moves, counts and frees them as before."""

import gc

import card_runs as runs
import torch
from card_runs import CARD, card, management

# The memory behind a tensor on this card, by which joined weights are found again.
runs.OnCard.untyped_storage = lambda tensor: tensor.held.untyped_storage()


def layers_of(model):
    return [block.self_attn for block in model.model.diffusion_model.blocks]


def three(layer):
    return layer.q, layer.k, layer.v


def joined(model):
    """Project in every layer: the number of those that did it in one product, and whether all of it is right."""
    x = torch.randn(1, 8, runs.WIDTH, generator=torch.Generator().manual_seed(1)).to(CARD)
    count = 0
    for layer in layers_of(model):
        parts = runs.fused.project(layer, x, with_q=True)
        count += parts[0].held.untyped_storage().data_ptr() == parts[2].held.untyped_storage().data_ptr()
        for part, linear in zip(parts, three(layer), strict=True):
            torch.testing.assert_close(part.cpu(), linear(x).cpu(), rtol=0, atol=1e-4)
    return count


def used():
    gc.collect()
    return card.used


# Weights that ComfyUI widens while they are used stay apart.
for name, layers in {"float32": runs.LAYERS, "float32, LoRA": runs.LAYERS, "bfloat16, LoRA": 0}.items():
    management.unload_all_models()
    empty, model = used(), runs.KINDS[name]()
    before = runs.contents(model)
    for _ in range(2):  # loaded, freed and loaded again
        management.load_models_gpu([model])
        loaded, patched = used(), runs.contents(model)
        assert loaded - empty >= model.loaded_size() > 0, name
        assert [joined(model), joined(model)] == [layers] * 2, name
        assert (used(), runs.contents(model)) == (loaded, patched), name
        assert (patched != before) == ("LoRA" in name), name
        freed = model.partially_unload(model.offload_device, model.model_size() // 2)
        # Memory comes back once all three weights are away. ComfyUI moves a layer's together if patched alike.
        away = [[linear.weight.device != CARD for linear in three(layer)] for layer in layers_of(model)]
        held = sum(sum(layer) for layer in away if not all(layer)) * three(layers_of(model)[0])[0].weight.nbytes
        assert loaded - used() >= freed - 1.01 * held, name
        assert sum(any(layer) and not all(layer) for layer in away) <= (runs.LAYERS if "LoRA" in name else 1), name
        assert joined(model) < max(1, layers), name
        management.unload_all_models()
        assert (used(), runs.contents(model)) == (empty, before), name
