"""A convolution as the tests of the CUDA kernels draw it."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """Sizes and layout of one convolution."""

    batch: int
    groups: int
    channels: int  # in a group
    filters: int  # in a group
    kernel: tuple
    stride: tuple
    dilation: tuple
    padding: tuple
    size: tuple
    dtype: torch.dtype
    channels_last: bool
    seed: int

    @property
    def geometry(self):
        """As the operators take it, from out_channels on."""
        return self.groups * self.filters, self.kernel, self.stride, self.padding, self.dilation, self.groups

    @property
    def weight_shape(self):
        return (self.groups * self.filters, self.channels, *self.kernel)

    def input(self, generator):
        drawn = torch.randn(self.batch, self.groups * self.channels, *self.size, generator=generator).to(self.dtype)
        return drawn.contiguous(memory_format=torch.channels_last) if self.channels_last else drawn
