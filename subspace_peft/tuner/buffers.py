"""Frozen tensors keyed by adapter: one storage however many adapters share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..basis.module import tensor_sha256
from ..errors import BasisMismatchError
from .load_tracker import LoadTracker


class SharedBuffers(nn.Module):
    """A dict of frozen tensors, adapter name → tensor, in which adapters on the same basis hold the same object.

    Not PEFT's `BufferDict`: PEFT upcasts and moves that one adapter at a time, which makes copies. Moves and casts go
    through `_apply` here, once per distinct tensor. Tensors are in the state dict only for adapters that were made
    to carry their basis; `carried.add_basis` adds those that are asked for later.
    """

    def __init__(self) -> None:
        super().__init__()
        self._expected: dict[str, str] = {}
        self._origins: dict[str, tuple[LoadTracker, str, str]] = {}

    def put(self, adapter: str, value: torch.Tensor, saved: bool, sha256: str | None = None) -> None:
        """Hold a tensor for an adapter.

        Args:
            adapter: the adapter's name.
            value: the tensor; another adapter's own, where both share it.
            saved: whether the tensor is in the state dict.
            sha256: the hash that a tensor loaded for the adapter must have; None for any.
        """
        # not register_buffer, which refuses adapters named like any attribute of this class
        self._buffers[adapter] = value
        if saved:
            self._non_persistent_buffers_set.discard(adapter)
        else:
            self._non_persistent_buffers_set.add(adapter)
        if sha256 is not None:
            self._expected[adapter] = sha256

    def expect(self, adapter: str, tracker: LoadTracker, module: str, name: str) -> None:
        """Note in `tracker` when `adapter`'s tensor has come from its file, as `name` of `module`."""
        self._origins[adapter] = (tracker, module, name)

    def arrived(self, sha256: str | None) -> torch.Tensor | None:
        """Return the tensor with that hash, where some adapter has it and does not itself wait for it."""
        known = (name for name, value in self._expected.items() if value == sha256 and name not in self._origins)
        return next((self._buffers[name] for name in known), None)

    def _came(self, adapter: str) -> None:
        if adapter in self._origins:
            tracker, module, name = self._origins.pop(adapter)
            tracker.note(module, name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for adapter, value in self._buffers.items():
            if value is not None and adapter not in self._non_persistent_buffers_set:
                destination[prefix + adapter] = value if keep_vars else value.detach()

    def verify(self, adapter: str, key: str, value: torch.Tensor) -> str | None:
        """Return a message about a tensor that cannot be loaded for `adapter`; None where it can."""
        known = self._buffers.get(adapter)
        if known is not None and known.shape != value.shape:
            return f"size mismatch for {key}: the file has {tuple(value.shape)}, the model {tuple(known.shape)}"
        if value.device.type == "meta":
            return None
        if not torch.isfinite(value).all():
            return f"{key} holds NaN or infinite values: the file is damaged"
        want = self._expected.get(adapter)
        # a file saved after model.half() holds other bytes than were hashed: then only shape and finiteness can be
        # held
        if want is not None and value.dtype == torch.float32 and tensor_sha256(value) != want:
            return (
                f"{key} has sha256 {tensor_sha256(value)}, but the task's config says {want}: the basis in this file "
                "is not the one the task was trained on. Fetch or save the task again."
            )
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' own loader assigns tensors by name instead of calling load_state_dict
        loads = name in self.__dict__.get("_buffers", ()) and isinstance(value, torch.Tensor)
        if loads and (complaint := self.verify(name, name, value)):
            raise BasisMismatchError(complaint)
        if loads:
            self._came(name)
        super().__setattr__(name, self._one_storage(name, value.detach()) if loads else value)

    def _one_storage(self, adapter: str, value: torch.Tensor) -> torch.Tensor:
        """Return another adapter's tensor that equals `value`, so that self-contained tasks share too; else a copy."""
        for other in {id(t): t for name, t in self._buffers.items() if name != adapter and t is not None}.values():
            same_kind = (other.shape, other.dtype, other.device) == (value.shape, value.dtype, value.device)
            if same_kind and other.device.type != "meta" and torch.equal(other, value):
                return other
        return value.clone()

    def __getitem__(self, adapter: str) -> torch.Tensor:
        return self._buffers[adapter]  # type: ignore[return-value]

    def __setitem__(self, adapter: str, value: torch.Tensor) -> None:
        self._buffers[adapter] = value

    def __delitem__(self, adapter: str) -> None:
        del self._buffers[adapter]
        self._non_persistent_buffers_set.discard(adapter)
        for known in (self._expected, self._origins):
            known.pop(adapter, None)

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> Any:
        """Return the adapters' names."""
        return self._buffers.keys()

    def get(self, adapter: str) -> torch.Tensor | None:
        """Return the adapter's tensor, or None."""
        return self._buffers.get(adapter)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SharedBuffers:
        moved: dict[int, torch.Tensor] = {}
        for adapter, value in self._buffers.items():
            if value is not None:
                if id(value) not in moved:
                    moved[id(value)] = fn(value)
                self._buffers[adapter] = moved[id(value)]
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # copying in place would overwrite the basis of every adapter that shares the tensor
        for adapter, value in self._buffers.items():
            key = prefix + adapter
            if adapter in self._non_persistent_buffers_set or value is None:
                continue
            if key not in state_dict:
                missing_keys.append(key)
                continue
            given = state_dict[key]
            if complaint := self.verify(adapter, key, given):
                error_msgs.append(complaint)
                continue
            self._came(adapter)
            if value.device.type == "meta" or not torch.equal(value.to(given.device, given.dtype), given):
                device = given.device if value.device.type == "meta" else value.device
                self._buffers[adapter] = self._one_storage(adapter, given.detach().to(device))
        for key in state_dict:
            if strict and key.startswith(prefix) and key[len(prefix) :] not in self._buffers:
                unexpected_keys.append(key)
