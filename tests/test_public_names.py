"""The names that a library user imports, and torch only when one is used."""

import subprocess
import sys

import pytest

import lightforcing


@pytest.mark.parametrize("name", lightforcing.PUBLIC)
def test_public_name_comes_from_its_module(name):
    assert getattr(lightforcing, name) is not None


def test_rollout_is_the_function():
    assert lightforcing.rollout.__module__ == "lightforcing.lightforcing_core.rollout.loop"


def test_unknown_names_are_missing():
    assert not hasattr(lightforcing, "NODE_CLASS_MAPPINGS")


def test_importing_the_package_imports_no_torch():
    script = "import sys, lightforcing; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
