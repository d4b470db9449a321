"""`TaskExports`: a task's name → a LoRA folder, written when it is first asked for, in a cache addressed by
content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from .._io.untrusted import is_name
from ..basis import SubspaceBasis, resolve_basis
from ..basis.cache import cache_home
from ..basis.module import tensor_bytes
from ..convert.export import write_lora
from ..errors import BasisMismatchError, SubspaceError
from ..tasks.bank_file import read_index, read_rows
from ..tasks.read import Parts, SavedTask, read_task
from ..tuner.config import SubspaceConfig
from ..tuner.task_file import WEIGHTS_FILE

CONFIG_FILE = "adapter_config.json"
# raised whenever an export of the same task comes out otherwise
EXPORT_VERSION = 1


class TaskExports:
    """The tasks of a bank's file, or of a folder of saved tasks, as LoRA folders that other programs read.

    A folder is called by the task's name and a hash of all that goes into it. A task that is trained again gets
    another folder, and whoever holds the earlier one keeps reading what it had. Nothing is ever deleted: the cache may
    be emptied while no server runs.

    Args:
        tasks: a file that `TaskBank.save` wrote, or a folder whose subfolders are saved tasks.
        cache: where the LoRA folders go; ``exports`` in this package's cache by default.
        basis: where the basis is, if not where it is recorded or was seen before on this machine.
        rank: at most this rank, by truncation; None keeps all.
        dtype: of the written factors.

    Raises:
        SubspaceError: there is neither such a file nor such a folder.
    """

    def __init__(
        self,
        tasks: str | Path,
        *,
        cache: str | Path | None = None,
        basis: SubspaceBasis | str | None = None,
        rank: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tasks = Path(tasks).expanduser()
        if not self.tasks.exists():
            raise SubspaceError(
                f"{self.tasks}: there is nothing. Pass a file that `TaskBank.save` wrote, or a folder of saved tasks."
            )
        self.cache = Path(cache).expanduser() if cache is not None else cache_home() / "exports"
        self.basis, self.rank, self.dtype = basis, rank, dtype

    def names(self) -> list[str]:
        """The tasks that can be asked for. Raises `BadFileError` where a bank's file is damaged."""
        if self.tasks.is_dir():
            return sorted(folder.name for folder in self.tasks.iterdir() if (folder / CONFIG_FILE).is_file())
        return list(read_index(self.tasks)["tasks"])

    def find(self, name: str, base_model: str | None = None) -> Path | None:
        """The LoRA folder of the task `name`, exported now if it was not before; None where there is no such task.

        Args:
            name: as a request gives it, so anything: only names of tasks that are there lead to a file.
            base_model: name of the model that is to serve it.

        Raises:
            BasisMismatchError: the task belongs to another base model, both being Hub ids; or to another basis.
            SubspaceError: the task is damaged, its basis is nowhere, or its rank is beyond what vLLM serves.
        """
        if not is_name(name, most=255):
            return None
        if not self.tasks.is_dir():
            index = read_index(self.tasks)
            if name not in index["tasks"]:
                return None
            self._check_base(name, index.get("base_model_name_or_path"), base_model)
            cores = read_rows(self.tasks, name)
            about = json.dumps([index["basis_fingerprint"], index["modules"], index.get("weight_shapes")])
            content = [about.encode(), *(tensor_bytes(core) for core in cores.values())]
            return self._exported(name, content, lambda: self._of_bank(index, cores))
        # one part of a path and no other: a name from outside must not leave the folder
        if name in (".", "..") or re.search(r"[/\\:]", name) or not (self.tasks / name / CONFIG_FILE).is_file():
            return None
        folder = self.tasks / name
        given: dict[str, Any] = {} if self.basis is None else {"basis": self.basis}
        content = [(folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE) if (folder / file).is_file()]
        try:
            base = json.loads(content[0]).get("base_model_name_or_path")
        except (ValueError, AttributeError, RecursionError):
            base = None  # what is wrong with it is said when the task is read
        self._check_base(name, base, base_model)
        return self._exported(name, content, lambda: read_task(folder, **given))

    def _check_base(self, name: str, own: Any, asked: str | None) -> None:
        # two different Hub ids cannot be one model; folders may hold any copy
        ids = [text for text in (own, asked) if isinstance(text, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)]
        if len(ids) == 2 and ids[0] != ids[1] and not os.path.exists(ids[1]):
            raise BasisMismatchError(
                f"Task {name!r} belongs to the base model {own!r}, not to {asked!r}. Serve that one, or leave the task"
                " out."
            )

    def _of_bank(self, index: dict[str, Any], cores: dict[str, torch.Tensor]) -> SavedTask:
        basis = self.basis
        fingerprint = index["basis_fingerprint"]
        if not isinstance(basis, SubspaceBasis):
            basis = (
                resolve_basis(None, fingerprint=fingerprint)
                if basis is None
                else SubspaceBasis.from_pretrained(basis, fingerprint=fingerprint)
            )
        if basis.fingerprint != fingerprint:
            raise BasisMismatchError(
                f"{self.tasks}: its tasks are on the basis {fingerprint}, but {basis.fingerprint} was given. Pass that"
                " one."
            )
        config = SubspaceConfig(
            basis=basis,
            target_modules=list(index["modules"]),
            weight_shapes=index.get("weight_shapes"),
            base_model_name_or_path=index.get("base_model_name_or_path") or basis.base_model,
        )
        names = {module: basis.find(module) for module in cores}
        shapes = basis.shapes()
        for module, core in cores.items():
            known = None if names[module] is None else shapes[str(names[module])]
            if known is None or core.shape[0] > known["k_out"] or core.shape[1] > known["k_in"]:
                raise BasisMismatchError(
                    f"{self.tasks}: module {module!r} has cores {tuple(core.shape)}, for which the basis {fingerprint}"
                    " has no room. The file was altered: fetch or save it again."
                )
        parts = Parts({module: tuple(core.shape) for module, core in cores.items()}, basis, names)  # type: ignore[arg-type]
        return SavedTask(config, {module: core.double() for module, core in cores.items()}, parts, {})

    def _exported(self, name: str, content: list[bytes], make: Any) -> Path:
        digest = hashlib.sha256(f"{EXPORT_VERSION};{self.rank};{self.dtype};".encode())
        for part in content:
            digest.update(hashlib.sha256(part).digest())
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64]
        folder = self.cache / f"{readable}-{digest.hexdigest()[:32]}"
        if folder.is_dir():
            return folder
        task = make()
        if task.extras:
            raise SubspaceError(
                f"Task {name!r} has trained {sorted(task.extras)[0]} as well, which vLLM cannot serve with a LoRA."
                " Leave it out, or train it without modules_to_save."
            )
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=self.cache) as scratch:
            made = Path(scratch) / "lora"
            write_lora(task, made, rank=self.rank, pad_to="vllm", dtype=self.dtype)
            try:
                made.rename(folder)
            except OSError:
                # another process was faster, with the same content
                if not folder.is_dir():
                    raise
        return folder
