"""The weight dtype `fp8_rowwise`: a quantised layout of ComfyUI's kind with a scale per row instead of one.

ComfyUI's FP8 has one scale per matrix and divides activations by a constant. This layout scales every output channel
and, at run time, every token, so an outlier affects only its own row. The layers are ComfyUI's FP8 linears and the
weights its QuantizedTensor, so ComfyUI does the offloading, the LoRAs (on the dequantised weight) and the saving.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.float
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op
from comfy_kitchen.tensor.base import BaseLayoutParams, dequantize_args
from torch import Tensor

from ...lightforcing_core.checkpoint.scaled import BY_ROWS, format_mark, marked_format
from ...lightforcing_core.fast_path import note
from ...lightforcing_core.model.fp8 import (
    FP8,
    LAYER_LINEARS,
    MULTIPLE,
    SCALED,
    WIDENED,
    dequantize_rows,
    multiply,
    product,
    quantize_rows,
    row_scales,
    why_no_fp8,
    why_not_scaled_mm,
)
from ...lightforcing_core.pinned import ROWS_LAYOUT as LAYOUT


class RowwiseFP8Layout(QuantizedLayout):
    """float8_e4m3fn [N, K] with float32 scales [N, 1], per channel or token."""

    MIN_SM_VERSION = (8, 9)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale [N, 1], None if not quantised yet, and the dtype and shape that the tensor shows."""

    @classmethod
    def quantize(
        cls, tensor: Tensor, scale: Any = None, stochastic_rounding: int = 0, inplace_ops: bool = False, **_: Any
    ) -> tuple[Tensor, Params]:
        """Quantise a weight, stochastically if asked; an activation stays until the product that reads it is known."""
        scales: Tensor | None
        if scale is None:
            stored, scales = tensor, None
        elif stochastic_rounding:
            scales = row_scales(tensor)
            stored = comfy.float.stochastic_rounding(tensor.float() / scales, FP8, seed=stochastic_rounding)
        else:
            stored, scales = quantize_rows(tensor)
        return stored, cls.Params(scale=scales, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        return qdata if params.scale is None else dequantize_rows(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        return {"": qdata, "_scale": params.scale}


register_layout_class(LAYOUT, RowwiseFP8Layout)


@register_layout_op(torch.ops.aten.linear.default, RowwiseFP8Layout)
def _linear(_: Any, args: tuple, kwargs: dict) -> Tensor:
    """x · weightᵀ + bias, in FP8 if x may be quantised too."""
    x, weight, bias = (*args, None)[:3]
    if not (isinstance(x, QuantizedTensor) and isinstance(weight, QuantizedTensor)):
        if isinstance(weight, QuantizedTensor):
            reason = why_not_scaled_mm(x.device, SCALED, *(3 * (MULTIPLE,))) or "as ComfyUI or the file asks"
            note(WIDENED, f"FP8 layers ({reason})")
        return torch.nn.functional.linear(*dequantize_args((x, weight, bias)))
    (values, scales), weights = (RowwiseFP8Layout.get_plain_tensors(tensor) for tensor in (x, weight))
    if scales is None:
        return multiply(values, *weights, bias)
    return product(values, scales, *weights, bias, x._params.orig_dtype).unflatten(0, x.shape[:-1])


def quantized(state_dict: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A Wan state dict whose layers' matrices are FP8 by rows."""
    quantised = dict(state_dict)
    for name in (f"blocks.{i}.{linear}" for i in range(layers) for linear in LAYER_LINEARS):
        weight = quantised[f"{name}.weight"]
        if why_no_fp8(*weight.shape) is None:
            quantised[f"{name}.weight"], quantised[f"{name}.weight_scale"] = quantize_rows(weight)
            quantised[f"{name}.comfy_quant"] = format_mark(BY_ROWS)
    return quantised


def restored(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with FP8 by rows, in the FP8 format that ComfyUI loads; `use_rows` comes after."""
    marks = {name: tensor for name, tensor in state_dict.items() if name.endswith(".comfy_quant")}
    by_rows = [name for name, mark in marks.items() if marked_format(name, mark) == BY_ROWS]
    return {**state_dict, **dict.fromkeys(by_rows, format_mark("float8_e4m3fn"))}


def use_rows(model: ModelPatcher) -> None:
    """Give FP8 weights from `restored` the layout by rows.

    ComfyUI saves their format under the name `BY_ROWS`, which only this pack's loader reads: ComfyUI's own would
    treat the row scales as one scale of the whole matrix.
    """
    for module in model.model.diffusion_model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedTensor) and weight._layout_cls == "TensorCoreFP8E4M3Layout":
            stored, scales = weight.layout_cls.get_plain_tensors(weight)
            if scales.ndim == 2:  # one number is ComfyUI's own
                params = RowwiseFP8Layout.Params(scales, weight._params.orig_dtype, weight._params.orig_shape)
                module.layout_type, module.quant_format = LAYOUT, BY_ROWS
                module.weight = torch.nn.Parameter(QuantizedTensor(stored, LAYOUT, params), requires_grad=False)
