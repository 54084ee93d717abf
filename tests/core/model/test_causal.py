"""The cached causal forward against one masked pass of an independent model over the whole sequence."""

import pytest
import torch

from lightforcing.lightforcing_core import machine
from lightforcing.lightforcing_core.attention.backends.dense import sdpa
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.model.causal import FEW_SLOTS, ModelState, commit, padding_bias, predict
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict

from ...support import naive_wan

LAYERS, HEIGHT, WIDTH, TEXT = 2, 4, 6, 32


@pytest.fixture(scope="module")
def weights():
    return random_state_dict(dim=256, ffn_dim=320, layers=LAYERS, text_dim=TEXT)


def make_state(slots, sinks=0, sink_rope="fixed", batch=1, dtype=torch.float32, **options):
    shape = CacheShape(
        layers=LAYERS,
        batch=batch,
        slots=slots,
        grid=(HEIGHT // 2, WIDTH // 2),
        heads=2,
        head_dim=128,
        sink_frames=sinks,
        sink_rope=sink_rope,
        dtype=dtype,
    )
    return ModelState(KVCache(shape), AttentionOptions(**options))


def visible_mask(lengths, window, sinks):
    """Which frames each frame may see: its chunk, the sinks and the newest others inside the window."""
    frames = sum(lengths)
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    start = 0
    for length in lengths:
        end = start + length
        newest = range(max(0, end - (window - sinks)), end)
        for frame in range(start, end):
            mask[frame, [*range(min(sinks, end)), *newest]] = True
        start = end
    return mask


def run_cached(dit, latents, lengths, timestep, context, state):
    """Commit all chunks but the last, then predict the last one's flow."""
    state.follow(context)
    start = 0
    for index, length in enumerate(lengths):
        state.open_chunk(length, 0.0, "cpu")
        chunk = latents[:, :, start : start + length]
        if index == len(lengths) - 1:
            return predict(dit, chunk, torch.full((latents.shape[0],), timestep), state)
        commit(dit, chunk, torch.zeros(latents.shape[0]), state)
        start += length


@pytest.mark.parametrize(
    ("lengths", "window", "sinks"),
    [([3, 3, 3], 9, 0), ([1, 1, 1, 1], 4, 0), ([1, 3, 3, 2], 9, 0), ([3, 3, 3, 3], 6, 0), ([2, 2, 2, 2, 2], 5, 1)],
)
def test_cached_forward_equals_one_masked_pass(weights, lengths, window, sinks):
    dit = wan_from_state_dict(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(lengths))
    frames = sum(lengths)
    latents = torch.randn(1, 16, frames, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    context = torch.randn(1, 7, TEXT, generator=generator, dtype=torch.float64)
    flow = run_cached(dit, latents, lengths, 833.25, context, make_state(window, sinks, dtype=torch.float64))

    timesteps = torch.zeros(frames)
    timesteps[-lengths[-1] :] = 833.25
    mask = visible_mask(lengths, window, sinks)
    expected = naive_wan.naive_forward(weights, latents[0], timesteps, context[0], LAYERS, frame_mask=mask)
    # float32 enters through the patch embedding and the sinusoid, as in ComfyUI.
    torch.testing.assert_close(flow[0], expected[:, -lengths[-1] :], rtol=0, atol=2e-4)
    assert expected.std() > 0.1


def test_per_frame_timesteps_equal_one_masked_pass(weights):
    dit = wan_from_state_dict(weights, dtype=torch.float64)
    latents, context = torch.randn(1, 16, 3, HEIGHT, WIDTH, dtype=torch.float64), torch.randn(1, 7, TEXT).double()
    timesteps = torch.tensor([[900.0, 500.0, 100.0]])
    state = make_state(3, dtype=torch.float64)
    state.follow(context)
    state.open_chunk(3, 0.0, "cpu")
    flow = predict(dit, latents, timesteps, state)
    everything = torch.ones(3, 3, dtype=torch.bool)
    expected = naive_wan.naive_forward(weights, latents[0], timesteps[0], context[0], LAYERS, frame_mask=everything)
    torch.testing.assert_close(flow[0], expected, rtol=0, atol=2e-4)


def test_batch_items_do_not_mix(weights):
    dit = wan_from_state_dict(weights)
    latents, context = torch.randn(2, 16, 6, HEIGHT, WIDTH), torch.randn(2, 7, TEXT)
    together = run_cached(dit, latents, [3, 3], 500.0, context, make_state(6, batch=2))
    for item in range(2):
        alone = run_cached(dit, latents[item : item + 1], [3, 3], 500.0, context[item : item + 1], make_state(6))
        torch.testing.assert_close(together[item : item + 1], alone, rtol=0, atol=1e-4)


def test_frame_indices_beyond_1024_work(weights):
    dit = wan_from_state_dict(weights)
    state = make_state(6)
    state.cache.skip(2000)
    latents, context = torch.randn(1, 16, 6, HEIGHT, WIDTH), torch.randn(1, 7, TEXT)
    late = run_cached(dit, latents, [3, 3], 500.0, context, state)
    early = run_cached(dit, latents, [3, 3], 500.0, context, make_state(6))
    # Attention depends on differences of frame indices only.
    torch.testing.assert_close(late, early, rtol=0, atol=1e-3)


def test_keys_of_a_prompt_are_computed_once_and_commits_skip_what_only_the_output_needs(weights):
    dit = wan_from_state_dict(weights)
    calls = []
    for name, module in (("prompt", dit.blocks[0].cross_attn.k), ("output", dit.blocks[-1].ffn)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    run_cached(dit, torch.randn(1, 16, 9, HEIGHT, WIDTH), [3, 3, 3], 500.0, torch.randn(1, 7, TEXT), make_state(9))
    assert calls == ["prompt", "output"]  # the output is of the denoising pass alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("lengths", "width"), [((1, 1), 64), ((61, 7), 64), ((62, 0), 128), ((300, 2), 320)])
def test_a_few_text_slots_stand_for_the_padding(lengths, width, dtype):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.zeros(2, 512, 8)
    for row, length in zip(embeds, lengths, strict=True):
        row[:length] = torch.randn(length, 8, generator=generator)
    q = torch.randn(2, 5, 1, 8, generator=generator, dtype=torch.float64)
    k = torch.einsum("blc,cd->bld", embeds.double() + 0.3, torch.randn(8, 8, generator=generator).double())[:, :, None]
    v = torch.sin(3 * k)
    bias = padding_bias(embeds, dtype)
    assert bias.dtype == dtype
    assert bias.shape == (1, width)
    few = sdpa(q, k[:, :width], v[:, :width], bias.double())
    torch.testing.assert_close(few, sdpa(q, k, v), atol=0, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "length"), [(512, 500), (64, 3), (512, 512)])
def test_a_prompt_with_little_padding_uses_all_slots(tokens, length):
    embeds = torch.randn(1, tokens, 8)
    embeds[:, length:] = 0.5
    assert padding_bias(embeds, torch.bfloat16) is None


def test_a_pass_over_few_text_slots_equals_one_over_all(weights, monkeypatch):
    dit, asked = wan_from_state_dict(weights), []
    context = torch.zeros(1, 200, TEXT)
    context[:, :9] = torch.randn(1, 9, TEXT)
    latents, state = torch.randn(1, 16, 2, HEIGHT, WIDTH), make_state(2)
    expected = run_cached(dit, latents, [2], 700.0, context, state)

    def choose(work, facts, device, names, run, **named):
        asked.append((work.format(*facts), named["incumbent"]))
        return FEW_SLOTS

    monkeypatch.setattr(machine, "choose", choose)
    state.text.bias = padding_bias(context, torch.float32)
    actual = predict(dit, latents, torch.tensor([700.0]), state)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(actual, expected)
    title = "attention of 12 queries to 200 text slots, 1×2 heads of 128, 64 in use, in torch.float32"
    assert asked == [(title, "all slots")] * LAYERS


def test_wrong_frames_and_sizes_and_passes_without_a_chunk_or_a_prompt_are_named(weights):
    dit, state = wan_from_state_dict(weights), make_state(6)
    x = torch.randn(1, 16, 3, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="the open chunk has 0; open_chunk"):
        predict(dit, x, torch.zeros(1), state)
    state.open_chunk(3, 0.0, "cpu")
    with pytest.raises(RuntimeError, match="no prompt is set; call follow"):
        predict(dit, x, torch.zeros(1), state)
    with pytest.raises(ValueError, match="2 latent frames, the open chunk has 3"):
        predict(dit, torch.randn(1, 16, 2, HEIGHT, WIDTH), torch.zeros(1), state)
    with pytest.raises(ValueError, match="8×6 are not 6 tokens"):
        commit(dit, torch.randn(1, 16, 3, 8, WIDTH), torch.zeros(1), state)


def test_state_dicts_that_do_not_fit_are_named(weights):
    broken = dict(weights)
    del broken["blocks.1.ffn.0.bias"]
    with pytest.raises(ValueError, match=r"Missing key.*blocks\.1\.ffn\.0\.bias"):
        wan_from_state_dict(broken)
    with pytest.raises(ValueError, match=r"Unexpected key.*img_emb\.proj\.0\.bias"):
        wan_from_state_dict({**weights, "img_emb.proj.0.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"patch_embedding\.weight is missing"):
        wan_from_state_dict({})
