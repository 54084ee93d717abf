"""One layer's KV cache, as the cache and the kernels share it; needs no Triton."""

from typing import NamedTuple

from torch import Tensor


class LayerMemory(NamedTuple):
    """The tensors of one layer's KV cache, all contiguous. Frame slot s holds rows [s · n, (s + 1) · n) of each.

    keys, values: [B, slots · tokens per frame, H, D] in the model's dtype, int8 or float8_e4m3fn.
    key_scales, value_scales: float32 [B, slots · blocks per frame, H], exactly if the cache is 8-bit:
    value = stored · scale.
    key_means, value_means: [B, slots · blocks per frame, H, D] in the model's dtype, None if not wanted.
    frame_means: [B, slots, H, D], the means of each frame's keys; and arrivals: int32 [B, slots, H], the blocks of a
    frame and head that a running kernel has pooled, zero before and after every launch. Both come with key_means.
    sub_means: [B, slots · sub-blocks per frame, H, D], means of the parts of a key block, None if not wanted.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    key_means: Tensor | None = None
    frame_means: Tensor | None = None
    arrivals: Tensor | None = None
    value_means: Tensor | None = None
    sub_means: Tensor | None = None

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        return None if self.key_scales is None or self.value_scales is None else (self.key_scales, self.value_scales)

    @property
    def tail(self) -> tuple[Tensor, Tensor] | None:
        """The means of key and value blocks, if both are kept, to replace skipped blocks."""
        return None if self.key_means is None or self.value_means is None else (self.key_means, self.value_means)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, *(self.scales or ())

    @property
    def means(self) -> tuple[Tensor, ...]:
        kept = self.key_means, self.frame_means, self.value_means, self.sub_means
        return tuple(x for x in kept if x is not None)

    def first(self, slots: int, of: int) -> "LayerMemory":
        """Views of the first `slots` slots `of` all."""
        return LayerMemory._make(None if x is None else x[:, : x.shape[1] * slots // of] for x in self)
