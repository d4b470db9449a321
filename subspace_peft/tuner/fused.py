"""Add an update to a base layer's output in place, keeping little beside the k-wide ``x Vᵀ`` for the backward pass.

`add_update` does so behind the base layer, `linear_with_update` together with the base layer's own product, whose
gradient for x then takes the update's in place too. A task's own directions u and v go through the same products as
the basis: side by side, ``[V; v]`` and ``[U, u]``, they pass over the activations once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class Terms(NamedTuple):
    """The update ``ΔW = s · U C V + s' · u v`` of one layer, all tensors in one dtype.

    Attributes:
        U: (out, k_out).
        C: (k_out, k_in).
        V: (k_in, in).
        scale: s.
        u: (out, φ), the task's own directions, or None for none.
        v: (φ, in), or None.
        own: s'.
    """

    U: torch.Tensor
    C: torch.Tensor
    V: torch.Tensor
    scale: float
    u: torch.Tensor | None = None
    v: torch.Tensor | None = None
    own: float = 1.0

    @property
    def inner(self) -> torch.Tensor:
        """What the input is multiplied with, ``[V; v]`` (k_in + φ, in)."""
        return self.V if self.v is None else torch.cat([self.V, self.v])

    @property
    def outer(self) -> torch.Tensor:
        """What leads to the output, ``[U, u]`` (out, k_out + φ)."""
        return self.U if self.u is None else torch.cat([self.U, self.u], 1)

    @property
    def trained(self) -> tuple[torch.Tensor, ...]:
        """The tensors that gradients go to."""
        return tuple(each for each in (self.C, self.u, self.v) if each is not None)

    def through(self, h: torch.Tensor) -> torch.Tensor:
        """Return what `outer` is multiplied with (…, k_out + φ), scales folded in, for h (…, k_in + φ)."""
        if self.v is None:
            return F.linear(h, self.C * self.scale)
        k = self.V.shape[0]
        return torch.cat([F.linear(h[..., :k], self.C * self.scale), h[..., k:] * self.own], -1)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        C: torch.Tensor,
        u: torch.Tensor | None,
        v: torch.Tensor | None,
        terms: Terms,
    ) -> torch.Tensor:
        _keep(ctx, x, terms, _add(result, x, terms))
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable  # h comes without its own history: second derivatives would silently be wrong
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        flat = grad.reshape(-1, grad.shape[-1])
        left, inner, trained = _gradients(ctx, ctx.saved_tensors, flat, first=2)
        grad_x = (left @ inner).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, *trained, None


class _LinearWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        bias: torch.Tensor | None,
        C: torch.Tensor,
        u: torch.Tensor | None,
        v: torch.Tensor | None,
        terms: Terms,
    ) -> torch.Tensor:
        result = F.linear(x, W, bias)
        _keep(ctx, x, terms, _add(result, x, terms), W)
        return result

    @staticmethod
    @once_differentiable  # h comes without its own history: second derivatives would silently be wrong
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        flat = grad.reshape(-1, grad.shape[-1])
        saved = ctx.saved_tensors  # a checkpoint lets them be asked for once
        left, inner, trained = _gradients(ctx, saved, flat, first=3)
        grad_x = None
        if ctx.needs_input_grad[0]:
            # added to in place: as a summand of its own it would cost one more pass over the activations
            grad_x = (flat @ saved[-1]).addmm_(left, inner).view(ctx.shape)
        return grad_x, None, None, *trained, None


def _add(result: torch.Tensor, x: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Add the update to `result` in place; return ``x [V; v]ᵀ`` (rows, k_in + φ)."""
    h = x.reshape(-1, x.shape[-1]) @ terms.inner.T
    if terms.v is None:
        add_out(result, h @ terms.C.T, terms.U, terms.scale)
    else:
        add_out(result, terms.through(h), terms.outer, 1.0)
    return h


def _keep(ctx: Any, x: torch.Tensor, terms: Terms, h: torch.Tensor, W: torch.Tensor | None = None) -> None:
    # the sides as they are, of which the basis's are the shared ones: side by side they would be copies, by layer.
    # Only v's gradient needs x itself.
    own = (None, None, None) if terms.v is None else (terms.u, terms.v, x)
    ctx.save_for_backward(h, terms.U, terms.C, terms.V, *own, W)
    ctx.scale, ctx.own, ctx.shape = terms.scale, terms.own, x.shape


def _gradients(
    ctx: Any, saved: tuple[torch.Tensor, ...], flat: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Return what ``[V; v]`` is multiplied with for the gradient of x, ``[V; v]``, and the gradients of C, u and v.

    Args:
        ctx: of the forward pass.
        saved: its saved tensors.
        flat: (rows, out), the gradient of the output.
        first: the place of C among the arguments.
    """
    h, U, C, V, u, v, x, _ = saved
    terms = Terms(U, C, V, ctx.scale, u, v, ctx.own)
    k_out, k_in = C.shape
    grad_z = flat @ terms.outer
    grad_core = (grad_z if v is None else grad_z[:, :k_out]).mul_(ctx.scale)
    grad_C = grad_u = grad_v = None
    if ctx.needs_input_grad[first]:
        # a quantised layer gives float32 under autocast, where h came in its dtype
        grad_C = grad_core.T @ h[:, :k_in].to(grad_z.dtype)
    if v is None:
        return grad_core @ C, terms.inner, [grad_C, grad_u, grad_v]
    grad_own = grad_z[:, k_out:].mul_(ctx.own)
    if ctx.needs_input_grad[first + 1]:
        grad_u = (flat.T @ h[:, k_in:].to(flat.dtype)).mul_(ctx.own)
    if ctx.needs_input_grad[first + 2]:
        grad_v = grad_own.T @ x.reshape(-1, x.shape[-1]).to(grad_z.dtype)
    return torch.cat([grad_core @ C, grad_own], 1), terms.inner, [grad_C, grad_u, grad_v]


def linear_with_update(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, terms: Terms) -> torch.Tensor:
    """Return ``x Wᵀ + bias + x ΔWᵀ`` (…, out).

    All tensors are of one dtype, outside autocast. Gradients go to x, and to the terms' C, u and v only.

    Args:
        x: (…, in).
        W: (out, in).
        bias: (out,) or None.
        terms: of ΔW.
    """
    return _LinearWithUpdate.apply(x, W, bias, terms.C, terms.u, terms.v, terms)


def add_out(result: torch.Tensor, z: torch.Tensor, U: torch.Tensor, scale: float) -> None:
    """Add ``s · z Uᵀ`` to `result` (…, out) in place, for z (rows of result, k_out)."""
    # under autocast products come in its dtype, and what is added in place has to be in the result's
    result.view(-1, result.shape[-1]).addmm_(z.to(result.dtype), U.T.to(result.dtype), alpha=scale)


def add_update(result: torch.Tensor, x: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Add ``x ΔWᵀ`` to `result`, which is changed and returned.

    All tensors are in result's dtype. No gradient goes to the terms' U and V.

    Args:
        result: (…, out), contiguous; not needed by the operation it came from, which holds for a linear layer's
            output.
        x: (…, in).
        terms: of ΔW.
    """
    if torch.is_grad_enabled() and any(each.requires_grad for each in (result, x, *terms.trained)):
        return _AddUpdate.apply(result, x, terms.C, terms.u, terms.v, terms)
    _add(result, x, terms)
    return result
