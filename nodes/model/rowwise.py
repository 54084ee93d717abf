"""The weight dtype `fp8_rowwise`: a quantised layout of the host's own kind with a scale per row instead of one.

The host's FP8 has one scale per matrix and divides activations by a constant. Ours scales every output channel and,
as it comes, every token, so an outlier costs its own row only. The layers are the host's FP8 linears and the weights
its QuantizedTensor; offloading, LoRAs (which it applies to the dequantised weight) and saving stay its own work.
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

from ...lightforcing_core.checkpoint.scaled import BY_ROWS
from ...lightforcing_core.fp8.linear import (
    FP8,
    LAYER_LINEARS,
    dequantize_rows,
    product,
    quantize_rows,
    row_scales,
    why_no_fp8,
)

LAYOUT = "LightForcingRowwiseFP8Layout"
_HOST_FORMAT = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)


class RowwiseFP8Layout(QuantizedLayout):
    """float8_e4m3fn [N, K] with float32 scales [N, 1]: a weight's output channels or an activation's tokens."""

    MIN_SM_VERSION = (8, 9)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale [N, 1], and the dtype and shape that the tensor shows."""

    @classmethod
    def quantize(
        cls, tensor: Tensor, scale: Any = None, stochastic_rounding: int = 0, inplace_ops: bool = False, **_: Any
    ) -> tuple[Tensor, Params]:
        """A weight with the host's seed for stochastic rounding, or an activation; scales are always measured."""
        if stochastic_rounding:
            scales = row_scales(tensor)
            stored = comfy.float.stochastic_rounding(tensor.float() / scales, FP8, seed=stochastic_rounding)
        else:
            stored, scales = quantize_rows(tensor)
        return stored, cls.Params(scale=scales, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        return dequantize_rows(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        return {"": qdata, "_scale": params.scale}


register_layout_class(LAYOUT, RowwiseFP8Layout)


@register_layout_op(torch.ops.aten.linear.default, RowwiseFP8Layout)
def _linear(_: Any, args: tuple, kwargs: dict) -> Tensor:
    """x · weightᵀ + bias, in FP8 where the host has quantised x too."""
    x, weight, bias = (*args, None)[:3]
    if not (isinstance(x, QuantizedTensor) and isinstance(weight, QuantizedTensor)):
        return torch.nn.functional.linear(*dequantize_args((x, weight, bias)))
    inputs, weights = (RowwiseFP8Layout.get_plain_tensors(tensor) for tensor in (x, weight))
    return product(*inputs, *weights, bias, x._params.orig_dtype)


def quantized(state_dict: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A plain Wan state dict with the matrices of its `layers` as FP8, in the keys of the host's FP8 format."""
    quantised = dict(state_dict)
    for name in (f"blocks.{i}.{linear}" for i in range(layers) for linear in LAYER_LINEARS):
        weight = quantised[f"{name}.weight"]
        if why_no_fp8(*weight.shape) is None:
            quantised[f"{name}.weight"], quantised[f"{name}.weight_scale"] = quantize_rows(weight)
            quantised[f"{name}.comfy_quant"] = _HOST_FORMAT
    return quantised


def opened(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the host saved of an adopted model, as `quantized` made it."""
    return {name: _HOST_FORMAT if name.endswith(".comfy_quant") else tensor for name, tensor in state_dict.items()}


def adopt(model: ModelPatcher) -> None:
    """Hand the FP8 weights that the host has loaded from `quantized` or `opened` over to our layout.

    When the host saves them it names their format `BY_ROWS`, which only our loader reads: its own would take the
    scales of rows for one of the whole matrix.
    """
    for module in model.model.diffusion_model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedTensor):
            stored, scales = weight.layout_cls.get_plain_tensors(weight)
            params = RowwiseFP8Layout.Params(scales, weight._params.orig_dtype, weight._params.orig_shape)
            module.layout_type, module.quant_format = LAYOUT, BY_ROWS
            module.weight = torch.nn.Parameter(QuantizedTensor(stored, LAYOUT, params), requires_grad=False)
