"""What lies in a folder or file that is about to be written: of which kind it is, and which basis it is about."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .untrusted import MOST_JSON_BYTES, parse_json, read_json

BASIS, CLUSTERS, TASK, LORA, ADAPTER = "a basis", "clusters of bases", "a task", "a LoRA", "an adapter"
BUNDLE, BANK, GGUF, REPORT = "a bundle", "a bank", "a LoRA in GGUF", "a report"
REPORT_PAGE = "a report's page"  # one file
MODEL, GIT, FILES = "a model", "a git repository", "files"

# kind → the files that make it
FILES_OF = {
    BASIS: ("basis_config.json", "basis.safetensors"),
    CLUSTERS: ("clusters.json",),
    TASK: ("adapter_config.json", "adapter_model.safetensors"),
    LORA: ("adapter_config.json", "adapter_model.safetensors"),
    BUNDLE: ("bundle.safetensors",),
    REPORT: ("report.json", "report.html"),
}
# of them and of others that are written with them: files that would be replaced whatever they are
FIGURES = ("spectrum.png", "energy.png", "modules.png", "adapters.png")
TABLES = ("modules.csv", "adapters.csv")
REPLACED = {**FILES_OF, REPORT: (*FILES_OF[REPORT], *FIGURES, *TABLES)}
PICKLED = "adapter_model.bin"
DIFFUSERS = "pytorch_lora_weights.safetensors"
MODEL_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
)
# the key under which the exports of this package name their basis
MARK = "subspace_peft"
GGUF_MARK = "subspace_peft.basis_fingerprint"
GGUF_HEAD = 1 << 16
# in the head of a report's page: the fingerprint of its basis
REPORT_MARK = re.compile(rb'name="subspace-peft-basis" content="([0-9a-f]{64})"')
REPORT_HEAD = 1 << 12


@dataclass(frozen=True)
class Found:
    """A thing that lies at a place.

    Attributes:
        kind: one of this module's kinds.
        files: the names of its files, those that are there.
        basis: fingerprint of the basis that it is, is on, or was exported from, where it says so.
        tasks: names of the tasks in it, of a bundle or a bank.
        needs: of a task or bundle, where it takes its basis from: "folder", or "hub" where a commit there is recorded;
            empty where it carries the basis itself.
        more: words that tell it from others of its kind, such as the method of an adapter.
    """

    kind: str
    files: tuple[str, ...]
    basis: str | None = None
    tasks: frozenset[str] = frozenset()
    needs: str = ""
    more: str = ""

    def __str__(self) -> str:
        named = ", ".join(self.files[:3]) + (" …" if len(self.files) > 3 else "")
        words = self.more or self.kind
        of = "" if self.basis is None else f"fingerprint {self.basis[:12]}" if self.kind == BASIS else ""
        if self.basis is not None and not of:
            of = f"{'from' if self.kind in (LORA, GGUF) else 'on'} the basis {self.basis[:12]}"
        return f"{words} ({', '.join(filter(None, (named, of)))})"


def look(place: Path) -> list[Found]:
    """Return the things that lie at `place`, a folder or a file; none where nothing is there.

    Nothing but configs and headers is read, and what cannot be read counts as foreign files.

    Raises:
        OSError: the place cannot be looked at.
    """
    if place.is_dir():
        return list(_in_folder(place))
    return [_of_file(place)] if place.is_file() else []


def _in_folder(folder: Path) -> Iterator[Found]:
    names = {entry.name for entry in folder.iterdir()}
    if "basis_config.json" in names:
        yield Found(BASIS, _there(names, BASIS), _text(_read(folder / "basis_config.json").get("fingerprint")))
    if "clusters.json" in names:
        listed = _read(folder / "clusters.json").get("clusters")
        prints = [str(each.get("fingerprint")) for each in listed or [] if isinstance(each, dict)]
        yield Found(CLUSTERS, _there(names, CLUSTERS), " ".join(prints))
    if names & {"adapter_config.json", "adapter_model.safetensors", PICKLED}:
        yield from _adapter(folder, names)
    if DIFFUSERS in names:
        yield Found(LORA, (DIFFUSERS,), export_mark(folder / DIFFUSERS))
    if "bundle.safetensors" in names:
        found = _of_file(folder / "bundle.safetensors")
        more = "a file that is no bundle" if found.kind == FILES else ""
        yield Found(BUNDLE, ("bundle.safetensors",), found.basis, found.tasks, found.needs, more)
    if (about := _report_in(folder, names)) is not None:
        yield Found(REPORT, _there(names, REPORT), about)
    if "model_index.json" in names or _is_model(folder, names):
        yield Found(MODEL, tuple(sorted(names & {"model_index.json", "config.json", *MODEL_WEIGHTS})))
    if ".git" in names:
        yield Found(GIT, (".git",))


def _report_in(folder: Path, names: set[str]) -> str | None:
    """Return the fingerprint of the basis that a report in a folder is about; None where none is there."""
    # files of these names may be of any program
    if "report.html" in names and (mark := report_mark(folder / "report.html")) is not None:
        return mark
    about = _read(folder / "report.json").get("basis") if "report.json" in names else None
    return _text(about.get("fingerprint")) if isinstance(about, dict) else None


def _adapter(folder: Path, names: set[str]) -> Iterator[Found]:
    weights = tuple(sorted(names & {"adapter_model.safetensors", PICKLED}))
    config = _read(folder / "adapter_config.json")
    kind = config.get("peft_type")
    files = (*(("adapter_config.json",) if "adapter_config.json" in names else ()), *weights)
    if kind == "SUBSPACE":
        if weights:
            needs = "" if config.get("basis_modules") is not None else _place_of(config)
            yield Found(TASK, files, _text(config.get("basis_fingerprint")), needs=needs)
    elif kind == "LORA":
        yield Found(LORA, files, export_mark(folder / "adapter_model.safetensors"))
    elif isinstance(kind, str):
        yield Found(ADAPTER, files, more=f"a {kind[:40]} adapter")
    else:
        yield Found(FILES, files, more="files of an adapter whose config cannot be read")


def _is_model(folder: Path, names: set[str]) -> bool:
    weights = names & {*MODEL_WEIGHTS} or any(name.startswith("model-") and "-of-" in name for name in names)
    if "config.json" not in names or not weights:
        return False
    return bool(_read(folder / "config.json").keys() & {"model_type", "architectures", "_class_name"})


def _of_file(file: Path) -> Found:
    name = (file.name,)
    if (mark := gguf_mark(file)) is not None:
        return Found(GGUF, name, mark or None)
    if file.suffix == ".html" and (mark := report_mark(file)) is not None:
        return Found(REPORT_PAGE, name, mark)
    index = _metadata(file).get("bank")
    try:
        known = parse_json(index) if isinstance(index, str) else {}
    except ValueError:
        known = {}
    if not known:
        return Found(FILES, name, more="a file")
    tasks = [each for key in ("tasks", "apart") for each in known.get(key) or [] if isinstance(each, str)]
    config = known.get("config")
    needs = _place_of(config) if isinstance(config, dict) else ""
    kind = BANK if config is None else BUNDLE
    return Found(kind, name, _text(known.get("basis_fingerprint")), frozenset(tasks), needs)


def _place_of(config: dict[str, Any]) -> str:
    return "folder" if config.get("basis_revision") is None else "hub"


def export_mark(file: Path) -> str | None:
    """Return the fingerprint of the basis that a safetensors file was exported from by this package, or None."""
    return _text(_metadata(file).get(MARK))


def gguf_mark(file: Path) -> str | None:
    """Return the fingerprint of the basis that a GGUF file was exported from; "" of others, None of other files."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(GGUF_HEAD)
    except OSError:
        return None
    if not head.startswith(b"GGUF"):
        return None
    _, found, rest = head.partition(GGUF_MARK.encode())
    # behind the key: the value's type, of 4 bytes, and its length, of 8
    return rest[12:76].decode("ascii", "replace") if found else ""


def report_mark(file: Path) -> str | None:
    """Return the fingerprint of the basis that a report's page is about; None of other files."""
    try:
        with open(file, "rb") as stream:
            found = REPORT_MARK.search(stream.read(REPORT_HEAD))
    except OSError:
        return None
    return found[1].decode() if found else None


def _metadata(file: Path) -> dict[str, Any]:
    """Return the metadata of a safetensors file; empty where it is none."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MOST_JSON_BYTES, file.stat().st_size):
                return {}
            found = parse_json(stream.read(length)).get("__metadata__")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sort_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in the order of its keys; safetensors' own differs between processes."""
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


def _there(names: set[str], kind: str) -> tuple[str, ...]:
    return tuple(name for name in FILES_OF[kind] if name in names)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {}


def _text(value: Any) -> str | None:
    return value[:64] if isinstance(value, str) else None
