"""What steers a run on the canvas: prompts that change, guidance, seeds and sparsity of single chunks."""

import pytest

from ...support.graphs import OTHER_EMBEDS, change, custom_graph, empty, graph, latents_of, link, loader, schedule, text

FIRST = slice(0, 3)  # latent frames of the first chunk
REST = slice(3, None)


@pytest.fixture(scope="module")
def plain(server):
    return latents_of(server, graph({"model": loader()}))


def steered(server, nodes=(), **options):
    return latents_of(server, {**graph({"model": loader()}, **options), **dict(nodes)})


@pytest.mark.parametrize(
    ("options", "switch"),
    [
        ({"timeline": link("change")}, "hard"),
        ({"timeline": link("change")}, "soft"),
        ({"timeline": link("change")}, "cut"),
        ({"chunk_seeds": "1: 99"}, "hard"),
        ({"context_noise": 300.0}, "hard"),
    ],
)
def test_what_starts_later_leaves_the_first_chunk_alone(server, plain, options, switch):
    video = steered(server, {"other": text(OTHER_EMBEDS), "change": change(0.6, switch)}, **options)
    assert (video[:, :, FIRST] == plain[:, :, FIRST]).all()
    assert (video[:, :, REST] - plain[:, :, REST]).abs().max() > 0.01


def test_context_noise_reaches_the_custom_sampler(server):
    noisy, clean = (latents_of(server, custom_graph({"model": loader()}, context_noise=c)) for c in (300.0, 0.0))
    assert (noisy - clean).abs().max() > 0.01


def test_changes_chain_and_blend(server):
    """Three chunks: the other prompt blended in at the second, the first prompt back at the third."""
    plan = {"other": text(OTHER_EMBEDS), "one": change(0.6, "blend", 2), "two": change(1.4, "soft", 1, "text", "one")}
    video, chained = (
        latents_of(server, {**graph({"model": loader()}, latent=empty(33), timeline=link(end)), **plan})
        for end in ("one", "two")
    )
    assert (video[:, :, :6] == chained[:, :, :6]).all()
    assert (video[:, :, 6:] - chained[:, :, 6:]).abs().max() > 0.01


def test_guidance_of_one_is_none(server, plain):
    negative = {"other": text(OTHER_EMBEDS)}
    assert (steered(server, negative, negative=link("other"), cfg=1.0) == plain).all()
    assert (steered(server, negative, negative=link("other"), cfg=3.0) - plain).abs().max() > 0.05


def test_sparsity_of_one_chunk_can_be_given(server):
    def video(**inputs):
        return steered(server, {"plan": schedule(**inputs)}, schedule=link("plan"))

    sparse, dense = video(target=0.6), video(target=0.0)
    assert (video(target=0.6, sparsity="1: 0") == dense).all()
    assert (sparse[:, :, REST] - dense[:, :, REST]).abs().max() > 1e-4
