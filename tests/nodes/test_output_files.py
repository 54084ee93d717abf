"""Links, pipes and folders in the output folder: lists hold what can be loaded, names act as in ComfyUI."""

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("output_files")


def test_the_list_of_states_holds_what_can_be_read(facts):
    assert facts["listed"] == ["linked/two.safetensors", "one.safetensors"]
    assert facts["options"] == facts["listed"]


def test_a_state_outside_the_folder_or_of_another_kind_is_refused(facts):
    assert all("choose one from the list" in message for message in facts["outside"])
    assert "a pipe or device, not a file" in facts["pipe"]
    assert "No such file" in facts["dangling"]


def test_a_state_is_named_inside_its_folder(facts):
    assert facts["named"] == ["run", "b/run.v2", "linked.in/run"]
    assert all("is not a file name inside" in message for message in facts["bad names"])


@pytest.mark.parametrize(
    ("name", "subfolder"),
    [
        ("outside", "outside"),
        ("inside", "inside"),
        ("plain", "plain"),
        ("../output/back", "back"),
        ("/output/absolute", "absolute"),
    ],
)
def test_a_linked_subfolder_takes_a_video_if_it_does_in_core(facts, name, subfolder):
    allowed, shown = facts["as in core"][name]
    if allowed:
        assert shown["subfolder"] == subfolder
    else:
        assert "outside the output folder" in shown


def test_a_failed_run_leaves_no_folder(facts):
    assert not facts["left of a failed run"]
