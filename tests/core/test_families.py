"""The family that a checkpoint's path suggests."""

from pathlib import Path

import pytest

from lightforcing.lightforcing_core.families import FAMILIES, doubt_of, family_of


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("LongLive-1.3B/transformer/diffusion_pytorch_model.safetensors.index.json", "longlive"),
        ("framewise/v2/causal_forcing.pt", "causal_forcing_framewise"),
        ("causal-forcing/framewise-2step.pt", "causal_forcing_2step"),
        ("longlive/self_forcing.pt", "self_forcing"),  # the file's own name first
        ("long_video_gen.pt", "light_forcing_long"),
        ("longlive/models/diffusion_models/wan.pt", "unknown"),  # above ComfyUI's folders no name counts
        ("longlive/a/b/c/model.pt", "unknown"),
        ("longlive_20s.pt", "longlive"),
        ("LongLive2.0-5B.pt", "unknown"),  # another base, Wan 2.2 TI2V 5B
        ("longlive_v2_te.pt", "unknown"),
        ("LongLive-2/model.pt", "unknown"),
        ("longlive2.safetensors", "unknown"),
        ("longlive-2-step.pt", "longlive"),
        ("Longlive-2B.pt", "longlive"),
        ("Causal-Forcing/chunkwise/longvideo.pt", "rolling_forcing"),
        ("CausalForcing-Long-Wan2.1-T2V-1.3B-Diffusers/transformer", "rolling_forcing"),
        ("WaveForcing-1.3B/4step/model.safetensors", "wave_forcing_4step"),
        ("WaveForcing-1.3B/5step/model.safetensors", "wave_forcing_5step"),
        ("waveforcing_4step.safetensors", "wave_forcing_4step"),
        ("4step/model.safetensors", "unknown"),
        ("", "unknown"),
    ],
)
def test_file_name_decides_then_the_nearest_folders(path, family):
    assert family_of(path)[0].id == family


def test_separators_and_case_do_not_matter():
    for name in ("lightforcinglong", "light forcing-long", "LIGHT_FORCING.LONG", "Light-Forcing Long"):
        assert family_of(f"models/{name}_ema.safetensors")[0].id == "light_forcing_long"


def test_every_hint_finds_its_family():
    for family in FAMILIES.values():
        for hint in family.name_hints:
            assert family_of(f"{hint}.pt") == (family, f"{hint}.pt")


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("causal_forcing.pt", "chunkwise or framewise"),
        ("models/diffusion_models/framewise/diffusion_models/causal_forcing.pt", "chunkwise or framewise"),
        ("chunkwise/causal_forcing.pt", None),
        ("framewise/causal_forcing.pt", None),
        ("causal_forcing_chunkwise_fp8.safetensors", None),
        ("WaveForcing-1.3B.safetensors", "5step or 4step"),
        ("self_forcing_dmd.pt", None),
    ],
)
def test_a_file_name_that_two_families_share_leaves_a_doubt(path, named):
    doubt = doubt_of(path, family_of(path)[0])
    assert doubt is None if named is None else named in doubt


def test_the_documented_table_is_that_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    for it in FAMILIES.values():
        sinks = f", sinks {it.sink_frames}, {it.sink_rope}" if it.sink_frames else ""
        steps = ", ".join(map(str, it.denoising_steps))
        row = next(line.split(" | ") for line in page.splitlines() if line.startswith(f"| `{it.id}` |"))
        assert (int(row[2]), row[3].split(" (")[0]) == (it.frames_per_chunk, steps)
        assert row[4] == (f"{it.window}{sinks}" if it.window else "all")
        assert it.shift == 5.0
        assert row[5] == {"generator": "plain |", "generator_ema": "EMA |"}[it.weights]
