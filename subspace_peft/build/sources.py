"""Source adapters: PEFT LoRA folders, Hub ids with a revision, state dicts in memory, live PeftModels."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .._adapted import active_adapter
from ..basis.module import FLOAT_DTYPES, tensor_bytes
from ..basis.reference import looks_like_path, split_revision
from ..errors import SourceError
from .factors import Factors
from .lora import scaling, sort_keys

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# the start takes its factors out of the base weights: the saved update means nothing on the base model itself
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
        norms: ‖ΔW‖_F per module, as far as asked for.
        aliases: module name in the fleet → module name in this source's own config, where they differ.
        other_keys: tensors in it that are no LoRA factors, such as a classifier's (`modules_to_save`).
        file: a safetensors file whose byte ranges are the tensors that `read` gives; None where there is none.
        spans: tensor name → where it lies in the file, and
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
    norms: dict[str, float] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    other_keys: tuple[str, ...] = ()
    file: Path | None = None
    spans: Mapping[str, Any] | None = None
    stamp: tuple[int, int] | None = None

    @property
    def sha256(self) -> str:
        """Hex digest of the weights' file, or of the tensors of a source in memory."""
        if not self.digest and self.file is not None:
            self.digest = _sha256(self.file)
        return self.digest

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None

    def raw(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored ``lora_B`` (out, r) and ``lora_A`` (r, in) in float64, without their scale; a convolution's as matrices."""
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
        """Raise `SourceError` where a factor's dtype or number of dimensions is none that is supported."""
        if value.dtype not in FLOAT_DTYPES:
            raise SourceError(f"{self.location}: {key} has dtype {value.dtype}, which is no float. Save it again.")
        if value.dim() not in (2, 4):
            raise SourceError(
                f"{self.location}: {key} has shape {tuple(value.shape)}; linear layers, embeddings and two-dimensional "
                "convolutions are supported. Leave the others out of the adapter's target_modules."
            )

    def not_finite(self, key: str) -> SourceError:
        return SourceError(f"{self.location}: {key} holds NaN or infinite values. Leave this adapter out.")

    def check_pair(self, module: str, B: tuple[int, ...], A: tuple[int, ...]) -> None:
        """Raise `SourceError` where factors of these shapes do not multiply."""
        if B[1] != A[0]:
            raise SourceError(
                f"{self.location}: module {module!r} has lora_B {B} and lora_A {A}, which do not multiply. The file is "
                "damaged: save the adapter again."
            )

    def weight_shape(self, module: str) -> list[int] | None:
        """The base weight's shape, where it is no linear layer's: of an embedding (tokens, dimension), of a convolution its four."""
        A, B = (self.read(self.keys[module][side]) for side in ("A", "B"))
        if A.dim() == 4:
            return [B.shape[0], *A.shape[1:]]
        return [A.shape[1], B.shape[0]] if "lora_embedding_" in self.keys[module]["A"] else None

    def factors(self, module: str) -> Factors:
        """``ΔW = s B A`` of one module, scale folded in."""
        B, A = self.raw(module)
        return Factors(B * self.scale(module, A.shape[0]), A)

    def scale(self, module: str, rank: int) -> float:
        """What B A of rank `rank` is multiplied by to be the module's update. Raises `SourceError` where the config says another rank."""
        try:
            return scaling(self.config, self.aliases.get(module, module), rank) if self.config else 1.0
        except ValueError as error:
            raise SourceError(
                f"{self.location}: {error}. The config and the weights do not belong together."
            ) from None

    def norm(self, module: str) -> float:
        """‖ΔW‖_F of one module."""
        if module not in self.norms:
            self.norms[module] = self.factors(module).norm()
        return self.norms[module]


def open_source(reference: Any, *, token: str | bool | None = None) -> Source:
    """Open a source adapter.

    Args:
        reference: the folder of a PEFT LoRA; a Hub id, with ``@revision`` if wanted; a LoRA state dict, alone (its
            scale then counts as 1) or as ``(state_dict, LoraConfig or dict)``; or a live PeftModel (its active adapter).
        token: as in huggingface_hub.

    Raises:
        SourceError: it is none of these, or it cannot be read; names what and the remedy.
    """
    if isinstance(reference, Source):
        return reference
    if isinstance(reference, (str, Path)):
        return _from_files(str(reference), token)
    if isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], Mapping):
        return _from_state_dict(dict(reference[0]), _as_dict(reference[1]), "in memory")
    if isinstance(reference, Mapping):
        return _from_state_dict(dict(reference), {}, "in memory")
    if hasattr(reference, "peft_config"):
        return _from_model(reference)
    raise SourceError(
        f"A source adapter is a LoRA folder, a Hub id, a state dict, (state_dict, config), or a PeftModel; got "
        f"{type(reference).__name__}."
    )


def is_one_source(reference: Any) -> bool:
    """Whether `reference` is one source adapter, where a list of them is expected."""
    pair = isinstance(reference, tuple) and len(reference) == 2 and isinstance(reference[0], Mapping)
    return pair or isinstance(reference, (str, Path, Mapping, Source)) or hasattr(reference, "peft_config")


def _from_model(model: Any) -> Source:
    from peft import get_peft_model_state_dict

    adapter = active_adapter(model)
    config = _as_dict(model.peft_config[adapter])
    source = _from_state_dict(get_peft_model_state_dict(model, adapter_name=adapter), config, "in memory")
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


def _from_files(reference: str, token: str | bool | None) -> Source:
    folder, revision, location = Path(reference).expanduser(), None, reference
    if not folder.is_dir():
        if folder.exists() or looks_like_path(reference):
            raise SourceError(f"{reference}: there is no such folder. A source is the folder of a saved PEFT LoRA.")
        folder, revision, location = _download(reference, token)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{location}: {CONFIG_FILE} cannot be read ({error}). A source is the folder of a saved PEFT LoRA."
        ) from error
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        other = "adapter_model.bin"
        remedy = (
            f"it holds {other}, which would have to be unpickled: load it with PEFT and save it with safetensors"
            if (folder / other).is_file()
            else "save the adapter with `model.save_pretrained(folder)`"
        )
        raise SourceError(f"{location}: there is no {WEIGHTS_FILE}; {remedy}.")
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{location}: {WEIGHTS_FILE} cannot be read ({error}). It is truncated or damaged: fetch or save it again."
        ) from error

    def read(key: str) -> torch.Tensor:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return tensors.get_tensor(key)

    keys = _keys(names, config, location)
    name = Path(reference.split("@")[0].rstrip("/")).name or reference
    return Source(name, location, config, keys, read, "", revision, folder, other_keys=_others(names), file=file)


def _download(reference: str, token: str | bool | None) -> tuple[Path, str | None, str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    repo, revision = split_revision(reference)
    try:
        config = Path(hf_hub_download(repo, CONFIG_FILE, revision=revision, token=token))
        sha = config.parent.name if config.parent.parent.name == "snapshots" else None
        with contextlib.suppress(FileNotFoundError):
            hf_hub_download(repo, WEIGHTS_FILE, revision=sha or revision, token=token)
    except (OSError, ValueError, HFValidationError) as error:
        raise SourceError(
            f"{reference}: there is no such folder, and the Hub gave no adapter of that id (revision "
            f"{revision or 'main'}): {error}"
        ) from error
    return config.parent, sha, repo


def _keys(names: Any, config: dict[str, Any], location: str) -> dict[str, dict[str, str]]:
    kind = config.get("peft_type", "LORA")
    if str(getattr(kind, "value", kind)) != "LORA":
        raise SourceError(
            f"{location}: the adapter's peft_type is {kind}, not LORA. Convert it with PEFT's `save_as_lora` first."
        )
    keys, problems = sort_keys(names)
    if config.get("use_dora"):
        problems.append("it was trained with use_dora=True, which is no low-rank update; train it without")
    start = str(config.get("init_lora_weights") or "")
    if start.startswith(MUTATED):
        problems.append(
            f"it was trained with init_lora_weights={start!r}, which changes the base weights, so its update does not belong "
            "to the base model: save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
