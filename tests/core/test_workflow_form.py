"""A saved canvas becomes exactly what a server runs."""

import json

import pytest

from lightforcing.lightforcing_core.workflow_form import WorkflowError, read_workflow, ui_to_api

OBJECT_INFO = {
    "Load": {"input": {"required": {"name": [["a.safetensors", "b.safetensors"]]}}, "display_name": "Load Model"},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "mode": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "plain", "inputs": {"required": {}}},
                            {
                                "key": "growth",
                                "inputs": {
                                    "required": {"target": ["FLOAT", {"default": 0.6}]},
                                    "optional": {"guide": ["IMAGE", {}]},
                                },
                            },
                        ]
                    },
                ],
            },
            "optional": {"cfg": ["FLOAT", {"default": 1.0}], "strength": ["FLOAT", {"forceInput": True}]},
        }
    },
    "Pick": {"input": {"required": {"image": [["x.png"], {"image_upload": True}]}, "optional": {"scale": ["FLOAT"]}}},
    "Filter": {"input": {"required": {"model": ["MODEL"], "amount": ["FLOAT", {"default": 0.5}]}}},
    "Save": {"input": {"required": {"images": ["IMAGE"], "prefix": ["STRING", {"default": "out"}]}}},
}


def node(node_id, kind, values=None, inputs=(), outputs=(), **extra):
    return {
        "id": node_id,
        "type": kind,
        "mode": 0,
        "inputs": [
            {"name": name, "type": slot_type, "link": link} | ({"widget": {"name": name}} if widget else {})
            for name, slot_type, link, widget in inputs
        ],
        "outputs": [{"name": slot_type, "type": slot_type, "links": links} for slot_type, links in outputs],
        "widgets_values": values,
        **extra,
    }


def canvas(nodes, links):
    return {"nodes": nodes, "links": links, "version": 0.4}


LOAD = node(1, "Load", ["b.safetensors"], outputs=[("MODEL", [1])])
SAMPLE_VALUES = [42, "randomize", 4, "growth", 0.88, 1.5]


def sample(link=1, **extra):
    return node(2, "Sample", SAMPLE_VALUES, inputs=[("model", "MODEL", link, False)], **extra)


def test_values_are_named_by_position():
    prompt = ui_to_api(canvas([LOAD, sample(title="My sampler")], [[1, 1, 0, 2, 0, "MODEL"]]), OBJECT_INFO)
    assert prompt == {
        "1": {"class_type": "Load", "inputs": {"name": "b.safetensors"}, "_meta": {"title": "Load Model"}},
        "2": {
            "class_type": "Sample",
            "inputs": {
                "model": ["1", 0],
                "seed": 42,
                "steps": 4,
                "mode": "growth",
                "mode.target": 0.88,
                "cfg": 1.5,
            },
            "_meta": {"title": "My sampler"},
        },
    }


def test_links_may_be_mappings():
    link = {"id": 1, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"}
    assert ui_to_api(canvas([LOAD, sample()], [link]), OBJECT_INFO)["2"]["inputs"]["model"] == ["1", 0]


def test_other_choice_has_no_nested_values():
    other = node(2, "Sample", [42, "fixed", 4, "plain", 1.5])
    inputs = ui_to_api(canvas([other], []), OBJECT_INFO)["2"]["inputs"]
    assert inputs == {"seed": 42, "steps": 4, "mode": "plain", "cfg": 1.5}


def test_values_may_be_saved_by_name():
    named = node(2, "Sample", {"seed": 7, "steps": 3, "mode": "plain", "cfg": 2.0})
    inputs = ui_to_api(canvas([named], []), OBJECT_INFO)["2"]["inputs"]
    assert inputs == {"seed": 7, "steps": 3, "mode": "plain", "cfg": 2.0}


def test_file_older_than_a_widget_gets_its_default():
    old = node(2, "Sample", [42, "fixed", 4])
    inputs = ui_to_api(canvas([old], []), OBJECT_INFO)["2"]["inputs"]
    assert inputs == {"seed": 42, "steps": 4, "mode": "plain", "cfg": 1.0}


def test_seed_saved_without_its_control_widget():
    plain = node(2, "Sample", [42, 4, "plain", 1.5])
    assert ui_to_api(canvas([plain], []), OBJECT_INFO)["2"]["inputs"]["steps"] == 4


def test_upload_button_takes_no_input():
    inputs = ui_to_api(canvas([node(5, "Pick", ["x.png", "image", 2.5])], []), OBJECT_INFO)["5"]["inputs"]
    assert inputs == {"image": "x.png", "scale": 2.5}


def test_wire_into_a_widget_wins_over_its_value():
    wired = node(6, "Filter", [0.5], inputs=[("model", "MODEL", 1, False), ("amount", "FLOAT", 2, True)])
    source = node(7, "Sample", SAMPLE_VALUES, outputs=[("FLOAT", [2])])
    prompt = ui_to_api(canvas([LOAD, wired, source], [[1, 1, 0, 6, 0, "MODEL"], [2, 7, 0, 6, 1, "FLOAT"]]), OBJECT_INFO)
    assert prompt["6"]["inputs"]["amount"] == ["7", 0]


def test_primitive_gives_its_value():
    primitive = node(8, "PrimitiveNode", [0.25, "fixed"], outputs=[("FLOAT", [2])])
    wired = node(6, "Filter", [0.5], inputs=[("amount", "FLOAT", 2, True)])
    prompt = ui_to_api(canvas([primitive, wired], [[2, 8, 0, 6, 0, "FLOAT"]]), OBJECT_INFO)
    assert prompt == {"6": {"class_type": "Filter", "inputs": {"amount": 0.25}, "_meta": {"title": "Filter"}}}


def test_reroutes_are_followed_and_notes_left_out():
    reroutes = [
        node(10, "Reroute", inputs=[("", "*", 1, False)], outputs=[("*", [2])]),
        node(11, "Reroute", inputs=[("", "*", 2, False)], outputs=[("*", [3])]),
        node(12, "Note", ["words"]),
        node(13, "MarkdownNote", ["words"]),
        node(14, "Some pack's label"),
    ]
    links = [[1, 1, 0, 10, 0, "*"], [2, 10, 0, 11, 0, "*"], [3, 11, 0, 2, 0, "MODEL"]]
    prompt = ui_to_api(canvas([LOAD, *reroutes, sample(link=3)], links), OBJECT_INFO)
    assert set(prompt) == {"1", "2"}
    assert prompt["2"]["inputs"]["model"] == ["1", 0]


@pytest.mark.parametrize("mode", [2, 4])
def test_inactive_node_leaves_the_prompt(mode):
    inactive = node(3, "Filter", [0.5], inputs=[("model", "MODEL", 1, False)], outputs=[("MODEL", [2])]) | {
        "mode": mode
    }
    links = [[1, 1, 0, 3, 0, "MODEL"], [2, 3, 0, 2, 0, "MODEL"]]
    prompt = ui_to_api(canvas([LOAD, inactive, sample(link=2)], links), OBJECT_INFO)
    assert set(prompt) == {"1", "2"}
    # Bypassed: the wire passes through. Muted: it is cut.
    assert prompt["2"]["inputs"].get("model") == (["1", 0] if mode == 4 else None)


def test_bypass_passes_the_input_of_the_same_type():
    two = node(
        3,
        "Filter",
        [0.5],
        inputs=[("clip", "CLIP", 5, False), ("model", "MODEL", 1, False)],
        outputs=[("MODEL", [2])],
        mode=4,
    )
    links = [[1, 1, 0, 3, 1, "MODEL"], [5, 9, 0, 3, 0, "CLIP"], [2, 3, 0, 2, 0, "MODEL"]]
    prompt = ui_to_api(canvas([LOAD, two, sample(link=2)], links), OBJECT_INFO)
    assert prompt["2"]["inputs"]["model"] == ["1", 0]


def test_list_value_is_not_taken_for_a_link():
    listed = node(6, "Filter", [["a", "b"]])
    assert ui_to_api(canvas([listed], []), OBJECT_INFO)["6"]["inputs"]["amount"] == {"__value__": ["a", "b"]}


def test_unknown_nodes_are_named_together():
    unknown = [node(20, "FancyNode", outputs=[("MODEL", [1])], title="Fancy"), node(21, "Other", outputs=[("X", [3])])]
    with pytest.raises(WorkflowError, match=r"Fancy \(type FancyNode\), Other \(type Other\); install the pack"):
        ui_to_api(canvas([*unknown, sample()], [[1, 20, 0, 2, 0, "MODEL"]]), OBJECT_INFO)


def test_subgraph_is_refused_by_name():
    document = canvas([node(1, "0b1c-uuid", title="My group")], [])
    document["definitions"] = {"subgraphs": [{"id": "0b1c-uuid", "nodes": [], "links": []}]}
    with pytest.raises(WorkflowError, match="My group: subgraphs exist on the canvas only; unpack it"):
        ui_to_api(document, OBJECT_INFO)


def test_unknown_choice_lists_the_known_ones():
    with pytest.raises(WorkflowError, match="Sample: mode: 'spiral' is not a choice; use one of plain, growth"):
        ui_to_api(canvas([node(2, "Sample", [1, "fixed", 4, "spiral"])], []), OBJECT_INFO)


def test_nothing_left_to_run_is_an_error():
    with pytest.raises(WorkflowError, match="nothing to run"):
        ui_to_api(canvas([LOAD | {"mode": 2}], []), OBJECT_INFO)


def test_files_are_told_apart(tmp_path):
    api = {"1": {"class_type": "Load", "inputs": {}}}
    for name, document, expected in (
        ("ui.json", canvas([LOAD], []), (canvas([LOAD], []), True)),
        ("api.json", api, (api, False)),
        ("envelope.json", {"prompt": api}, (api, False)),
    ):
        (tmp_path / name).write_text(json.dumps(document))
        assert read_workflow(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("{}", "neither a ComfyUI workflow"), ("[1]", "neither a ComfyUI workflow")],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(WorkflowError, match=message):
        read_workflow(tmp_path / "w.json")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(WorkflowError, match=r"cannot read .*gone\.json: No such file"):
        read_workflow(tmp_path / "gone.json")
