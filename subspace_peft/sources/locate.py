"""Find a source adapter's files: in a folder, as a single file, or in a Hub repository at a revision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .._io.untrusted import read_json
from ..errors import DiskError, HubUnavailableError, SourceError
from ..hub import fetch as fetch_file
from ..hub import looks_like_path, only_local, split_inside
from ..hub_requests import refusal
from .other_formats import format_of_config, format_of_file, format_of_folder, format_of_keys

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PICKLED_FILE = "adapter_model.bin"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
NO_ADAPTER = f"A source is the folder of a saved PEFT LoRA, with {CONFIG_FILE}, or a LoRA file of diffusers or kohya"


@dataclass(frozen=True)
class SourceFiles:
    """The files of one source adapter on this machine.

    Attributes:
        name: the last part of the reference.
        location: the reference without its revision, which finds the source again.
        weights: the file of its tensors.
        config: the adapter's configuration; None where it has none, as diffusers' and kohya's files.
        revision: commit sha on the Hub, or None.
    """

    name: str
    location: str
    weights: Path
    config: dict[str, Any] | None
    revision: str | None = None


def locate(reference: str, *, token: str | bool | None = None, allow_bin: bool = False) -> SourceFiles:
    """Find a source's files; fetch those of a Hub id.

    Args:
        reference: a folder, a file, or ``org/name[@revision][:folder or file inside]``.
        token: as in huggingface_hub.
        allow_bin: take pickled weights too, which `open_tensors` reads with ``weights_only=True``.

    Raises:
        SourceError: nothing is there, or no adapter; names the fault and the remedy.
        HubUnavailableError: the Hub does not answer.
    """
    try:
        path = Path(reference).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"{reference[:200]!r}: there can be no such folder ({error}). Pass that of a saved PEFT LoRA."
        ) from error
    if path.is_dir():
        return _in_folder(path, reference, Path(os.path.abspath(path)).name, allow_bin)
    if path.is_file():
        if path.name in (WEIGHTS_FILE, PICKLED_FILE) and (path.parent / CONFIG_FILE).is_file():
            return SourceFiles(
                Path(os.path.abspath(path)).parent.name, reference, path, _config(path.parent / CONFIG_FILE, reference)
            )
        return _file(path, reference, allow_bin)
    if only_local(reference):
        on_hub = "" if looks_like_path(reference) else " One on the Hub is org/name, or org/name@main."
        raise SourceError(f"{reference}: there is no such folder or file. {NO_ADAPTER}.{on_hub}")
    return _on_hub(reference, token, allow_bin)


def open_tensors(file: Path, location: str) -> tuple[list[str], Callable[[str], torch.Tensor], dict[str, str]]:
    """Return a file's keys, a function that reads the tensor of a key, and the file's metadata.

    Pickled files are read with ``weights_only=True``, all at once.

    Args:
        file: of the tensors.
        location: named in errors.

    Raises:
        SourceError: the file is damaged, or a pickled one holds something else than tensors.
    """
    if file.suffix in PICKLED:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # an untrusted file may raise anything, pickle's own errors among it
            raise SourceError(
                f"{location}: {file.name} cannot be read with weights_only=True ({str(error).splitlines()[0]}). It is"
                " damaged, or it holds code: ask for a safetensors file."
            ) from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            inner = [each for each in state.values() if isinstance(each, dict)] if isinstance(state, dict) else []
            _refuse_form(next(filter(None, (format_of_keys(map(str, each)) for each in inner)), None), location)
            raise SourceError(f"{location}: {file.name} is no plain dict of tensors. Ask for a safetensors file.")
        return list(state), state.__getitem__, {}

    def read(key: str) -> torch.Tensor:
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                return tensors.get_tensor(key)
        except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
            raise SourceError(
                f"{location}: {key} cannot be read ({error}). Fetch or save the adapter again."
            ) from error

    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return list(tensors.keys()), read, dict(tensors.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{location}: {file.name} cannot be read ({error}). It is truncated or damaged: fetch or save it again."
        ) from error


def _in_folder(folder: Path, location: str, name: str, allow_bin: bool, revision: str | None = None) -> SourceFiles:
    if not (folder / CONFIG_FILE).is_file():
        if (folder / DIFFUSERS_FILE).is_file():
            return SourceFiles(name, location, folder / DIFFUSERS_FILE, None, revision)
        _refuse_form(format_of_folder(folder), location)
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f" Name its file, {folder / files[0]}." if files else ""
        hint = f" Its folders are: {folder}/*." if inner else hint
        raise SourceError(f"{location}: {CONFIG_FILE} is not in there. {NO_ADAPTER}.{hint}")
    config = _config(folder / CONFIG_FILE, location)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        if not (folder / PICKLED_FILE).is_file():
            _refuse_form(format_of_folder(folder), location)
            raise SourceError(
                f"{location}: there is no {WEIGHTS_FILE}; save the adapter with `model.save_pretrained(folder)`."
            )
        weights = _allowed(folder / PICKLED_FILE, location, allow_bin)
    return SourceFiles(name, location, weights, config, revision)


def _file(path: Path, location: str, allow_bin: bool, revision: str | None = None) -> SourceFiles:
    _refuse_form(format_of_file(path), location)
    if path.suffix in PICKLED:
        _allowed(path, location, allow_bin)
    elif path.suffix != ".safetensors":
        raise SourceError(f"{location}: is no .safetensors file. {NO_ADAPTER}; a list of sources ends in .txt.")
    return SourceFiles(path.stem, location, path, None, revision)


def _refuse_form(form: str | None, location: str) -> None:
    if form is not None:
        raise SourceError(f"{location}: it is {form}.")


def _allowed(file: Path, location: str, allow_bin: bool) -> Path:
    if not allow_bin:
        raise SourceError(
            f"{location}: it holds {file.name}, which would have to be unpickled. Load it with PEFT and save it with"
            " safetensors, or read it with torch's weights_only=True by allow_bin=True (--allow-bin)."
        )
    return file


def _config(file: Path, location: str) -> dict[str, Any]:
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"{location}: {CONFIG_FILE} cannot be read ({error}). {NO_ADAPTER}.") from error
    _refuse_form(format_of_config(config), location)
    return config


def _on_hub(reference: str, token: str | bool | None, allow_bin: bool) -> SourceFiles:
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    repo, revision, inside = split_inside(reference)
    location = repo if inside is None else f"{repo}:{inside}"
    folder = "" if inside is None else f"{inside}/"
    name = Path(inside or repo).name
    pinned = [revision]

    def fetch(file: str) -> Path | None:
        try:
            path = fetch_file(repo, file, revision=pinned[-1], token=token)
        except LocalEntryNotFoundError:
            raise  # the Hub was not asked
        except EntryNotFoundError:
            return None
        # the snapshot's folder is the commit: asking for the rest at that sha cannot mix two revisions
        root = path.parents[file.count("/")]
        if root.parent.name == "snapshots":
            pinned.append(root.name)
        return path

    def sha() -> str | None:
        return pinned[-1] if len(pinned) > 1 else None

    try:
        if inside is not None and Path(inside).suffix in (".safetensors", *PICKLED):
            if Path(inside).suffix in PICKLED:
                _allowed(Path(inside), location, allow_bin)
            file = fetch(inside)
            if file is None:
                raise SourceError(
                    f"{reference}: there is no {inside} in the repository at revision {revision or 'main'}."
                )
            return _file(file, location, allow_bin, sha())
        config = fetch(folder + CONFIG_FILE)
        names = (DIFFUSERS_FILE,) if config is None else (WEIGHTS_FILE, *([PICKLED_FILE] if allow_bin else []))
        found = next(filter(None, map(fetch, (folder + each for each in names))), None)
        # for its licence only: the adapter is here whether the Hub gives it or not
        with contextlib.suppress(OSError):
            fetch(f"{folder}README.md")
    except (SourceError, HubUnavailableError, DiskError):
        raise
    except (OSError, ValueError, HFValidationError) as error:
        raise SourceError(
            f"{reference}: there is no such folder, and the Hub gave no adapter of that id (revision "
            f"{revision or 'main'}): {refusal(error, repo, revision)}"
        ) from error
    # another program's form is told before its missing file is
    known = None if config is None else _config(config, location)
    if config is None and found is None:
        raise SourceError(
            f"{reference}: the repository has no {folder}{CONFIG_FILE}. {NO_ADAPTER}. Name a folder or file inside it"
            f" as {repo}{'@' + revision if revision else ''}:folder."
        )
    if found is None:
        raise SourceError(
            f"{reference}: the repository has no {folder}{WEIGHTS_FILE}. Older adapters have {PICKLED_FILE}:"
            " allow_bin=True (--allow-bin) reads it with torch's weights_only=True."
        )
    return SourceFiles(name, location, found, known, sha())
