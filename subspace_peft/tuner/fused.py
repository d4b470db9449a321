"""Add an update to a base layer's output in place, keeping only the k-wide ``x Vᵀ`` for the backward pass.

`add_update` does so behind the base layer, `linear_with_update` together with the base layer's own product, whose
gradient for x then takes the update's in place too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        V: torch.Tensor,
        C: torch.Tensor,
        U: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        h = x.reshape(-1, x.shape[-1]) @ V.T
        add_out(result, h @ C.T, U, scale)
        ctx.mark_dirty(result)
        ctx.save_for_backward(h, V, C, U)
        ctx.scale, ctx.shape = scale, x.shape
        return result

    @staticmethod
    @once_differentiable  # h comes without its own history: second derivatives would silently be wrong
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        h, V, C, U = ctx.saved_tensors
        grad_z = (grad.reshape(-1, grad.shape[-1]) @ U).mul_(ctx.scale)
        grad_x = ((grad_z @ C) @ V).view(ctx.shape) if ctx.needs_input_grad[1] else None
        # a quantised layer gives float32 under autocast, where h came in its dtype
        grad_C = grad_z.T @ h.to(grad_z.dtype) if ctx.needs_input_grad[3] else None
        return grad, grad_x, None, grad_C, None, None


class _LinearWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        bias: torch.Tensor | None,
        V: torch.Tensor,
        C: torch.Tensor,
        U: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        result = F.linear(x, W, bias)
        h = x.reshape(-1, x.shape[-1]) @ V.T
        add_out(result, h @ C.T, U, scale)
        ctx.save_for_backward(h, W, V, C, U)
        ctx.scale, ctx.shape = scale, x.shape
        return result

    @staticmethod
    @once_differentiable  # h comes without its own history: second derivatives would silently be wrong
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        h, W, V, C, U = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_z = (flat @ U).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            # added to in place: as a summand of its own it would cost one more pass over the activations
            grad_x = (flat @ W).addmm_(grad_z @ C, V).view(ctx.shape)
        grad_C = grad_z.T @ h if ctx.needs_input_grad[4] else None
        return grad_x, None, None, None, grad_C, None, None


def linear_with_update(
    x: torch.Tensor,
    W: torch.Tensor,
    bias: torch.Tensor | None,
    V: torch.Tensor,
    C: torch.Tensor,
    U: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return ``x Wᵀ + bias + s · x Vᵀ Cᵀ Uᵀ`` (…, out).

    All tensors are of one dtype, outside autocast. Gradients go to x and C only.

    Args:
        x: (…, in).
        W: (out, in).
        bias: (out,) or None.
        V: (k_in, in).
        C: (k_out, k_in).
        U: (out, k_out).
        scale: s.
    """
    return _LinearWithUpdate.apply(x, W, bias, V, C, U, scale)


def add_out(result: torch.Tensor, z: torch.Tensor, U: torch.Tensor, scale: float) -> None:
    """Add ``s · z Uᵀ`` to `result` (…, out) in place, for z (rows of result, k_out)."""
    # under autocast products come in its dtype, and what is added in place has to be in the result's
    result.view(-1, result.shape[-1]).addmm_(z.to(result.dtype), U.T.to(result.dtype), alpha=scale)


def add_update(
    result: torch.Tensor, x: torch.Tensor, V: torch.Tensor, C: torch.Tensor, U: torch.Tensor, scale: float
) -> torch.Tensor:
    """Add ``s · x Vᵀ Cᵀ Uᵀ`` to `result`, which is changed and returned.

    All tensors are in result's dtype. No gradient goes to U and V.

    Args:
        result: (…, out), contiguous; not needed by the operation it came from, which holds for a linear layer's
            output.
        x: (…, in).
        V: (k_in, in).
        C: (k_out, k_in).
        U: (out, k_out).
        scale: s.
    """
    needed = torch.is_grad_enabled() and (result.requires_grad or x.requires_grad or C.requires_grad)
    if needed:
        return _AddUpdate.apply(result, x, V, C, U, scale)
    add_out(result, (x.reshape(-1, x.shape[-1]) @ V.T) @ C.T, U, scale)
    return result
