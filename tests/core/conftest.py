"""A new run for every test of the core."""

import pytest

from lightforcing.lightforcing_core import fast_path


@pytest.fixture(autouse=True)
def new_run():
    """No fast path has failed yet and nothing has been logged yet."""
    fast_path.begin_run()
    yield
    fast_path.begin_run()
