"""Threads that build, save and load at the same time: each gets what it would get alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft import SubspaceBasis, SubspaceConfig, TaskBank, build_basis
from subspace_peft.bundle import bundle_tasks, open_bundle
from subspace_peft.cards import Place
from subspace_peft.tuner.card import place_of, published

from .models import bert, inputs, randomise

THREADS = 4

pytestmark = pytest.mark.usefixtures("many_switches")


def at_once(work: Callable[[int], Any], number: int = THREADS) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as executor:
        return list(executor.map(work, range(number)))


@pytest.fixture(scope="module")
def basis_folder(fleets, tmp_path_factory) -> Path:
    return build_basis(fleets[bert], k=6, progress=False).save_pretrained(tmp_path_factory.mktemp("bases") / "one")


@pytest.fixture(scope="module")
def tasks(basis_folder, tmp_path_factory) -> list[Path]:
    """Saved at the same time, into different folders."""
    root = tmp_path_factory.mktemp("tasks")
    models = [
        randomise(get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder))), seed=i) for i in range(THREADS)
    ]

    def save(number: int) -> Path:
        models[number].save_pretrained(root / f"t{number}")
        return root / f"t{number}"

    return at_once(save)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


def test_tasks_that_are_loaded_at_once_share_one_basis(tasks):
    alone = [logits(PeftModel.from_pretrained(bert(), folder)) for folder in tasks]
    bases = [bert() for _ in range(2 * THREADS)]  # by one global seed, so not in threads
    found = at_once(lambda number: PeftModel.from_pretrained(bases[number], tasks[number % THREADS]), 2 * THREADS)
    for number, model in enumerate(found):
        torch.testing.assert_close(logits(model), alone[number % THREADS])
    assert len({model.base_model.bases["default"].fingerprint for model in found}) == 1


def test_builds_at_once_give_the_same_bytes(fleets):
    built = at_once(lambda number: build_basis(fleets[bert][: 3 + number % 2], k=4, progress=False).fingerprint)
    alone = [build_basis(fleets[bert][: 3 + number % 2], k=4, progress=False).fingerprint for number in range(THREADS)]
    assert built == alone


def test_a_bank_reads_tasks_at_once(basis_folder, tasks):
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder))).eval(), capacity=1)
    at_once(lambda number: bank.add(f"t{number}", tasks[number % THREADS]), 3 * THREADS)
    alone = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=str(basis_folder))).eval())
    for number, folder in enumerate(tasks):
        alone.add(f"t{number}", folder)
    for number in range(3 * THREADS):
        cores, wanted = bank[f"t{number}"], alone[f"t{number % THREADS}"]
        assert all(torch.equal(core, wanted[module]) for module, core in cores.items())


def test_one_bundle_is_opened_once(tasks, tmp_path):
    bundle_tasks({folder.name: folder for folder in tasks}, tmp_path / "bundle")
    found = at_once(lambda number: open_bundle(tmp_path / "bundle"), 4 * THREADS)
    assert len({id(each) for each in found}) == 1


def test_bases_are_read_at_once(basis_folder):
    def read(number: int) -> dict[str, torch.Tensor]:
        basis = SubspaceBasis.from_pretrained(basis_folder)
        return {name: basis[name].U for name in basis}

    first, *others = at_once(read)
    assert all(torch.equal(other[name], value) for other in others for name, value in first.items())


def test_places_on_cards_are_those_of_the_thread_that_publishes(tmp_path):
    def work(number: int) -> set[bool]:
        found = set()
        for turn in range(50):
            place = Place(f"org/{number}-{turn}")
            with published({tmp_path / str(number): place}):
                found |= {place_of(tmp_path / str(number)) == place, place_of(tmp_path / "other") != place}
            found.add(place_of(tmp_path / str(number)) == Place.of_folder(tmp_path / str(number)))
        return found

    assert at_once(work) == [{True}] * THREADS


def test_the_process_keeps_its_umask_and_its_warnings(basis_folder, tmp_path):
    before, filters = os.umask(0o027), list(warnings.filters)
    try:
        basis = SubspaceBasis.from_pretrained(basis_folder)
        at_once(lambda number: basis.save_pretrained(tmp_path / str(number)), 8 * THREADS)
        assert os.umask(0o027) == 0o027
        assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*.safetensors")} == {0o640}
        assert warnings.filters == filters
    finally:
        os.umask(before)
