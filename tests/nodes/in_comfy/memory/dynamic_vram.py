"""Runs under ComfyUI's DynamicVRAM, where each weight comes to the card when it is used."""

import card_runs as runs
import torch
from card_runs import CARD, card, comfyui, management, new_vae, run, same
from comfyui import comfy
from pages import Pages, pages_of, switch

node_comfy = comfyui.module("nodes.comfy")


def after_a_node():
    """What ComfyUI does after every node."""
    management.reset_cast_buffers()
    comfy.model_prefetch.cleanup_prefetch_queues()


def contents(model):
    """But for the modulations, which ComfyUI casts where they are and leaves on the card."""
    return {name: content for name, content in runs.contents(model).items() if not name.endswith(".modulation")}


# Every kind of weight, on a card with memory for all of them, for half, and for none.
for name, make in runs.KINDS.items():
    switch(False)
    model = make()
    usual = run(model, steps=1)
    management.vram_state = management.VRAMState.NO_VRAM
    exact = run(model, steps=1)  # every LoRA is added at every use, and no sum is rounded
    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.unload_all_models()
    switch(True)
    model = make()
    before, roundings = contents(model), [runs.distance(usual, exact)]
    assert model.is_dynamic()
    if name == "float32":
        plain = usual
    for room, most in (("all", 1 << 40), ("half", model.model_size() // 2), ("none", 0)):
        Pages.most = most
        made, pages = run(model, steps=1), pages_of(model)
        found = len(pages.pages) > 0, pages.misses > 0
        assert room == "half" or found == (room == "all", room == "none"), (name, room, found)
        assert "LoRA" in name or name == "fp8_e4m3fn" or torch.equal(made[0], usual[0]), (name, room)
        assert name != "float32, LoRA" or torch.equal(made[0], usual[0]), room
        roundings.append(runs.distance(made, exact))
        after_a_node()
    if name == "fp8_e4m3fn":
        # ComfyUI leaves small weights as the file has them; FP8 holds only for the large ones.
        assert 0.0 < runs.distance(made, plain) < runs.distance(usual, plain)
    if name.endswith("LoRA"):  # the rounding of weights that a LoRA was added to
        assert max(roundings) < (0.002 if "bfloat16" in name else 0.1), (name, roundings)
    management.unload_all_models()
    assert contents(model) == before, name
Pages.most = 1 << 40

# A LoRA on float32 weights, with a VAE: the same bits in every case.
switch(False)
ordinary, vae = runs.with_lora(runs.file()), new_vae()
whole = run(ordinary, vae=vae)
full = card.peak
management.unload_all_models()
switch(True)
model, vae, seen = runs.with_lora(runs.file()), new_vae(), []
runs.watched_norms(seen)
assert (model.is_dynamic(), vae.patcher.is_dynamic()) == (True, True)
assert same(whole, run(model, vae=vae)) == [True, True]
assert all(right for _, right in seen)
size = full - model.model_size() // 2
assert same(whole, run(model, vae=vae, size=size)) == [True, True]
assert (card.peak <= size, pages_of(model).misses > 0) == (True, True)
assert "so ComfyUI will offload weights" in str(runs.plans[-1])

# What a run may take does not depend on what an earlier one left loaded.
with runs.sized(2 * full):
    management.unload_all_models()
    free = [node_comfy.memory_for_a_run(CARD), management.get_free_memory(CARD)]
    runs.node.execute(**runs.arguments(model), vae=vae)
    after = node_comfy.memory_for_a_run(CARD), management.get_free_memory(CARD)
    assert abs(after[0] - free[0]) < model.model_size() // 1000
    assert after[1] - free[1] < -model.model_size()

# Pages are taken away during the run: some, by a model of the older kind; then everything, twice.
taken = []


def some_go():
    before = pages_of(model).loaded_size()
    management.free_memory(management.get_free_memory(CARD) + model.model_size() // 2, CARD)
    taken.append(before - pages_of(model).loaded_size())


def all_go():
    management.unload_all_models()
    taken.append(pages_of(model).loaded_size() + vae.patcher.model.dynamic_vbars[CARD].loaded_size())


assert same(whole, run(runs.meanwhile(model, 4, some_go), vae=vae)) == [True, True]
assert taken.pop() > 0

# Without small weights that a LoRA changed in place, even a whole unload in the middle does no harm.
plain = runs.file()
expected = run(plain, vae=vae)
model_of_pages, model = model, plain
assert same(expected, run(runs.meanwhile(plain, 4, all_go), vae=vae)) == [True, True]
assert taken.pop() == 0
model = model_of_pages

# Bypassing the node gives the stock model back; where hooks need it, ComfyUI makes an ordinary MODEL of ours.
other = model.get_non_dynamic_delegate()
assert (other.is_dynamic(), same(whole, run(other, vae=vae))) == (False, [True, True])

# The nodes that decode and encode by themselves.
made = []
for on in (False, True):
    switch(on)
    vae = new_vae()
    made += [runs.decoded(vae), runs.encoded(vae)]
    management.unload_all_models()
assert [torch.equal(made[0], made[2]), torch.equal(made[1], made[3])] == [True, True]
