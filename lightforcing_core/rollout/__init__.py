"""The rollout: recipe, schedule, loop over chunks and steps, saved state, record."""

import sys
from types import ModuleType
from typing import Any


class _RolloutPackage(ModuleType):
    """This package, which can be called like the function `rollout` in it.

    `from lightforcing.lightforcing_core import rollout` is part of the public API, and Python answers it with this
    package once any of its modules has been imported.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from .loop import rollout

        return rollout(*args, **kwargs)


sys.modules[__name__].__class__ = _RolloutPackage
