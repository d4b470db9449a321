"""``result + s · x Vᵀ Cᵀ Uᵀ`` in place, keeping only the k-wide ``x Vᵀ`` for the backward pass."""

from __future__ import annotations

from typing import Any

import torch


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
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        h, V, C, U = ctx.saved_tensors
        grad_z = (grad.reshape(-1, grad.shape[-1]) @ U).mul_(ctx.scale)
        grad_x = ((grad_z @ C) @ V).view(ctx.shape) if ctx.needs_input_grad[1] else None
        # a quantised layer gives float32 under autocast, where h came in its dtype
        grad_C = grad_z.T @ h.to(grad_z.dtype) if ctx.needs_input_grad[3] else None
        return grad, grad_x, None, grad_C, None, None


def add_out(result: torch.Tensor, z: torch.Tensor, U: torch.Tensor, scale: float) -> None:
    """Add ``s · z Uᵀ`` to `result` (…, out) in place, for z (rows of result, k_out)."""
    # under autocast products come in its dtype, and what is added in place has to be in the result's
    result.view(-1, result.shape[-1]).addmm_(z.to(result.dtype), U.T.to(result.dtype), alpha=scale)


def add_update(
    result: torch.Tensor, x: torch.Tensor, V: torch.Tensor, C: torch.Tensor, U: torch.Tensor, scale: float
) -> torch.Tensor:
    """Add ``s · x Vᵀ Cᵀ Uᵀ`` to `result` (…, out), which is changed and returned.

    Args:
        result: contiguous; not needed by the operation it came from, which holds for a linear layer's output.
        x: (…, in). V: (k_in, in). C: (k_out, k_in). U: (out, k_out). All in result's dtype. No gradient goes to U and V.
        scale: s.
    """
    needed = torch.is_grad_enabled() and (result.requires_grad or x.requires_grad or C.requires_grad)
    if needed:
        return _AddUpdate.apply(result, x, V, C, U, scale)
    add_out(result, (x.reshape(-1, x.shape[-1]) @ V.T) @ C.T, U, scale)
    return result
