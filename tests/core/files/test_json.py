"""JSON from outside is read within limits, and anything beyond them is one kind of error."""

import os

import pytest

from lightforcing.lightforcing_core.files.json import MOST_DEPTH, MOST_TEXT, read_json, read_text, regular_size


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"b": [], "a":', "}]")])
def test_deep_nesting_is_refused_whatever_the_interpreter_could_parse(opening, closing):
    for depth in (MOST_DEPTH + 1, 900, 2000, 200_000):
        with pytest.raises(ValueError, match="nested deeper than 100 levels"):
            read_json(opening * depth + "1" + closing * depth)
    assert len(str(read_json("[" * MOST_DEPTH + "]" * MOST_DEPTH))) == 2 * MOST_DEPTH


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9" * 5000, "5000 digits"),
        ("-" + "9" * 301, "302 digits"),
        ('{"a": ' + "1" * 400 + "}", "400 digits"),
        (b"\xff\xfe\x00", "decode"),
        ("", "Expecting value"),
        ("[1,]", "Expecting value|Illegal trailing comma"),
    ],
)
def test_other_text_is_an_error(text, reason):
    with pytest.raises(ValueError, match=reason):
        read_json(text)


def test_whole_64_bit_numbers_survive():
    assert read_json(f"[{2**64 - 1}, {-(2**63)}, 0.1]") == [2**64 - 1, -(2**63), 0.1]


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MOST_TEXT + 1)
    refused = {"pipe": "a pipe or device", "": "a folder", "dangling": "No such file", "x" * 260: "File name too long"}
    for name, reason in {**refused, "a\0": "null byte", "large": "larger than 100 MB"}.items():
        with pytest.raises(OSError, match=reason):
            read_text(tmp_path / name)
    (tmp_path / "text").write_text("\ufeffä", encoding="utf-8")
    assert read_text(tmp_path / "text") == "ä"
    assert regular_size(tmp_path / "text") == 5
