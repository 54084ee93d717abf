"""The jobs of a batch: workflows, prompt files, seeds and overrides."""

import json
from pathlib import Path

import pytest

from lightforcing.cli.queue.jobs import make_jobs, read_prompts, read_seeds, text_input
from lightforcing.cli.queue.prompt import Override, UsageError, apply_overrides, read_override, read_workflow

from ...support.queue_samples import GRAPH, OBJECT_INFO

WHOLE = {"text": "x", "name": "dog", "seed": 3, "set": {"3.cfg": 2}}
QUICKSTART = Path(__file__).resolve().parents[3] / "workflows" / "api" / "light_forcing_1_quickstart.json"


def set_inputs(*texts, graph=GRAPH):
    return apply_overrides(graph, OBJECT_INFO, [read_override(text) for text in texts])


def encoder(text="x"):
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text}}


def sampler(**inputs):
    return {"class_type": "Sampler", "inputs": {name: [node, 0] for name, node in inputs.items()}}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("3.seed=7", "seed", 7),
        ("My sampler.seed=7", "seed", 7),
        ("2.text=a cat", "text", "a cat"),
        ("2.text=a=b", "text", "a=b"),
        ('2.text="7"', "text", "7"),
        ("2.text=", "text", ""),
        ("2.text=1e5", "text", "1e5"),  # a text stays as typed
        ("4.prefix=[1, 2]", "prefix", "[1, 2]"),
        ("3.block=64", "block", "64"),  # a choice of digits, not a number
        ("3.tail=False", "tail", False),  # which a server would take for true
        ("3.tail=1", "tail", True),
        ("3.cfg=1.5", "cfg", 1.5),  # declared, though the workflow leaves it out
        ("2.clip=text", "clip", "text"),  # loses its wire
        ("2.clip=[1, 2]", "clip", {"__value__": [1, 2]}),
    ],
)
def test_override_sets_one_input(text, name, value):
    changed = set_inputs(text)
    node = "3" if text.startswith("My") else text[0]
    assert changed[node]["inputs"][name] == value
    assert type(changed[node]["inputs"][name]) is type(value)
    changed[node]["inputs"] = GRAPH[node]["inputs"]
    assert changed == GRAPH


def test_titles_may_have_dots():
    graph = {"1": {"class_type": "A", "inputs": {"x": 1, "b.x": 2}, "_meta": {"title": "v1.5 a.b"}}}
    assert set_inputs("v1.5 a.b.x=3", graph=graph)["1"]["inputs"] == {"x": 3, "b.x": 2}
    assert set_inputs("1.b.x=3", graph=graph)["1"]["inputs"] == {"x": 1, "b.x": 3}


@pytest.mark.parametrize("order", [1, -1])
def test_key_of_a_dynamic_combo_brings_and_removes_what_is_below_it(order):
    grown = set_inputs(*["3.mode=growth", "3.mode.target=0.9", "3.mode.note=7"][::order])
    below = {"mode.target": 0.9, "mode.curve": "linear", "mode.note": "7"}
    assert grown["3"]["inputs"] == {"positive": ["2", 0], "seed": 5, "mode": "growth", **below}
    assert set_inputs("3.mode=growth", graph=grown) == grown
    assert set_inputs("3.mode=plain", graph=grown) == GRAPH


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3.seed", "--set 3.seed: no '=' in it; write NODE.INPUT=VALUE"),
        ("3=7", "'3' names a node but no input; write 3.INPUT"),
        ("9.seed=7", 'no node is called \'9\'; the workflow has 1 "Load CLIP", 2 "Prompt"'),
        ("3.mode.target=1", "My sampler (node 3) has no input 'mode.target'"),
        ("3.mode=other", "My sampler: mode: 'other' is not a choice; use one of plain, growth"),
        ("3.mode=[1]", "My sampler: mode: [1] is not a choice"),
        ("3.tail=no", "My sampler: tail: 'no' is neither true nor false"),
    ],
)
def test_override_that_fits_nothing_says_what_there_is(text, message):
    with pytest.raises(UsageError) as caught:
        set_inputs(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.txt", "\ufeff# animals\na dog\n\n   # and\n  a {red} cat # 2 \n", ["a dog", "a {red} cat # 2"]),
        ("a.txt", "a dog\u2028in the rain\r\na cat\x0b", ["a dog\u2028in the rain", "a cat"]),
        ("b.jsonl", '# comment\n{"text": "x", "name": "dog", "seed": 3, "set": {"3.cfg": 2}}', [WHOLE]),
    ],
)
def test_prompt_file_has_a_prompt_per_line(tmp_path, name, content, lines):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == [{"text": line} if isinstance(line, str) else line for line in lines]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"# nothing\n\n", "holds no prompt; write one per line"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}', "line 2: 'txt' may not be 1; use text or name"),
        ("a.jsonl", b'{"seed": "1"}', "line 1: 'seed' may not be '1'"),
        ("a.jsonl", b'{"seed": true}', "line 1: 'seed' may not be True"),
        ("a.jsonl", b"a dog", "line 1: Expecting value"),
        ("a.txt", "a dog".encode("utf-16"), "as UTF-8 text"),
    ],
)
def test_prompt_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "0-999999999"])
def test_other_seeds_are_refused(text):
    with pytest.raises(UsageError, match="is no seed and no range; write them like 1,2,5-8"):
        read_seeds(text)


def test_text_goes_to_the_encoder_that_feeds_positive():
    """Also through a node that passes both conditionings on, whose own inputs are positive and negative."""
    graph = {"1": encoder(), "2": encoder(), "4": sampler(positive="1", negative="2"), "5": sampler(positive="4")}
    assert text_input(graph) == "1.text"
    assert text_input(graph, "2") == "2.text"
    assert text_input(graph, "4.note") == "4.note"


def test_text_goes_to_the_caption_of_the_quickstart():
    graph = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    (node,) = [one for one in graph if graph[one]["class_type"] == "LightForcingDemoPrompt"]
    assert text_input(graph) == text_input(graph, node) == f"{node}.caption"
    (job,) = make_jobs(graph, {}, lines=[{"text": "on a striped background a blue square moves up quickly"}])
    assert job.prompt[node]["inputs"] == {"caption": "on a striped background a blue square moves up quickly"}


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        (
            {"1": encoder(), "2": encoder(), "3": sampler(positive="1"), "4": sampler(positive="2")},
            "1 (CLIPTextEncode), 2",
        ),
        ({"4": sampler(positive="9")}, "no CLIPTextEncode or LightForcingDemoPrompt; say with --prompt-node"),
    ],
)
def test_no_or_several_prompt_nodes_ask_for_the_node(graph, found):
    with pytest.raises(UsageError) as caught:
        text_input(graph)
    assert f"positive inputs are linked to {found}" in str(caught.value)


def test_each_line_and_seed_is_a_job():
    lines = [{"text": "a dog"}, {"text": "a cat", "name": "cat", "set": {"3.cfg": 2.0}}]
    jobs = make_jobs(GRAPH, OBJECT_INFO, lines=lines, seeds=[1, 2], overrides=[Override("3.cfg", 1.0)])
    inputs = [(job.prompt["2"]["inputs"], job.prompt["3"]["inputs"]) for job in jobs]
    found = [
        (job.name, two["text"], three["seed"], three["cfg"]) for job, (two, three) in zip(jobs, inputs, strict=True)
    ]
    assert found == [
        ("0001-seed1", "a dog", 1, 1.0),
        ("0001-seed2", "a dog", 2, 1.0),
        ("cat-seed1", "a cat", 1, 2.0),
        ("cat-seed2", "a cat", 2, 2.0),
    ]
    assert GRAPH["2"]["inputs"]["text"] == "a dog"
    assert GRAPH["3"]["inputs"] == {"positive": ["2", 0], "seed": 5, "mode": "plain"}


@pytest.mark.parametrize(
    ("lines", "seeds", "message"),
    [
        ([{"name": "a"}, {"name": "A"}], None, "two prompts are called 'A'"),
        ([{"name": "../a"}], None, "'../a' cannot be a folder's name"),
        ([{"name": "a."}], None, "cannot be a folder's name"),
        ([{"name": "Con.txt"}], None, "cannot be a folder's name"),
        ([{"text": "x"}], [1, 1], "two prompts are called '0001-seed1'"),
        ([{"seed": 1}], [1], "0001 has a seed of its own; leave out --seeds"),
    ],
)
def test_names_and_seeds_that_clash_are_refused(lines, seeds, message):
    with pytest.raises(UsageError) as caught:
        make_jobs(GRAPH, OBJECT_INFO, lines=lines, seeds=seeds)
    assert message in str(caught.value)


@pytest.mark.parametrize("document", [GRAPH, {"prompt": GRAPH}])
def test_workflow_is_read_from_the_api_form_and_its_envelope(tmp_path, document):
    (tmp_path / "w.json").write_text("\ufeff" + json.dumps(document), encoding="utf-8")
    assert read_workflow(tmp_path / "w.json") == GRAPH


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "is no ComfyUI workflow"),
        ('{"1": {"class_type": 7}}', "is no ComfyUI workflow"),
        ('{"nodes": [{"id": 1}], "links": []}', r"choose File → Export Workflow \(API\), and queue that file"),
        (None, r"cannot read .*w\.json: No such file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "w.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_workflow(tmp_path / "w.json")
