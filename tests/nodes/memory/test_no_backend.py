"""On a device without a sparse backend both sampling nodes say why attention is dense."""

import pytest

REASON = "dense attention: the attention kernel needs an NVIDIA GPU"


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("memory/no_backend")


@pytest.mark.parametrize("run", ["auto", "select"])
def test_line_says_once_why_attention_is_dense(facts, run):
    first, *_, last = [line.splitlines() for line in facts[run]["lines"] if line.startswith("chunk ")]
    assert not any(REASON in part for part in first)  # the first chunk sees only itself, so it is dense anyway
    assert last[0].startswith("chunk 2/2 ")
    assert last[0].endswith("density 100 %")
    assert [part.startswith(f"· {REASON}") for part in last] == [False, True, False]


def test_text_after_the_run_says_it_too(facts):
    (text,) = facts["auto"]["text"]
    assert text.startswith(REASON)
    assert text in facts["auto"]["lines"][-1]


def test_run_that_was_cut_short_says_both(facts):
    why, dense = facts["cut"]["text"]
    assert why.startswith("out of memory")
    assert dense.startswith(REASON)
    assert facts["cut"]["lines"][-1] == f"{why}\n· {dense}"


def test_sparse_run_says_nothing(facts):
    assert facts["named"]["text"] is None
    assert not any(REASON in line for line in facts["named"]["lines"])
