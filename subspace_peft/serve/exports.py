"""Export a task as a LoRA folder when its name is first asked for, into a cache addressed by content."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .._io.disk import writing
from .._io.untrusted import is_name
from .._shown import Shown, short
from ..base_names import SAME, read_name, relation
from ..basis import SubspaceBasis, resolve_basis
from ..basis.cache import cache_home
from ..basis.module import tensor_bytes
from ..convert.lora_files import write_lora
from ..errors import BasisMismatchError, SubspaceError
from ..tasks.bank_file import read_index, read_own, read_rows
from ..tasks.bank_rows import Pair
from ..tasks.read import Parts, SavedTask, read_task
from ..tuner.config import SubspaceConfig
from ..tuner.task_file import WEIGHTS_FILE

CONFIG_FILE = "adapter_config.json"
REMEDY = "name another folder, by TaskExports(cache=…) or in the variable SUBSPACE_PEFT_EXPORTS"
# increased with every change by which an export of the same task has other bytes
EXPORT_VERSION = 1


class TaskExports(Shown):
    """The tasks of a bank's file, or of a folder of saved tasks, as LoRA folders that other programs read.

    The name of an exported folder has the task's name and a hash of everything that the export depends on. A task that
    is trained again gets another folder, so a program that uses the earlier one is not disturbed. Nothing is ever
    deleted: empty the cache while no server runs.

    Args:
        tasks: A file that `TaskBank.save` wrote, or a folder whose subfolders are saved tasks.
        cache: The folder for the exports; ``exports`` in this package's cache by default.
        basis: The basis, its folder or its Hub id; by default the recorded place, or where this machine saw it before.
        rank: Highest rank, reached by truncation; None keeps all.
        dtype: The dtype of the written factors.

    Raises:
        SubspaceError: There is neither such a file nor such a folder.
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
                f"{self.tasks} does not exist. Pass a file that `TaskBank.save` wrote, or a folder of saved tasks."
            )
        self.cache = Path(cache).expanduser() if cache is not None else cache_home() / "exports"
        self.basis, self.rank, self.dtype = basis, rank, dtype

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "tasks", short(self.tasks)
        yield "exports", short(self.cache)
        yield "rank", self.rank
        yield "dtype", str(self.dtype).removeprefix("torch.")

    def names(self) -> list[str]:
        """List the tasks.

        Raises:
            BadFileError: The bank's file is damaged.
        """
        if self.tasks.is_dir():
            return sorted(folder.name for folder in self.tasks.iterdir() if (folder / CONFIG_FILE).is_file())
        return list(read_index(self.tasks)["tasks"])

    def find(self, name: str, base_model: str | None = None) -> Path | None:
        """Return the LoRA folder of a task, exporting it if that was not done before.

        Args:
            name: The task's name. It may be any text, as requests send it; only the name of a task leads to a file.
            base_model: The model that is to serve the task.

        Returns:
            The folder; None if there is no such task.

        Raises:
            BasisMismatchError: The task belongs to another base model, both being Hub ids; or to another basis.
            SubspaceError: The task is damaged, its basis cannot be found, or its rank is higher than vLLM serves.
            DiskError: The cache cannot be written; says why, and what helps.
        """
        if not is_name(name, most=255):
            return None
        if not self.tasks.is_dir():
            index = read_index(self.tasks)
            if name not in index["tasks"]:
                return None
            self._check_base(name, index.get("base_model_name_or_path"), base_model)
            cores, own = read_rows(self.tasks, name), read_own(self.tasks, name)
            about = json.dumps([index["basis_fingerprint"], index["modules"], index.get("weight_shapes")])
            content = [about.encode(), *(tensor_bytes(core) for core in cores.values())]
            content += [piece for module, pair in own.items() for piece in (module.encode(), *map(tensor_bytes, pair))]
            return self._exported(name, content, lambda: self._of_bank(index, cores, own))
        # a single part of a path: a name from a request must not lead out of the folder
        if name in (".", "..") or re.search(r"[/\\:]", name) or not (self.tasks / name / CONFIG_FILE).is_file():
            return None
        folder = self.tasks / name
        given: dict[str, Any] = {} if self.basis is None else {"basis": self.basis}
        content = [(folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE) if (folder / file).is_file()]
        try:
            base = json.loads(content[0]).get("base_model_name_or_path")
        except (ValueError, AttributeError, RecursionError):
            base = None  # reading the task raises an error that says what is wrong with it
        self._check_base(name, base, base_model)
        return self._exported(name, content, lambda: read_task(folder, **given))

    def _check_base(self, name: str, own: Any, asked: str | None) -> None:
        # two different Hub ids cannot be one model; folders may hold any copy
        names = [read_name(text) for text in (own, asked) if isinstance(text, str)]
        ids = [name for name in names if name is not None and name.is_id and "/" in name.text]
        if len(ids) == 2 and relation(ids[0].text, ids[1].text) != SAME and ids[1].real is None:
            raise BasisMismatchError(
                f"Task {name!r} belongs to the base model {own!r}, not to {asked!r}. Serve that one, or leave the task"
                " out."
            )

    def _of_bank(self, index: dict[str, Any], cores: dict[str, torch.Tensor], own: dict[str, Pair]) -> SavedTask:
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
            basis_names=index.get("basis_names"),
            base_model_name_or_path=index.get("base_model_name_or_path") or basis.base_model,
        )
        basis = basis.named(config.basis_names or {})
        names = {module: basis.find(module) for module in cores}
        shapes = basis.shapes()
        for module, core in cores.items():
            known = None if names[module] is None else shapes[str(names[module])]
            if known is None or core.shape[0] > known["k_out"] or core.shape[1] > known["k_in"]:
                raise BasisMismatchError(
                    f"{self.tasks}: module {module!r} has cores {tuple(core.shape)}, but the basis {fingerprint} has"
                    " fewer directions. The file was altered: fetch or save it again."
                )
        for module, (B, A) in own.items():
            known = shapes[str(names[module])]
            if (len(B), A.shape[1]) != (known["out"], known["in"]):
                raise BasisMismatchError(
                    f"{self.tasks}: module {module!r} has own directions {tuple(B.shape)} and {tuple(A.shape)}, but in"
                    f" the basis {fingerprint} it is {known['out']} × {known['in']}. The file was altered: fetch or"
                    " save it again."
                )
        wide = {module: (B.double(), A.double()) for module, (B, A) in own.items()}
        parts = Parts({module: tuple(core.shape) for module, core in cores.items()}, basis, names)  # type: ignore[arg-type]
        return SavedTask(config, {module: core.double() for module, core in cores.items()}, parts, {}, wide)

    def _exported(self, name: str, content: list[bytes], make: Any) -> Path:
        digest = hashlib.sha256(f"{EXPORT_VERSION};{self.rank};{self.dtype};".encode())
        for part in content:
            digest.update(hashlib.sha256(part).digest())
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64]
        folder = self.cache / f"{readable}-{digest.hexdigest()[:32]}"
        with writing(self.cache, REMEDY):
            if folder.is_dir():
                return folder
        task = make()
        if task.extras:
            raise SubspaceError(
                f"Task {name!r} has trained {sorted(task.extras)[0]} as well, which vLLM cannot serve with a LoRA."
                " Leave it out, or train it without modules_to_save."
            )
        with writing(self.cache, REMEDY):
            self._export(task, folder)
        return folder

    def _export(self, task: SavedTask, folder: Path) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=self.cache, ignore_cleanup_errors=True) as scratch:
            made = Path(scratch) / "lora"
            write_lora(task, made, rank=self.rank, pad_to="vllm", dtype=self.dtype)
            try:
                made.rename(folder)
            except OSError:
                # another process was faster, with the same content
                if not folder.is_dir():
                    raise
