"""The shared bases of all target modules of one base model: provenance, fingerprint, saving and loading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .._io.occupied import BASIS
from .._io.warn import warn_caller
from .._moved import moved_name
from .._shown import fingerprint, short
from ..base_names import read_name
from ..cards import Place
from ..energy import EnergyRecord, percent
from ..errors import BadFileError, BasisMismatchError, SubspaceError
from ..hub import check_repo_id, upload
from . import cache, living
from .alteration import altered, marks_of
from .derived import cast, rounded, truncated
from .files import BasisRecord, open_basis
from .folder import write_with_card
from .layout import combine_digests
from .living import alive as alive  # its place in earlier versions
from .locations import add_note
from .module import ModuleBasis
from .modules_by_name import ModulesByName
from .overwriting import Planned, replacing
from .precision import RoundedModules
from .source_places import local_info


class SubspaceBasis(ModulesByName):
    """A mapping from module name to `ModuleBasis`, with its provenance and a fingerprint; immutable.

    As in a dict, ``len(basis)`` is how many modules it has, ``name in basis`` asks for one by its exact name (`find`
    for a model's), and iteration gives their names. None of these reads a tensor; ``basis[name]`` does.

    It is made by `subspace_peft.build_basis`, or loaded by `SubspaceBasis.from_pretrained`, which reads a module's
    tensors and verifies their sha256 when the module is asked for.

    Args:
        modules: module name → basis.
        info: see the attribute.
        location: see the attribute.
        revision: see the attribute.
        digests: module name → sha256 of its tensors as stored; by default all modules are checked and hashed.

    Attributes:
        info: what `basis_config.json` holds beside the modules: base model, builder and its arguments, sources.
        location: folder or Hub id this basis was loaded from or saved to; None for one in memory only.
        revision: commit sha on the Hub, or None.
        first_trained_on: the base weights that this process first trained a task on, for a stored basis that has no
            record of its own; None before.
        digests: module name → sha256 (hex) of its tensors as stored.
        fingerprint: sha256 (hex) over the modules' names and digests.

    Raises:
        SubspaceError: there is no module, or one is malformed; names it.
    """

    def __init__(
        self,
        modules: Mapping[str, ModuleBasis],
        info: Mapping[str, Any] | None = None,
        *,
        location: str | None = None,
        revision: str | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        if not modules:
            raise SubspaceError("A basis needs at least one module.")
        super().__init__(modules)
        self.info: dict[str, Any] = dict(info or {})
        if self.precision is None:
            # modules that are given as they are stored: what the info says of others would make the file unreadable
            self.info.pop("precision", None)
        self.location = location
        self.revision = revision
        self.first_trained_on: dict[str, Any] | None = None
        if digests is None:
            for name, module in modules.items():
                module.check(name)
            digests = {name: module.digest() for name, module in modules.items()}
        self.digests = dict(digests)
        self.fingerprint = combine_digests(self.digests)
        self._marks = marks_of(self._modules)
        living.add(self)

    def __getitem__(self, name: str) -> ModuleBasis:
        try:
            return super().__getitem__(name)
        except BadFileError:
            # another copy of the basis may be whole: what looks for the fingerprint is to find that one
            living.drop(self)
            raise

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SubspaceBasis) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __deepcopy__(self, memo: dict[int, Any]) -> SubspaceBasis:
        return self  # it is immutable, so a deep copy of a model shares it

    def __reduce__(self) -> tuple[Any, ...]:
        if self.precision is not None:
            stored = {name: dict(self.stored(name)) for name in self}
            return _rebuild_stored, (self.precision, stored, self.info, self.location, self.revision)
        return _rebuild, (dict(self.items()), self.info, self.location, self.revision)

    def _shown_facts(self) -> Iterator[tuple[str, Any]]:
        yield "modules", len(self)
        yield "k", self.describe_k().removeprefix("k=")
        yield "base model", short(self.base_model)
        known = EnergyRecord.of(self.info)
        yield "sources", len(known.sources) or None
        if known.kept is not None:
            # the squared Frobenius norm of the sources' updates
            yield "energy kept of them", f"{'at least ' if known.at_least else ''}{percent(known.kept)}"
        yield "stored as", self.precision
        yield "fingerprint", fingerprint(self.fingerprint)
        yield "at", short(self.location or "in memory") + (f"@{self.revision[:7]}" if self.revision else "")

    def _altered(self) -> list[str]:
        """Return the modules that were changed in place since the basis got its fingerprint."""
        return altered(self._modules, self._marks, self.digests)

    @property
    def base_model(self) -> str | None:
        """Name or path of the base model that the sources were trained on."""
        return self.info.get("base_model_name_or_path")

    # -- other bases made of it -------------------------------------------------------------------------------------

    def truncate(self, k: int | tuple[int, int]) -> SubspaceBasis:
        """Return a basis of the leading `k` (or ``(k_out, k_in)``) directions of every module, held in memory.

        A module with fewer directions keeps those that it has.

        Raises:
            SubspaceError: a size is below 1.
        """
        return SubspaceBasis(*truncated(self, self.info, self.fingerprint, k))

    def to(self, dtype: torch.dtype) -> SubspaceBasis:
        """Return this basis in another float dtype, in memory; its bytes differ, and so does its fingerprint."""
        return SubspaceBasis(*cast(self, self.info, self.fingerprint, dtype))

    def to_precision(self, precision: str) -> SubspaceBasis:
        """Return this basis as `save_pretrained` then stores it: U and V in half or a quarter of the bytes.

        Modules are still given in float32. They are made from the stored values when they are asked for, with U and V
        turned into the nearest orthonormal matrices, see `precision.restored`. The fingerprint is of the stored bytes,
        so a task belongs to either this basis or the float32 one. ``info["precision"]`` holds the loss:

        - ``energy_lost``: share of the energy of the fleet's cores that the rounded directions do not keep, the mean
          over modules;
        - ``energy_lost_at_most``: the same for any update in the basis, of the worst module;
        - ``orthonormality``: largest entry of |UᵀU − 1| and |VVᵀ − 1| as stored.

        The sources' ``energy_kept``, and the basis's, are what is left: from the stored cores, or else less the mean
        loss. What was measured of sources left out and of noise stays as measured with float32 bases.

        Args:
            precision: ``float32``, ``bfloat16``, ``float16``, or ``int8`` with one scale per direction.

        Raises:
            SubspaceError: there is no such precision; the basis has a lower one already; rounding leaves a module too
                far from orthonormal.
        """
        if precision == (self.precision or "float32"):
            return self
        modules, info = rounded(self, self.info, self.fingerprint, precision, self.precision)
        return SubspaceBasis(modules, info, digests=modules.digests())

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `basis_config.json`, `basis.safetensors` and a card into `folder`.

        Files are written aside first and then renamed, so earlier ones stay where a write fails. A README without a
        card of ours stays as it is.

        Args:
            folder: made where it does not exist.
            overwrite: replace another basis, or something of another kind, that lies there. What depends on such a
                basis is named in a warning. The same basis is written again in any case.

        Returns:
            The folder's absolute path, which is `location` from now on.

        Raises:
            OccupiedError: something else lies in `folder`, and `overwrite` is off.
            SubspaceError: `folder` is a file.
            OSError: the disk refuses.
        """
        with replacing(folder, Planned(BASIS, self.fingerprint), overwrite=overwrite):
            path = self._write(Path(folder))
        self.location = str(path)
        self.revision = None
        return path

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the basis to the Hub, in one commit; tasks saved from now on are pinned to that commit.

        A README in the repository that has no card of ours stays as it is. An earlier card in it is replaced, and the
        text around the card stays.

        Args:
            repo_id: ``org/name``; the repository is created where it is missing.
            private: whether a new repository is private; None for the owner's default.
            token: as in huggingface_hub.
            branch: branch to commit to, created where it is missing; None for main.
            commit_message: of the commit.
            create_pr: open a pull request instead of committing to the branch.

        Returns:
            The commit's sha, which is `revision` from now on, as `repo_id` is `location`.

        Raises:
            SubspaceError: `repo_id` is a path, or names a revision.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        check_repo_id(repo_id)
        base = read_name(self.base_model)
        if base is not None and not base.is_id:
            warnings.warn(
                f"The basis records its base model as a folder, {base.text!r}, which others do not have and which the"
                " upload shows. Where that model has a Hub id, build the basis with base_model_name='org/model'"
                " (--base-model-name), or give it to complete_basis or update_basis.",
                stacklevel=2,
            )
        self.location, self.revision = upload(
            repo_id,
            lambda folder, repo: self._write(folder, Place(repo, revision=branch)),
            commit_message or f"Upload basis {self.fingerprint[:12]}",
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )
        note_location(self)
        return self.revision

    def _write(self, folder: Path, place: Place | None = None) -> Path:
        """Write the files into `folder`, and a card that loads the basis from `place`, or else from the folder."""
        record = BasisRecord(self._modules, self.info, self.digests, self.location, self.revision)
        return write_with_card(record, folder, place)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        fingerprint: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> SubspaceBasis:
        """Open a basis from a folder or the Hub.

        The config and the header are read now, tensors when a module is asked for. Tasks loaded later on this machine
        find the basis by its fingerprint.

        Args:
            path_or_id: a folder written by `save_pretrained`, or a Hub model repository id.
            revision: branch, tag or commit sha on the Hub.
            fingerprint: the sha256 that the basis must have.
            token: as in huggingface_hub.
            cache_dir: as in huggingface_hub.

        Raises:
            BasisNotFoundError: nothing is there.
            BadFileError: the files are truncated, malformed or altered.
            BasisMismatchError: another fingerprint than the one asked for.
        """
        record = open_basis(path_or_id, revision=revision, token=token, cache_dir=cache_dir)
        # a task's record may name a repository that is a folder here, and the fingerprint tells whether it is the same
        if revision is not None and record.revision is None and fingerprint is None:
            warn_caller(f"revision={revision!r} has no effect: {path_or_id} is a folder, and is taken as it is.")
        if record.fetched:
            file = record.modules.file
            cache.keep(file.parent, fingerprint=record.fingerprint, location=record.location, revision=record.revision)
        basis = basis_of(record)
        if fingerprint is not None and basis.fingerprint != fingerprint:
            raise BasisMismatchError(
                f"The basis at {str(path_or_id)!r} has fingerprint {basis.fingerprint}, but {fingerprint} is asked"
                " for. It is another basis, or it was rebuilt since: pass the one that these coefficients were trained"
                " on as `basis=`, or train the task again on this one."
            )
        # a task loaded later that does not say where its basis is finds this one
        note_location(basis)
        return basis


def _rebuild(modules: dict[str, ModuleBasis], info: dict[str, Any], location: str | None, revision: str | None) -> Any:
    return SubspaceBasis(modules, info, location=location, revision=revision)


def _rebuild_stored(
    precision: str, modules: dict[str, Any], info: dict[str, Any], location: str | None, revision: str | None
) -> Any:
    stored = RoundedModules(precision, modules)
    return SubspaceBasis(stored, info, location=location, revision=revision, digests=stored.digests())


def basis_of(record: BasisRecord) -> SubspaceBasis:
    """Return the basis that a record read from files stands for."""
    info, file = record.info, record.modules.file
    if file is not None:
        info = local_info(info, file.parent, record.fingerprint)
    return SubspaceBasis(
        record.modules, info, location=record.location, revision=record.revision, digests=record.digests
    )


def note_location(basis: SubspaceBasis) -> None:
    """Note where `basis` lies, so that loaders on this machine that know only its fingerprint find it again."""
    if basis.location is not None:
        add_note(basis.fingerprint, basis.location, basis.revision)


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
