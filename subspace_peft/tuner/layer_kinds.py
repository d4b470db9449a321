"""The kinds of adapter layers: around linear layers, convolutions and embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adapter_layer import AdapterLayer
from .fused import Terms, add_out, add_update, linear_with_update
from .plan import InjectionPlan
from .row_own import product
from .targets import kind_of


class Linear(AdapterLayer):
    """Around `nn.Linear`, a quantised kind of it, or transformers' `Conv1D`."""

    def enter(self, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Return ``V x`` (…, k_in), in V's dtype."""
        return F.linear(x.to(V.dtype), V)

    def enter_rows(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Return ``A_row x`` (n, …, φ), in A's dtype."""
        return product(x, A.transpose(1, 2))

    def leave(self, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``U z`` (…, out)."""
        return F.linear(z, U)

    def add_out(self, result: torch.Tensor, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return `result` plus ``U z``; in place where no gradient is asked for."""
        if not _can_be_changed(result):
            return super().add_out(result, z, U)
        add_out(result, z.reshape(-1, z.shape[-1]), U, 1.0)
        return result

    def add_rows(self, result: torch.Tensor, z: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Return `result` plus ``B_row z``; in place where no gradient is asked for."""
        if not _can_be_changed(result):
            return super().add_rows(result, z, B)
        z = z.reshape(len(z), -1, z.shape[-1]).to(result.dtype)
        result.view(len(result), -1, result.shape[-1]).baddbmm_(z, B.to(result.dtype))
        return result

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """Return ΔW in the layout of the base weight: transposed for a `Conv1D`."""
        return delta.T if self.fan_in_fan_out else delta

    def _with_first(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        base = self.base_layer
        if (
            type(base) is not nn.Linear
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or x.dtype != base.weight.dtype
            or base.weight.requires_grad
            or (base.bias is not None and base.bias.requires_grad)
            or not isinstance(self.subspace_dropout[adapter], nn.Identity)
            or _is_watched(base)
        ):
            return None
        return linear_with_update(x, base.weight, base.bias, self._terms(adapter, x.dtype))

    def _is_guarded(self, result: torch.Tensor) -> bool:
        # autograd forbids to change a view that a custom function gave, as backward hooks and 8-bit layers do
        return _has_backward_hooks(self.base_layer) or (self.quantization_backend is not None and result._is_view())

    def _add_update(self, result: torch.Tensor, x: torch.Tensor, adapter: str) -> torch.Tensor:
        # a compiler fuses the plain chain by itself, and cannot look into what changes its input in place
        if torch.compiler.is_compiling() or not result.is_contiguous() or self._is_guarded(result):
            return super()._add_update(result, x, adapter)
        dtype = result.dtype
        return add_update(result, self._dropped(x, adapter).to(dtype), self._terms(adapter, dtype))


def _can_be_changed(result: torch.Tensor) -> bool:
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and result.is_contiguous()


def _is_watched(module: nn.Module) -> bool:
    """Tell whether a call of `module` has effects besides its result.

    Hooks have, and a `forward` that was put in the place of the module's own, as offloading does.
    """
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or _has_backward_hooks(module)
    )


def _has_backward_hooks(module: nn.Module) -> bool:
    """Tell whether gradients of the output of `module` go through a hook: then that output must not be changed."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


class Conv2d(AdapterLayer):
    """Around `nn.Conv2d` without groups.

    V is a convolution of the base's kernel, stride and padding to k_in channels, core and U are 1 × 1. As a matrix the
    weight is (out, in · height · width).
    """

    groups = 1  # what LoRA asks of a convolution that it is put around, adapted already or not

    def enter(self, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Return ``V x``: a convolution, (batch, height, width, k_in)."""
        base = self.get_base_layer()
        kernel = V.view(V.shape[0], base.in_channels, *base.kernel_size)
        return base._conv_forward(x.to(V.dtype), kernel, None).movedim(1, -1)

    def enter_rows(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Return ``A_row x``: one convolution in which each row is a group, (n, height, width, φ)."""
        base = self.get_base_layer()
        x, padding = x.to(A.dtype), base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        kernels = A.reshape(-1, base.in_channels, *base.kernel_size)
        h = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, None, base.stride, padding, base.dilation, len(x))
        return h.view(*A.shape[:2], *h.shape[2:]).movedim(1, -1)

    def leave(self, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``U z``: channels second, (batch, out, height, width)."""
        return F.linear(z, U).movedim(-1, 1)

    def leave_rows(self, z: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Return ``B_row z``: channels second, (n, out, height, width)."""
        return product(z, B).movedim(-1, 1)

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """Return ΔW in the layout of the base weight: (out, in, height, width)."""
        base = self.get_base_layer()
        return delta.view(base.out_channels, base.in_channels, *base.kernel_size)


class Embedding(AdapterLayer):
    """Around `nn.Embedding`. As a matrix the weight is (dimension, tokens): a token's input is a unit vector."""

    def enter(self, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Return ``V x``: rows of Vᵀ, looked up."""
        return self._scaled(F.embedding(x, V.T))

    def enter_rows(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Return ``A_row x``: columns of each row's own A, looked up, (n, …, φ)."""
        tokens = x.reshape(len(x), 1, -1).expand(-1, A.shape[1], -1)
        return self._scaled(A.gather(2, tokens).movedim(1, -1).reshape(*x.shape, A.shape[1]))

    def _scaled(self, h: torch.Tensor) -> torch.Tensor:
        # some models scale what they look up, as part of the layer
        scale = getattr(self.get_base_layer(), "embed_scale", None)
        return h if scale is None else h * torch.as_tensor(scale).to(h)

    def _entered(self, x: torch.Tensor, terms: Terms) -> torch.Tensor:
        # looked up one beside the other: side by side first would copy V, of which a batch reads a few columns
        sides = [terms.V] if terms.v is None else [terms.V, terms.v]
        return torch.cat([self.enter(x, side) for side in sides], -1)

    def leave(self, z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Return ``U z`` (…, out)."""
        return F.linear(z, U)

    def as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """Return ΔW in the layout of the base weight: (tokens, dimension)."""
        return delta.T

    def _dropped(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        return x  # indices of tokens


KINDS = {"linear": Linear, "conv2d": Conv2d, "embedding": Embedding}


def make_layer(target: nn.Module, adapter_name: str, plan: InjectionPlan, key: str, **kwargs: Any) -> AdapterLayer:
    """Return a new adapter layer around `target`.

    Args:
        target: a layer that `supported` has accepted.
        adapter_name: the first adapter's name.
        plan: the adapter's.
        key: the layer's name in the base model.
        kwargs: settings of the model for PEFT's quantisation backends.
    """
    return KINDS[kind_of(target)](target, adapter_name, plan, key, **kwargs)
