"""The family that a checkpoint's path suggests."""

import itertools

import pytest

from lightforcing.lightforcing_core.families import FAMILIES, family_of


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("self_forcing_dmd.pt", "self_forcing"),
        ("longlive/v1/model.pt", "longlive"),
        ("LongLive-1.3B/transformer/diffusion_pytorch_model.safetensors.index.json", "longlive"),
        ("chunkwise/causal_forcing.pt", "causal_forcing"),
        ("framewise/v2/causal_forcing.pt", "causal_forcing_framewise"),
        ("causal-forcing/framewise-2step.pt", "causal_forcing_2step"),
        ("longlive/self_forcing.pt", "self_forcing"),  # the file's own name first
        ("long_video_gen.pt", "light_forcing_long"),
        ("longlive/models/diffusion_models/wan.pt", "unknown"),  # above ComfyUI's folders no name counts
        ("longlive/a/b/c/model.pt", "unknown"),
        ("", "unknown"),
    ],
)
def test_file_name_decides_then_the_nearest_folders(path, family):
    assert family_of(path)[0].id == family


@pytest.mark.parametrize(
    ("words", "family"), [(("Self", "Forcing"), "self_forcing"), (("light", "forcing", "long"), "light_forcing_long")]
)
def test_separators_and_case_do_not_matter(words, family):
    for separator, name in itertools.product(("", " ", "-", "_", "."), (str.lower, str.upper, str)):
        assert family_of(f"models/{name(separator.join(words))}_ema.safetensors")[0].id == family


def test_every_hint_finds_its_family():
    for family in FAMILIES.values():
        for hint in family.name_hints:
            assert family_of(f"{hint}.pt") == (family, f"{hint}.pt")
