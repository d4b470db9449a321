"""Keep finished modules in a folder, so that an interrupted build goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._io.atomic import write_aside
from .._io.disk import number_of
from .._version import __version__
from ..basis import ModuleBasis
from ..basis.module import TENSOR_NAMES, tensor_sha256
from ..errors import DiskError, SubspaceError
from ..sources.source import Source

OURS = re.compile(r"[0-9a-f]{24}")
FACTS = "facts"
TABLE = "table"


class WorkFolder:
    """A folder of one build's finished modules, one file each, written aside and renamed.

    They lie in a folder of their own, named after what the build is made from: the sources' sha256, names, configs and
    norms, the arguments, and the versions of this package and of torch, whose rounding may differ. Another build does
    not see them.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], arguments: Mapping[str, Any]) -> None:
        made_from = {
            # the norms tell sources apart that one file became on different base models
            "sources": [[s.name, s.sha256, s.config, list(s.keys), s.scales, s.norms] for s in sources],
            "arguments": dict(arguments),
            "subspace_peft": __version__,
            "torch": torch.__version__,
        }
        text = json.dumps(made_from, sort_keys=True, default=_plain)
        if folder.exists() and not folder.is_dir():
            raise SubspaceError(
                f"{folder} is a file, but finished modules are kept in a folder. Give another work folder, or move the"
                " file."
            )
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:24]

    def get(self, name: str) -> tuple[ModuleBasis, dict[str, Any]] | None:
        """Return a finished module and its facts; None where there is none, or where its file is damaged."""
        try:
            with safe_open(self._file(name), framework="pt", device="cpu") as file:
                facts = json.loads(file.metadata()[FACTS])
                present = {key: file.get_tensor(key) for key in file.keys() if key in TENSOR_NAMES}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        if not {"U", "V"} <= present.keys():
            return None
        module = ModuleBasis(**present)
        return (module, facts["facts"]) if [name, module.digest()] == [facts["module"], facts["sha256"]] else None

    def put(self, name: str, module: ModuleBasis, facts: Mapping[str, Any]) -> None:
        """Keep a finished module. Raises `OSError` where the disk refuses, saying what is kept and how to go on."""
        tensors = {key: value.contiguous() for key, value in module.tensors().items()}
        text = json.dumps({"module": name, "sha256": module.digest(), "facts": dict(facts)})
        try:
            write_aside(self._file(name), lambda path: save_file(tensors, path, metadata={FACTS: text}))
        except (OSError, SafetensorError) as error:
            done = len(list(self.folder.glob("*.safetensors"))) if self.folder.is_dir() else 0
            raise DiskError(
                number_of(error),
                f"Module {name!r} cannot be kept: {error} {done} finished modules are kept in {self.folder}; once that"
                " is possible, the same call goes on from them.",
            ) from error

    def get_table(self, name: str) -> torch.Tensor | None:
        """Return the table measured of a module before any was built; None where there is none, or it is damaged."""
        try:
            with safe_open(self._file(name, "table"), framework="pt", device="cpu") as file:
                value = file.get_tensor(TABLE)
                facts = json.loads(file.metadata()[FACTS])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        return value if [name, tensor_sha256(value)] == [facts["module"], facts["sha256"]] else None

    def put_table(self, name: str, value: torch.Tensor) -> None:
        """Keep a table measured of a module. Raises `OSError` where the disk refuses."""
        text = json.dumps({"module": name, "sha256": tensor_sha256(value)})
        tensors = {TABLE: value.contiguous()}
        write_aside(self._file(name, "table"), lambda path: save_file(tensors, path, metadata={FACTS: text}))

    def _file(self, name: str, ending: str = "safetensors") -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.{ending}"


def forget(folder: Path) -> None:
    """Remove what builds have kept in `folder`, and the folder itself if nothing else lies in it."""
    # several processes may do so at once
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            if entry.is_dir() and OURS.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
        folder.rmdir()


def _plain(value: Any) -> Any:
    """Return JSON for any value of a LoraConfig's dict; the same text in every process."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else f"{type(value).__name__}"
