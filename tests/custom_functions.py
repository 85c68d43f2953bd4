"""Custom autograd functions whose first derivative is right and whose second is not."""

import torch
from torch.autograd.function import once_differentiable


class OnceDifferentiable(torch.autograd.Function):
    """The sine, which says that it has no second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class KeepsInput(torch.autograd.Function):
    """The sine, whose backward pass reads a tensor that autograd knows nothing of: the second derivative is lost."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.x.cos()
