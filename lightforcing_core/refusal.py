"""The error for a request that cannot be met, and the checks that several modules share."""

from typing import Any, get_args

import torch
from torch import Tensor


class Refusal(ValueError):
    """A request that cannot be met; its text is "`field` `problem`; `remedy`".

    field: the parameter at fault, by its name in this library; another front end may use its own name, see `named`.
    problem: the fault, with the value. remedy: a way out, in the imperative.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(field, problem, remedy)
        self.field, self.problem, self.remedy = field, problem, remedy

    def __str__(self) -> str:
        return f"{self.field} {self.problem}; {self.remedy}"

    def named(self, field: str) -> "Refusal":
        return Refusal(field, self.problem, self.remedy)


class NotFinite(Refusal):
    """A run made NaN or infinity; its earlier chunks are good."""


def check_size(height: int, width: int, multiple: int = 16) -> None:
    """Refusal unless both sides are multiples: latents are an eighth of a video's pixels, and patches 2×2 latents."""
    for side, pixels in (("height", height), ("width", width)):
        if pixels < multiple or pixels % multiple:
            below = max(multiple, pixels // multiple * multiple)
            raise Refusal(side, f"{pixels} is not a multiple of {multiple}", f"use {below} or {below + multiple}")


def is_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity; a tensor on the meta device has no values and so holds neither."""
    # The extremes pass NaN on, and cost no copy of x.
    return x.is_meta or not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all())


def check_finite(field: str, x: Tensor, remedy: str) -> None:
    if not is_finite(x):
        raise Refusal(field, "holds NaN or infinity", remedy)


def check_choice(field: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise Refusal(field, f"{value!r} is not known", f"use one of {', '.join(get_args(kind))}")
