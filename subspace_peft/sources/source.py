"""Source adapters: PEFT LoRA folders, LoRA files, Hub ids, state dicts in memory, live PeftModels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._adapted import active_adapter
from .._io.digest import file_sha256
from ..basis.module import FLOAT_DTYPES, tensor_bytes
from ..cards.readme import front_matter
from ..errors import SourceError
from .converted import convert
from .diffusers_kohya import is_foreign, read_foreign
from .factors import Factors
from .locate import PICKLED, Place, locate, open_tensors
from .lora import config_problem, scaling, sort_keys
from .spans import Span

# the start takes its factors out of the base weights: the saved update means nothing on the base model itself
IN_MEMORY = "in memory"
MUTATED = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(eq=False)
class Source:
    """One source adapter, its tensors read when asked for.

    Attributes:
        name: what the basis calls it: the last part of its path or id, or the adapter's name.
        location: folder, Hub id, or "in memory".
        config: the LoRA configuration as a dict; empty for a bare state dict, whose scale then counts as 1.
        keys: ``{module: {"A": key, "B": key}}``.
        read: key → tensor.
        digest: what `sha256` gives; empty as long as nobody has read the whole file.
        revision: commit sha on the Hub, or None.
        folder: where its files lie on this machine, or None.
        file: that of its tensors, or None.
        norms: ‖ΔW‖_F per module, as far as asked for.
        aliases: module name in the fleet → module name in this source's own config, where they differ.
        license: what the front matter of its README says, or None.
        other_keys: tensors in it that are no LoRA factors, such as a classifier's (`modules_to_save`).
        scales: scale per module (under the source's own names) where no configuration has it, as in kohya's files.
        lost: share of its update's energy that its conversion from another method to LoRA lost.
        dtypes: of the tensors read so far.
        in_file: whether `file` is a safetensors file whose byte ranges are the tensors that `read` gives; else `read`
            has them in memory.
        spans: tensor name → where it lies in such a file, and
        stamp: the file's size in bytes and time of change in ns, both from when it was scanned.
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
    lost: float = 0.0
    dtypes: set[str] = field(default_factory=set)
    in_file: bool = False
    spans: Mapping[str, Span] | None = None
    stamp: tuple[int, int] | None = None

    @property
    def sha256(self) -> str:
        """Hex digest of the weights' file, or of the tensors of a source in memory."""
        if not self.digest and self.file is not None:
            self.digest = file_sha256(self.file)
        return self.digest

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None

    @property
    def task_type(self) -> str | None:
        kind = self.config.get("task_type")
        return None if kind is None else str(getattr(kind, "value", kind))

    @property
    def biases(self) -> list[str]:
        """Keys of the base model's biases that were trained with it."""
        trained = self.config.get("bias", "none") != "none"
        return [
            key for key in self.other_keys if trained and key.endswith(".bias") and not _is_saved(key, self.config)
        ]

    def raw(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored ``lora_B`` (out, r) and ``lora_A`` (r, in) in float64, without their scale; a convolution's as
        matrices."""
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
        """Raise `SourceError` where a factor's dtype or number of dimensions is none that is supported; else note the
        dtype."""
        if value.dtype not in FLOAT_DTYPES:
            raise SourceError(f"{self.location}: {key} has dtype {value.dtype}, which is no float. Save it again.")
        if value.dim() not in (2, 4):
            raise SourceError(
                f"{self.location}: {key} has shape {tuple(value.shape)}; linear layers, embeddings and two-dimensional"
                " convolutions are supported. Leave the others out of the adapter's target_modules."
            )
        if not value.numel():
            raise SourceError(
                f"{self.location}: {key} has shape {tuple(value.shape)}, which holds nothing. Leave this adapter out."
            )
        self.dtypes.add(str(value.dtype).removeprefix("torch."))

    def not_finite(self, key: str) -> SourceError:
        return SourceError(f"{self.location}: {key} holds NaN or infinite values. Leave this adapter out.")

    def truncated(self) -> SourceError:
        return SourceError(f"{self.location}: {self.file} ended before its header said. It was changed meanwhile.")

    def check_pair(self, module: str, B: tuple[int, ...], A: tuple[int, ...]) -> None:
        """Raise `SourceError` where factors of these shapes do not multiply."""
        if B[1] != A[0]:
            raise SourceError(
                f"{self.location}: module {module!r} has lora_B {B} and lora_A {A}, which do not multiply. The file is"
                " damaged: save the adapter again."
            )

    def shape(self, module: str) -> tuple[int, int, int]:
        """``out``, ``in`` and rank of the update of one module, from the file's header where the source was
        scanned."""
        keys = (self.keys[module][side] for side in ("B", "A"))
        B, A = (self.read(key).shape if self.spans is None else self.spans[key].shape for key in keys)
        return B[0], math.prod(A[1:]), A[0]

    @property
    def ranks(self) -> list[int]:
        """The ranks that its modules have, ascending."""
        return sorted({self.shape(module)[2] for module in self.keys})

    def weight_shape(self, module: str) -> list[int] | None:
        """The base weight's shape, where it is no linear layer's: of an embedding (tokens, dimension), of a
        convolution its four."""
        A, B = (self.read(self.keys[module][side]) for side in ("A", "B"))
        if A.dim() == 4:
            return [B.shape[0], *A.shape[1:]]
        return [A.shape[1], B.shape[0]] if "lora_embedding_" in self.keys[module]["A"] else None

    def factors(self, module: str) -> Factors:
        """``ΔW = s B A`` of one module, scale folded in."""
        B, A = self.raw(module)
        return Factors(B * self.scale(module, A.shape[0]), A)

    def scale(self, module: str, rank: int) -> float:
        """What B A of rank `rank` is multiplied by to be the module's update. Raises `SourceError` where the config
        says another rank."""
        own = self.aliases.get(module, module)
        try:
            known = self.scales.get(own, None if self.config else 1.0)
            return scaling(self.config, own, rank) if known is None else known
        except ValueError as error:
            raise SourceError(
                f"{self.location}: {error}. The config and the weights do not belong together."
            ) from None

    def norm(self, module: str) -> float:
        """‖ΔW‖_F of one module."""
        if module not in self.norms:
            self.norms[module] = self.factors(module).norm()
        return self.norms[module]


def open_source(
    reference: Any, *, token: str | bool | None = None, allow_bin: bool = False, base_model: nn.Module | None = None
) -> Source:
    """Open a source adapter.

    Args:
        reference: the folder of a PEFT LoRA; a LoRA file of diffusers or kohya; a Hub id,
            ``org/name[@revision][:folder or file inside]``; a LoRA state dict, alone (its scale then counts as 1) or
            as ``(state_dict, LoraConfig or dict)``; or a live PeftModel (its active adapter).
        token: as in huggingface_hub.
        allow_bin: take pickled weights, read with ``weights_only=True``.
        base_model: the model that the adapter adapts: needed for adapters of PEFT's other methods, which
            `convert_to_lora` then turns into LoRA factors, and for kohya files whose modules' names cannot be told
            otherwise. It is left as it was.

    Raises:
        SourceError: it is none of these, or it cannot be read; names what and the remedy.
    """
    if isinstance(reference, Source):
        return reference
    if isinstance(reference, (str, Path)):
        return _from_files(locate(str(reference), token=token, allow_bin=allow_bin), base_model)
    if isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], Mapping):
        return _from_state_dict(dict(reference[0]), _as_dict(reference[1]), IN_MEMORY)
    if isinstance(reference, Mapping):
        return _from_state_dict(dict(reference), {}, IN_MEMORY)
    if hasattr(reference, "peft_config"):
        return _from_model(reference)
    raise SourceError(
        "A source adapter is a LoRA folder or file, a Hub id, a state dict, (state_dict, config), or a PeftModel; got"
        f" {type(reference).__name__}."
    )


def is_one_source(reference: Any) -> bool:
    """Whether `reference` is one source adapter, where a list of them is expected."""
    pair = isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], Mapping)
    return pair or isinstance(reference, (str, Path, Mapping, Source)) or hasattr(reference, "peft_config")


def _from_model(model: Any) -> Source:
    from peft import get_peft_model_state_dict

    adapter = active_adapter(model)
    config = _as_dict(model.peft_config[adapter])
    source = _from_state_dict(get_peft_model_state_dict(model, adapter_name=adapter), config, IN_MEMORY)
    source.name = adapter
    return source


def _from_state_dict(tensors: dict[str, torch.Tensor], config: dict[str, Any], location: str) -> Source:
    keys = _keys(tensors, config, location)
    digest = hashlib.sha256()
    for key in sorted(key for sides in keys.values() for key in sides.values()):
        value = tensors[key]
        digest.update(f"{key}:{value.dtype}:{list(value.shape)};".encode())
        digest.update(tensor_bytes(value))
    others = _others(tensors)
    return Source("adapter", location, config, keys, tensors.__getitem__, digest.hexdigest(), other_keys=others)


def _from_files(place: Place, base_model: nn.Module | None) -> Source:
    names, read, metadata = open_tensors(place.weights, place.location)
    # hashed when the file is read for other reasons anyway, or when somebody asks
    common = {"digest": "", "revision": place.revision, "folder": place.weights.parent}
    common |= {"file": place.weights, "license": _license(place.weights.parent)}
    if place.config is not None and _method(place.config) not in ("LORA", "SUBSPACE") and base_model is not None:
        state = {name: read(name) for name in names}
        factors, lost = convert(place.config, state, base_model, place.location)
        keys = sort_keys(factors)[0]
        saved = tuple(name for name in state if _is_saved(name, place.config))
        tensors = factors | {name: state[name] for name in saved}
        return Source(
            place.name,
            place.location,
            place.config,
            keys,
            tensors.__getitem__,
            **common,
            other_keys=saved,
            scales=dict.fromkeys(keys, 1.0),
            lost=lost,
        )
    common |= {"in_file": place.weights.suffix not in PICKLED}
    if place.config is None or is_foreign(names):
        bases = [] if base_model is None else [name for name, _ in base_model.named_modules()]
        found = read_foreign(names, read, metadata, bases)
        if found.problems:
            raise SourceError(f"{place.location}: " + "; ".join(found.problems[:5]) + ".")
        if not found.keys:
            raise SourceError(
                f"{place.location}: {place.weights.name} holds no LoRA tensors. It is no LoRA, or it was saved empty."
            )
        return Source(
            place.name,
            place.location,
            place.config or {},
            found.keys,
            read,
            **common,
            other_keys=found.others,
            scales=found.scales,
        )
    keys = _keys(names, place.config, place.location)
    return Source(place.name, place.location, place.config, keys, read, **common, other_keys=_others(names))


def _is_saved(key: str, config: Mapping[str, Any]) -> bool:
    return any(f".{name}." in f".{key}" for name in config.get("modules_to_save") or [])


def _method(config: Mapping[str, Any]) -> str:
    kind = config.get("peft_type", "LORA")
    return str(getattr(kind, "value", kind))


def _license(folder: Path) -> str | None:
    said = front_matter(folder / "README.md")
    # "other" stands for a licence that is named beside it
    named = said.get("license_name") if said.get("license") == "other" else None
    found = named or said.get("license")
    return ", ".join(map(str, found)) if isinstance(found, list) else None if found is None else str(found)


def _keys(names: Any, config: dict[str, Any], location: str) -> dict[str, dict[str, str]]:
    kind = _method(config)
    if kind == "SUBSPACE":
        raise SourceError(
            f"{location}: the adapter's peft_type is SUBSPACE, not LORA: a task in a basis. Export it with"
            " `subspace-peft export-lora`."
        )
    if kind != "LORA":
        raise SourceError(
            f"{location}: the adapter's peft_type is {kind}, not LORA. Pass its base model, base_model="
            " (--base-model), and it is converted, or convert it with PEFT's `save_as_lora` first."
        )
    keys, problems = sort_keys(names)
    if problem := config_problem(config):
        problems.append(problem)
    if config.get("use_dora"):
        problems.append("it was trained with use_dora=True, which is no low-rank update; train it without")
    start = str(config.get("init_lora_weights") or "")
    if start.startswith(MUTATED):
        problems.append(
            f"it was trained with init_lora_weights={start!r}, which changes the base weights, so its update does not"
            " belong to the base model: save it with PEFT's path_initial_model_for_weight_conversion, which makes a"
            " plain LoRA of it"
        )
    if problems:
        raise SourceError(f"{location}: " + "; ".join(problems[:5]) + ".")
    if not keys:
        raise SourceError(f"{location}: no lora_A/lora_B tensors inside. It is no LoRA, or it was saved empty.")
    return keys


def _others(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if ".lora_" not in name))


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    raise SourceError(f"An adapter's config is a LoraConfig or a dict, got {type(config).__name__}.")
