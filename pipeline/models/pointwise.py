"""1x1 convolutions as matrices to prune."""

from torch import Tensor, nn


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, which multiplies each position's channels by its weight (O, I, 1, 1)."""

    def forward(self, x_BIHW: Tensor) -> Tensor:
        return super().forward(x_BIHW)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a plain convolution that multiplies each position's channels by a matrix."""
    if type(module) is not nn.Conv2d or module.padding not in ((0, 0), "valid", "same"):
        return False
    return (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)


def mark_pointwise(model: nn.Module) -> nn.Module:
    """Makes the plain 1x1 convolutions of a model matrices that are pruned, as `prune.pointwise` asks; returns the model."""
    for module in filter(is_pointwise, model.modules()):
        module.__class__ = PointwiseConv
    return model
