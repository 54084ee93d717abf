"""The names that a library user imports: the same from the root and the core, torch only when one is used."""

import subprocess
import sys

import pytest

import lightforcing
from lightforcing import lightforcing_core
from lightforcing.lightforcing_core import PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_the_same_from_the_root_and_the_core(name):
    value = getattr(lightforcing, name)
    if name != "rollout":  # also the name of a package of the core, which stands for it
        assert getattr(lightforcing_core, name) is value


def test_rollout_is_the_function_from_the_root():
    assert lightforcing.rollout.__module__ == "lightforcing.lightforcing_core.rollout.loop"


def test_unknown_names_are_missing():
    for module in (lightforcing, lightforcing_core):
        assert not hasattr(module, "NODE_CLASS_MAPPINGS")


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_root_imports_no_torch():
    assert run("import sys, lightforcing; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("before", ["", "import lightforcing.lightforcing_core.rollout.recipe; "])
def test_rollout_of_the_core_can_be_called_whether_or_not_its_package_was_imported(before):
    call = "from lightforcing.lightforcing_core import rollout, Recipe, Runtime\ntry: rollout(None, None, Runtime())\n"
    assert run(f"{before}{call}except AttributeError as error: print(error)") == (
        "'NoneType' object has no attribute 'latent_shape'"
    )
