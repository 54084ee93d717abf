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
    key_mean: float32 [B, H, D], None for 16 bits. It is subtracted from keys before they are quantised, but not from
    their means: no softmax over all keys changes, and channels far from zero cost less precision.
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
    key_mean: Tensor | None = None

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        return None if self.key_scales is None or self.value_scales is None else (self.key_scales, self.value_scales)

    @property
    def tail(self) -> tuple[Tensor, Tensor] | None:
        """The means of key blocks as keys are stored, and of value blocks, if kept, to replace skipped blocks."""
        if self.key_means is None or self.value_means is None:
            return None
        k_means = self.key_means if self.key_mean is None else self.key_means - self.key_mean[:, None]
        return k_means.to(self.key_means.dtype), self.value_means

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, *(self.scales or ())

    @property
    def means(self) -> tuple[Tensor, ...]:
        kept = self.key_means, self.frame_means, self.value_means, self.sub_means, self.key_mean
        return tuple(x for x in kept if x is not None)

    def first(self, slots: int, of: int) -> "LayerMemory":
        """Views of the first `slots` slots `of` all."""
        parts = (None if x is None else x[:, : x.shape[1] * slots // of] for x in self[:-1])
        return LayerMemory._make((*parts, self.key_mean))
