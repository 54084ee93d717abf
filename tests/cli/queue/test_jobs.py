"""The jobs of a batch: workflows, prompt files, seeds and overrides."""

import json
from pathlib import Path

import pytest

from lightforcing.cli.queue.jobs import Line, make_jobs, read_prompts, read_seeds, text_input
from lightforcing.cli.queue.prompt import Override, UsageError, apply_overrides, read_override, read_workflow

from ...support.queue_samples import GRAPH, OBJECT_INFO


def set_inputs(*texts, graph=GRAPH):
    return apply_overrides(graph, OBJECT_INFO, [read_override(graph, OBJECT_INFO, text) for text in texts])


def encoder(text="x"):
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text}}


@pytest.mark.parametrize(
    ("text", "node", "name", "value"),
    [
        ("3.seed=7", "3", "seed", 7),
        ("My sampler.seed=7", "3", "seed", 7),
        ("2.text=a cat", "2", "text", "a cat"),
        ("2.text=a=b", "2", "text", "a=b"),
        ('2.text="7"', "2", "text", "7"),
        ("2.text=", "2", "text", ""),
        ("2.text=1e5", "2", "text", "1e5"),  # a text stays as typed
        ("2.text=true", "2", "text", "true"),
        ("2.text=[a, b]", "2", "text", "[a, b]"),
        ("4.prefix=[1, 2]", "4", "prefix", "[1, 2]"),
        ("3.block=64", "3", "block", "64"),  # a choice of digits, not a number
        ("3.tail=False", "3", "tail", False),  # which a server would take for true
        ("3.tail=1", "3", "tail", True),
        ("3.cfg=NaN", "3", "cfg", "NaN"),
        ("3.cfg=1.5", "3", "cfg", 1.5),  # declared, though the workflow leaves it out
        ("2.clip=text", "2", "clip", "text"),  # loses its wire
        ("2.clip=null", "2", "clip", None),
        ("2.clip=[1, 2]", "2", "clip", {"__value__": [1, 2]}),
    ],
)
def test_override_sets_one_input(text, node, name, value):
    changed = set_inputs(text)
    assert changed[node]["inputs"][name] == value
    assert type(changed[node]["inputs"][name]) is type(value)
    changed[node]["inputs"] = GRAPH[node]["inputs"]
    assert changed == GRAPH


def test_last_override_of_an_input_counts():
    assert set_inputs("3.seed=1", "My sampler.seed=2")["3"]["inputs"]["seed"] == 2


def test_titles_may_have_dots():
    graph = {"1": {"class_type": "A", "inputs": {"x": 1, "b.x": 2}, "_meta": {"title": "v1.5 a.b"}}}
    assert set_inputs("v1.5 a.b.x=3", graph=graph)["1"]["inputs"] == {"x": 3, "b.x": 2}
    assert set_inputs("1.b.x=3", graph=graph)["1"]["inputs"] == {"x": 1, "b.x": 3}


@pytest.mark.parametrize("order", [1, -1])
def test_choosing_a_dynamic_combos_key_brings_what_is_below_it(order):
    texts = ["3.mode=growth", "3.mode.target=0.9", "3.mode.note=7"][::order]
    inputs = set_inputs(*texts)["3"]["inputs"]
    below = {"mode.target": 0.9, "mode.curve": "linear", "mode.note": "7"}
    assert inputs == {"positive": ["2", 0], "seed": 5, "mode": "growth", **below}


def test_leaving_a_dynamic_combos_key_removes_what_was_below_it():
    grown = set_inputs("3.mode=growth")
    assert set_inputs("3.mode=plain", graph=grown) == GRAPH


def test_setting_the_same_key_keeps_what_is_below_it():
    grown = set_inputs("3.mode=growth", "3.mode.target=0.9")
    assert set_inputs("3.mode=growth", graph=grown) == grown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3.seed", "--set 3.seed: no '=' in it; write NODE.INPUT=VALUE"),
        ("3=7", "'3' names a node but no input; write 3.INPUT"),
        ("9.seed=7", 'no node is called \'9\'; the workflow has 1 "Load CLIP", 2 "Prompt"'),
        ("3.seeds=7", "My sampler (node 3) has no input 'seeds'; it has block, cfg, mode, positive, seed, tail"),
        ("3.mode.target=1", "My sampler (node 3) has no input 'mode.target'"),
        ("3.mode=other", "My sampler: mode: 'other' is not a choice; use one of plain, growth"),
        ("3.tail=no", "--set 3.tail=no: 'no' is neither true nor false"),
    ],
)
def test_override_that_fits_nothing_says_what_there_is(text, message):
    with pytest.raises(UsageError) as caught:
        set_inputs(text)
    assert message in str(caught.value)


def test_title_of_two_nodes_asks_for_an_id():
    with pytest.raises(UsageError, match="2 nodes are called 'CLIPTextEncode'; use an id: 1, 2"):
        read_override({"1": encoder(), "2": encoder()}, OBJECT_INFO, "CLIPTextEncode.text=x")


def test_text_file_has_a_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# animals\na dog\n\n   # and\n  a {red} cat # 2 \n", encoding="utf-8")
    assert [line.text for line in read_prompts(path)] == ["a dog", "a {red} cat # 2"]


def test_jsonl_file_has_an_object_per_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('# comment\n{"text": "a dog", "name": "dog", "seed": 3}\n{"set": {"3.cfg": 2}}\n')
    assert read_prompts(path) == [Line("a dog", "dog", 3), Line(set={"3.cfg": 2})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "# nothing\n\n", "holds no prompt; write one per line"),
        ("a.jsonl", '{"text": "x"}\n{"txt": 1}', "line 2: 'txt' is not known; use text, name, seed, set"),
        ("a.jsonl", '{"seed": "1"}', "line 1: seed '1' is not a int"),
        ("a.jsonl", '{"seed": true}', "line 1: seed True is not a int"),
        ("a.jsonl", "a dog", "line 1: Expecting value"),
        ("a.jsonl", '["a dog"]', "line 1: not an object with any of text, name, seed, set"),
    ],
)
def test_prompt_file_that_cannot_be_read_names_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)


def test_prompt_may_hold_what_other_line_breaks_look_like(tmp_path):
    (tmp_path / "a.txt").write_text("a dog\u2028in the rain\r\na cat\x0b", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "a dog\u2028in the rain"}', encoding="utf-8")
    assert [line.text for line in read_prompts(tmp_path / "a.txt")] == ["a dog\u2028in the rain", "a cat"]
    assert [line.text for line in read_prompts(tmp_path / "b.jsonl")] == ["a dog\u2028in the rain"]


def test_prompt_file_of_another_encoding_says_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_text("a dog", encoding="utf-16")
    with pytest.raises(UsageError, match=r"is not UTF-8 .* save it as UTF-8 text"):
        read_prompts(tmp_path / "a.txt")


def test_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")


def test_seeds_are_numbers_and_ranges():
    assert read_seeds("1, 2,5-8") == [1, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "0-999999999"])
def test_other_seeds_are_refused(text):
    with pytest.raises(UsageError, match="is no seed and no range; write them like 1,2,5-8"):
        read_seeds(text)


def test_text_goes_to_the_encoder_that_feeds_positive():
    graph = {
        "1": encoder(),
        "2": encoder(),
        "3": {"class_type": "Combine", "inputs": {"conditioning": ["1", 0]}},
        "4": {"class_type": "ImageToVideo", "inputs": {"positive": ["3", 0], "negative": ["2", 0]}},
        "5": {"class_type": "Sampler", "inputs": {"positive": ["4", 0], "negative": ["4", 1]}},
        "6": encoder(),
    }
    assert text_input(graph) == ("1", "text")
    assert text_input(graph, "6") == ("6", "text")
    assert text_input(graph, "Combine.conditioning") == ("3", "conditioning")


def test_more_than_one_encoder_is_ambiguous():
    graph = {
        "1": encoder(),
        "2": encoder(),
        "3": {"class_type": "Timeline", "inputs": {"positive": ["1", 0]}},
        "4": {"class_type": "Sampler", "inputs": {"positive": ["2", 0], "timeline": ["3", 0]}},
    }
    with pytest.raises(UsageError, match=r"2 nodes feed positive inputs: .*; say with --prompt-node"):
        text_input(graph)


def test_text_goes_to_the_caption_of_the_quickstart():
    path = Path(__file__).resolve().parents[3] / "workflows" / "api" / "quickstart_demo.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    (node,) = [one for one in graph if graph[one]["class_type"] == "LightForcingDemoPrompt"]
    assert text_input(graph) == text_input(graph, node) == (node, "caption")
    caption = "on a striped background a blue square moves up quickly"
    (job,) = make_jobs(graph, {}, lines=[Line(caption)])
    assert job.prompt[node]["inputs"] == {"caption": caption}


def test_demo_prompt_beside_an_encoder_is_ambiguous():
    graph = {
        "1": {"class_type": "LightForcingDemoPrompt", "inputs": {"caption": "x"}, "_meta": {"title": "Shapes"}},
        "2": encoder(),
        "3": {"class_type": "Timeline", "inputs": {"positive": ["1", 0]}},
        "4": {"class_type": "Sampler", "inputs": {"positive": ["2", 0], "timeline": ["3", 0]}},
    }
    with pytest.raises(UsageError) as caught:
        text_input(graph)
    assert "2 nodes feed positive inputs: 1 (Shapes), 2 (CLIPTextEncode); say with --prompt-node" in str(caught.value)
    assert text_input(graph, "Shapes") == ("1", "caption")


def test_no_prompt_node_asks_for_the_node():
    said = "no CLIPTextEncode or LightForcingDemoPrompt feeds a positive input; say with --prompt-node"
    with pytest.raises(UsageError, match=said):
        text_input({"1": {"class_type": "Sampler", "inputs": {"positive": ["9", 0]}}})


def test_each_line_and_seed_is_a_job():
    lines = [Line("a dog"), Line("a cat", name="cat", set={"3.cfg": 2.0})]
    jobs = make_jobs(GRAPH, OBJECT_INFO, lines=lines, seeds=[1, 2], overrides=[Override("3", "cfg", 1.0)])
    found = [
        (
            job.name,
            job.prompt["2"]["inputs"]["text"],
            job.prompt["3"]["inputs"]["seed"],
            job.prompt["3"]["inputs"]["cfg"],
        )
        for job in jobs
    ]
    assert found == [
        ("0001-seed1", "a dog", 1, 1.0),
        ("0001-seed2", "a dog", 2, 1.0),
        ("cat-seed1", "a cat", 1, 2.0),
        ("cat-seed2", "a cat", 2, 2.0),
    ]
    assert GRAPH["2"]["inputs"]["text"] == "a dog"
    assert GRAPH["3"]["inputs"] == {"positive": ["2", 0], "seed": 5, "mode": "plain"}


def test_seed_stays_where_nothing_sets_it():
    assert [job.prompt["3"]["inputs"]["seed"] for job in make_jobs(GRAPH, {}, lines=[Line("x"), Line(seed=9)])] == [
        5,
        9,
    ]


@pytest.mark.parametrize(
    ("lines", "seeds", "message"),
    [
        ([Line("x", name="a"), Line("y", name="A")], None, "two prompts are called 'A'"),
        ([Line("x", name="../a")], None, "'../a' cannot be a folder's name"),
        ([Line("x", name=".a")], None, "cannot be a folder's name"),
        ([Line("x", name="a.")], None, "cannot be a folder's name"),
        ([Line("x", name="Con.txt")], None, "cannot be a folder's name"),
        ([Line("x")], [1, 1], "two prompts are called '0001-seed1'"),
        ([Line("x", seed=1)], [1], "0001 has a seed of its own; leave out --seeds"),
    ],
)
def test_names_and_seeds_that_clash_are_refused(lines, seeds, message):
    with pytest.raises(UsageError) as caught:
        make_jobs(GRAPH, OBJECT_INFO, lines=lines, seeds=seeds)
    assert message in str(caught.value)


def test_seed_without_a_place_is_refused():
    with pytest.raises(UsageError, match="no node holds a seed"):
        make_jobs({"1": encoder()}, {}, seeds=[1])


def test_workflow_is_read_from_the_api_form_and_its_envelope(tmp_path):
    for document in (GRAPH, {"prompt": GRAPH}):
        (tmp_path / "w.json").write_text("\ufeff" + json.dumps(document), encoding="utf-8")
        assert read_workflow(tmp_path / "w.json") == GRAPH


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ("{}", "is no ComfyUI workflow"),
        ("[1]", "is no ComfyUI workflow"),
        ('{"1": {"class_type": 7}}', "is no ComfyUI workflow"),
        ('{"nodes": [{"id": 1}], "links": []}', r"choose File → Export Workflow \(API\), and queue that file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_workflow(tmp_path / "w.json")


def test_missing_workflow_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*gone\.json: No such file"):
        read_workflow(tmp_path / "gone.json")
