"""Linear layers in FP8, as the loader's `fp8_rowwise` computes them, for a Wan tree without ComfyUI."""

from typing import Any

from torch import Tensor, nn

from lightforcing.lightforcing_core.model.fp8 import LAYER_LINEARS, product, quantize_rows


class FP8Linear(nn.Module):
    """`linear` with a weight in e4m3, a scale per output channel, and activations quantised token by token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight, self._scales = quantize_rows(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        rows = quantize_rows(x.flatten(0, -2))
        return product(*rows, self._weight, self._scales, self._bias, x.dtype).unflatten(0, x.shape[:-1])


def quantize_linears(dit: nn.Module) -> None:
    """Replace the matrices of every layer by FP8 ones, in place: q, k, v, o of both attentions and the feed-forward."""
    blocks: Any = dit.blocks
    for block in blocks:
        for name in LAYER_LINEARS:
            block.set_submodule(name, FP8Linear(block.get_submodule(name)))
