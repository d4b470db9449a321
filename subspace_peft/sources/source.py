"""A source adapter: what it is called, which tensors are its factors, and its updates ΔW = s·B·A."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._io.digest import file_sha256
from .._shown import Shown, Table, short
from ..base_names import read_name
from ..basis.module import FLOAT_DTYPES
from ..basis.module_names import plain_name
from ..basis.pipeline_parts import parts_in, split_part
from ..errors import SourceError
from .factors import Factors
from .lora import is_saved_module, method_of, scaling
from .spans import Span

if TYPE_CHECKING:
    from ..tasks.read import SavedTask

IN_MEMORY = "in memory"


@dataclass(eq=False, repr=False)
class Source(Shown):
    """One source adapter, whose tensors are read when they are asked for.

    Attributes:
        name: its name in the basis: the last part of its path or id, or the adapter's name.
        location: folder, Hub id, or "in memory".
        config: the LoRA configuration as a dict; empty for a bare state dict, whose scale then counts as 1.
        keys: ``{module: {"A": key, "B": key}}``.
        read: key → tensor.
        digest: the value of `sha256`; empty until the whole file was read.
        revision: commit sha on the Hub, or None.
        folder: where its files lie on this machine, or None.
        file: that of its tensors, or None.
        norms: ‖ΔW‖_F per module, as far as asked for.
        aliases: module name in the fleet → module name in this source's own config, where they differ.
        other_keys: tensors in it that are no LoRA factors, such as a classifier's (`modules_to_save`).
        license: from the front matter of its README, or None.
        scales: scale per module (under the source's own names) where no configuration has it, as in kohya's files.
        scale_from: where `scales` come from, in a few words.
        converted: what it was converted from to a LoRA, such as ``LOHA`` or ``DORA``; None where it was one.
        lost: share of its update's energy that its conversion from another method to LoRA lost.
        dtypes: of the tensors read so far.
        in_file: whether `file` is a safetensors file whose byte ranges are the tensors that `read` gives; else `read`
            has them in memory.
        spans: tensor name → where it lies in such a file, from when it was scanned.
        plain_keys: key → key without the names of wrappers, see `plain_names`.
        pipeline: whether it is of a diffusion pipeline, so that its modules' names begin with the part that has them.
        stamp: such a file's size in bytes and time of change in ns, from when it was scanned.
        said_base: the base model that the user says it is of, whatever its configuration says; or None.
        outer: what stands in front of its modules' names that the adapted model does not have; left out of its tasks.
        shapes: tensor name → shape, where that is known without reading the tensor.
        task: what it was read from, where it is a task in a basis.
    """

    name: str
    location: str
    config: dict[str, Any]
    keys: dict[str, dict[str, str]]
    read: Callable[[str], torch.Tensor]
    digest: str
    revision: str | None = None
    folder: Path | None = None
    file: Path | None = None
    norms: dict[str, float] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    other_keys: tuple[str, ...] = ()
    license: str | None = None
    scales: dict[str, float] = field(default_factory=dict)
    scale_from: str = "alpha / rank of its file"
    converted: str | None = None
    lost: float = 0.0
    dtypes: set[str] = field(default_factory=set)
    in_file: bool = False
    spans: Mapping[str, Span] | None = None
    plain_keys: Mapping[str, str] = field(default_factory=dict)
    pipeline: bool = False
    stamp: tuple[int, int] | None = None
    said_base: str | None = None
    outer: str = ""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    task: SavedTask | None = None

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "name", repr(self.name)
        yield "modules", len(self.keys)
        yield "base model", short(self.config.get("base_model_name_or_path"))
        yield "converted from", self.converted
        yield "at", short(self.location) + (f"@{self.revision[:7]}" if self.revision else "")

    def _shown_table(self) -> Table:
        return ("module",), ((name,) for name in self.keys), len(self.keys)

    @property
    def task_on(self) -> str | None:
        """Fingerprint of the basis that a task is on; its file's bytes alone do not say its update."""
        return None if self.task is None else self.task.config.basis_fingerprint

    @property
    def sha256(self) -> str:
        """Hex digest of the weights' file, or of the tensors of a source in memory."""
        if not self.digest and self.file is not None:
            self.digest = file_sha256(self.file)
        return self.digest

    @property
    def base_model(self) -> str | None:
        """The base model's name: the user's, or the one in its configuration in its normal form; or None."""
        found = read_name(self.said_base or self.given_base)
        return None if found is None else found.text

    @property
    def given_base(self) -> str | None:
        """The base model's name as its configuration has it, or None."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def parts(self) -> list[str]:
        """The parts of a pipeline that it adapts, such as ``unet``; none where it is of one model."""
        return parts_in(self.aliases.get(module, module) for module in self.keys) if self.pipeline else []

    def split(self, module: str) -> tuple[str, str]:
        """Return the part of a pipeline that has a module, "" where it is of one model, and its name there."""
        own = self.aliases.get(module, module).removeprefix(self.outer)
        return split_part(own) if self.pipeline else ("", own)

    def plain(self, key: str) -> str:
        """Return the key of one of its tensors without the names of wrappers."""
        return (self.plain_keys.get(key) or plain_name(key)).removeprefix(self.outer)

    @property
    def task_type(self) -> str | None:
        """PEFT's task type in its configuration, or None."""
        kind = self.config.get("task_type")
        return None if kind is None else str(getattr(kind, "value", kind))

    @property
    def method(self) -> str:
        """PEFT's name of the method that it was trained with."""
        return method_of(self.config)

    @property
    def conversion(self) -> dict[str, Any]:
        """What a record says of its conversion to a LoRA; nothing where it was one."""
        if self.converted is None:
            return {}
        return {"converted_from": self.converted, "energy_lost_in_conversion": self.lost}

    @property
    def scale_is_guessed(self) -> bool:
        """Whether nothing says by how much its factors are to be multiplied, so that they count as the update."""
        return not self.config and any(module not in self.scales for module in self._own_names())

    def _own_names(self) -> list[str]:
        return [self.aliases.get(module, module) for module in self.keys]

    @property
    def biases(self) -> list[str]:
        """Keys of the base model's biases that were trained with it."""
        trained = self.config.get("bias", "none") != "none"
        return [
            key
            for key in self.other_keys
            if trained and key.endswith(".bias") and not is_saved_module(key, self.config)
        ]

    @property
    def ranks(self) -> list[int]:
        """The ranks that its modules have, ascending."""
        return sorted({self.shape(module)[2] for module in self.keys})

    def raw(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stored ``lora_B`` (out, r) and ``lora_A`` (r, in) in float64, without their scale.

        A convolution's come as matrices, (in, height, width) flattened.

        Raises:
            SourceError: a tensor is unfit, see `check`; holds NaN or infinite values; or the two do not multiply.
        """
        pair = []
        for side in ("B", "A"):
            key = self.keys[module][side]
            value = self.read(key)
            self.check(key, value)
            if not torch.isfinite(value).all():
                raise self.not_finite(key)
            pair.append(value.detach().to(device="cpu", dtype=torch.float64).flatten(1))
        B, A = pair
        self.check_pair(module, tuple(B.shape), tuple(A.shape))
        return B, A

    def check(self, key: str, value: torch.Tensor) -> None:
        """Check a factor's dtype and shape, and note the dtype.

        Raises:
            SourceError: it is no float, has neither two nor four dimensions, or is empty.
        """
        if value.dtype not in FLOAT_DTYPES:
            raise SourceError(f"{self.location}: {key} has dtype {value.dtype}, which is no float. Save it again.")
        if value.dim() < 2 or not value.numel():
            what = "a part of it" if value.numel() else "nothing"
            raise SourceError(
                f"{self.location}: {key} has shape {tuple(value.shape)}, which holds {what}: DeepSpeed's ZeRO-3 and"
                " FSDP leave that in one process where the parts are not gathered before saving. Save it again under"
                " deepspeed.zero.GatheredParameters or FSDP's summon_full_params, or with"
                " stage3_gather_16bit_weights_on_model_save."
            )
        if value.dim() not in (2, 4):
            raise SourceError(
                f"{self.location}: {key} has shape {tuple(value.shape)}; linear layers, embeddings and two-dimensional"
                " convolutions are supported. Leave the others out of the adapter's target_modules."
            )
        self.dtypes.add(str(value.dtype).removeprefix("torch."))

    def check_pair(self, module: str, B: tuple[int, ...], A: tuple[int, ...]) -> None:
        """Raise `SourceError` where factors of these shapes do not multiply."""
        if B[1] and A[0] > B[1] and A[0] % B[1] == 0 and len(self._stored_shape(self.keys[module]["A"])) == 4:
            raise SourceError(
                f"{self.location}: module {module!r} is a convolution of {A[0] // B[1]} groups, whose lora_B {B} and"
                f" lora_A {A} are those of its groups; no basis holds that. Leave it out of the adapter's"
                " target_modules."
            )
        if B[1] != A[0]:
            raise SourceError(
                f"{self.location}: module {module!r} has lora_B {B} and lora_A {A}, which do not multiply. The file is"
                " damaged: save the adapter again."
            )

    def not_finite(self, key: str) -> SourceError:
        """Return the error for a tensor with NaN or infinite values."""
        return SourceError(f"{self.location}: {key} holds NaN or infinite values. Leave this adapter out.")

    def truncated(self) -> SourceError:
        """Return the error for a file with fewer bytes than its header says."""
        return SourceError(
            f"{self.location}: {self.file} ended before its header said. It was changed meanwhile: run this again."
        )

    def shape(self, module: str) -> tuple[int, int, int]:
        """Return out, in and rank of one module's update, from the file's header where the source was scanned."""
        keys = (self.keys[module][side] for side in ("B", "A"))
        B, A = map(self._stored_shape, keys)
        # a number alone has no shape; `check` refuses it where it is read
        return (B or (1,))[0], math.prod(A[1:]), (A or (1,))[0]

    def _stored_shape(self, key: str) -> tuple[int, ...]:
        if self.shapes is not None:
            return self.shapes[key]
        return tuple(self.read(key).shape) if self.spans is None else self.spans[key].shape

    def weight_shape(self, module: str) -> list[int] | None:
        """Return the base weight's shape where it is no linear layer's.

        That is (tokens, dimension) of an embedding, and four numbers of a convolution.
        """
        if self.task is not None:
            return (self.task.config.weight_shapes or {}).get(self.aliases.get(module, module))
        A, B = (self.read(self.keys[module][side]) for side in ("A", "B"))
        if A.dim() == 4:
            return [B.shape[0], *A.shape[1:]]
        return [A.shape[1], B.shape[0]] if "lora_embedding_" in self.keys[module]["A"] else None

    def factors(self, module: str) -> Factors:
        """Return ``ΔW = s B A`` of one module (float64), scale folded in."""
        B, A = self.raw(module)
        return Factors(B * self.scale(module, A.shape[0]), A)

    def scale(self, module: str, rank: int) -> float:
        """Return s, by which B·A of this rank is multiplied to be the module's update.

        Raises:
            SourceError: the config has another rank for this module, or no usable alpha.
        """
        own = self.aliases.get(module, module)
        try:
            known = self.scales.get(own, None if self.config else 1.0)
            return scaling(self.config, own, rank) if known is None else known
        except ValueError as error:
            raise SourceError(
                f"{self.location}: {error}. The config and the weights do not belong together."
            ) from None

    def norm(self, module: str) -> float:
        """Return ‖ΔW‖_F of one module."""
        if module not in self.norms:
            self.norms[module] = self.factors(module).norm()
        return self.norms[module]
