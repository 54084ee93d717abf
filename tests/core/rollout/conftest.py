"""A tiny Wan model of random weights, and a text."""

import pytest

from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict

from ...support.rollouts import TEXT, text


@pytest.fixture(scope="module")
def dit():
    return wan_from_state_dict(random_state_dict(dim=256, ffn_dim=320, layers=2, text_dim=TEXT))


@pytest.fixture(scope="module")
def one_layer():
    """A model whose keys and values of a frame depend on this frame alone."""
    return wan_from_state_dict(random_state_dict(dim=256, ffn_dim=320, layers=1, text_dim=TEXT))


@pytest.fixture(scope="session")
def context():
    return text(1)
