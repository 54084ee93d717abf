"""The demo model: captions and files, and their errors."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightforcing.lightforcing_core.demo.captions import (
    COLOURS,
    VOCABULARY,
    Scene,
    Thing,
    parse,
)
from lightforcing.lightforcing_core.demo.model import DEFAULT_CAPTION, DIT, TEXT, load_demo_model

from ...support.tiny_demo import TEXT_DIM, TINY_VIDEO, write_tiny_demo


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("on a plain background a red cube moves right slowly", "'cube'; use circle"),
        ("a red circle moves right slowly", "word 1 of the caption is 'a'"),
        ("on a plain background a red circle moves right", "'the end'; use slowly"),
        ("on a plain background a red circle moves up slowly and a red square moves up slowly", "two things are red"),
        (f"on a plain background{' and a {} circle moves up slowly' * 3}".format(*COLOURS)[4:], "word 1"),
    ],
)
def test_captions_outside_the_grammar_are_refused(caption, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(caption)


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("on a striped background a red circle moves up slowly", "on a striped one; write plain"),
        (f"{DEFAULT_CAPTION} and a blue circle moves up slowly", "two; leave one out"),
    ],
)
def test_only_what_a_model_was_trained_to_draw_is_taken(caption, found):
    with pytest.raises(ValueError, match=f"this model draws one thing on a plain background, not {found}"):
        TINY_VIDEO.check(caption)
    replace(TINY_VIDEO, level="full").check(caption)
    TINY_VIDEO.check(DEFAULT_CAPTION)


def test_capitals_and_punctuation_do_not_matter():
    scene = Scene("plain", (Thing("orange", "circle", "down-left", "slowly"),))
    assert parse("On a plain background, an Orange circle moves down-left slowly.") == scene


def test_files_load_as_a_model_in_float32(tmp_path):
    write_tiny_demo(tmp_path)
    model = load_demo_model(tmp_path)
    assert model.video == TINY_VIDEO
    assert model.video.latent_frames == 9
    assert {p.dtype for p in model.dit.parameters()} == {torch.float32}
    assert model.dit.text_embedding[0].in_features == model.table["words"].shape[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("words", "has no embeddings for these captions"),
        ("rows", "has no embeddings for these captions"),
        ("bytes", "cannot be read"),
        ("file", f"has no demo model: {TEXT} is missing"),
        ("description", "export it again"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, spoil, message):
    write_tiny_demo(tmp_path)
    path, table = tmp_path / TEXT, load_file(tmp_path / TEXT)
    words = [*VOCABULARY[:-1], "foggy"] if spoil == "words" else VOCABULARY
    if spoil == "rows":
        del table["slots"]
    save_file(table, path, metadata={"vocabulary": json.dumps(words)})
    if spoil == "bytes":
        path.write_bytes(path.read_bytes()[:100])
    if spoil == "file":
        path.unlink()
    if spoil == "description":
        config = {"config": json.dumps({"transformer": {"text_dim": TEXT_DIM}})}
        save_file(load_file(tmp_path / DIT), tmp_path / DIT, metadata=config)
    with pytest.raises(ValueError, match=message):
        load_demo_model(tmp_path)
