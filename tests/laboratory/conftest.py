"""The laboratory is run from the repository's root and is not part of the installed package."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(scope="module", autouse=True)
def small_tensors(one_thread):
    """Everything here is tiny."""
