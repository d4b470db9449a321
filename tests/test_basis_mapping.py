"""A basis as a mapping: what it holds, and what it says of a name that it does not have, wherever its modules are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.errors import BasisMismatchError, UnknownModuleError
from tests.models import bert, train_lora

NAME = "bert.encoder.layer.0.attention.self.query"
ABSENT = ["x", NAME.replace("query", "qeury"), "query", f"{NAME}.U", "", 0, None, ("a", "b")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SubspaceBasis]:
    folder = tmp_path_factory.mktemp("bases")
    built = build_basis([train_lora(bert, folder / str(i), seed=i) for i in (1, 2)], k=4, progress=False)
    half = built.to_precision("bfloat16")
    return {
        "in memory": built.truncate(4),
        "lazily read": SubspaceBasis.from_pretrained(built.save_pretrained(folder / "whole")),
        "rounded": half,
        "rounded, lazily read": SubspaceBasis.from_pretrained(half.save_pretrained(folder / "half")),
    }


KINDS = ["in memory", "lazily read", "rounded", "rounded, lazily read"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ABSENT, ids=repr)
def test_a_name_that_is_absent(bases: dict[str, SubspaceBasis], kind: str, name: object) -> None:
    basis, default = bases[kind], object()
    assert name not in basis
    assert basis.get(name) is None  # type: ignore[call-overload]
    assert basis.get(name, default) is default  # type: ignore[call-overload]
    for ask in (lambda: basis[name], lambda: basis.stored(name)):  # type: ignore[index, arg-type]
        with pytest.raises(KeyError) as error:
            ask()
        assert isinstance(error.value, UnknownModuleError)
        assert isinstance(error.value, BasisMismatchError)
        # as a sentence, not as a KeyError's quoted text
        assert str(error.value).startswith(f"The basis has no module {name!r}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NAME.replace("query", "qeury"), "query", f"model.{NAME}"])
def test_near_names_are_said(bases: dict[str, SubspaceBasis], kind: str, name: str) -> None:
    with pytest.raises(KeyError, match=f"Near it: .*{NAME}"):
        bases[kind][name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mapping_agrees_with_itself(bases: dict[str, SubspaceBasis], kind: str) -> None:
    basis = bases[kind]
    names = list(basis)
    assert len(names) == len(set(names)) == len(basis) == 4
    assert list(basis.keys()) == names
    known = basis.keys()
    assert all(name in basis and name in known for name in names)
    assert [name for name, _ in basis.items()] == names
    for name, module in zip(names, basis.values(), strict=True):
        for tensor, value in module.tensors().items():
            assert torch.equal(getattr(basis[name], tensor), value)
            assert torch.equal(getattr(basis.get(name), tensor), value)
    assert list(basis.shapes()) == list(basis.digests) == names


COPIES: list[Callable[[SubspaceBasis], SubspaceBasis]] = [
    copy.copy,
    copy.deepcopy,
    lambda basis: pickle.loads(pickle.dumps(basis)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_a_copy_is_the_same_mapping(
    bases: dict[str, SubspaceBasis], kind: str, copied: Callable[[SubspaceBasis], SubspaceBasis]
) -> None:
    basis = bases[kind]
    other = copied(basis)
    assert other == basis
    assert list(other) == list(basis)
    assert "x" not in other
    assert torch.equal(other[NAME].U, basis[NAME].U)
    with pytest.raises(KeyError):
        other["x"]


def test_a_damaged_file_is_still_said_to_be_damaged(bases: dict[str, SubspaceBasis], tmp_path: Path) -> None:
    basis = SubspaceBasis.from_pretrained(bases["in memory"].save_pretrained(tmp_path / "b"))
    file = basis.file
    assert file is not None
    file.write_bytes(file.read_bytes()[:-100])
    assert NAME in basis and "x" not in basis
    with pytest.raises(BasisMismatchError):
        basis["x"]
    with pytest.raises(ValueError, match="damaged"):
        basis[NAME]
