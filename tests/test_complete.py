"""Filling a basis up: what is there stays bit for bit, the rest is orthonormal to it, and where it comes from is on
record."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from subspace_peft import SubspaceBasis, build_basis, complete_basis, migrate_task, update_basis
from subspace_peft.builders import rebuild_basis
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError
from subspace_peft.report import validate_basis

from .models import bert, gpt2
from .test_build import fleet
from .test_migrate import KINDS, ids, logits, saved
from .test_update import NAMES, orthonormal


def test_by_default_nothing_is_made_up():
    basis = build_basis(fleet(1), k=8, progress=False)
    assert basis["a.q"].k_out == 3 and "columns" not in basis.info


@pytest.mark.parametrize("k_in", [None, 5, 2])
def test_a_fleet_of_fewer_directions_is_filled_up(k_in):
    bare = build_basis(fleet(1), k=8, k_in=k_in, directions=1, progress=False)
    full = build_basis(fleet(1), k=8, k_in=k_in, directions=1, complete="random", progress=False)
    for name in NAMES:
        was, now = bare[name], full[name]
        a, b = was.k_out, was.k_in
        assert (now.k_out, now.k_in) == (8, k_in or 8) and orthonormal(now) < 1e-6
        assert torch.equal(now.U[:, :a], was.U) and torch.equal(now.V[:b], was.V)
        for key in ("M", "G", "cores", "core_rms"):
            found = getattr(now, key)
            assert torch.equal(found[..., :a, :b], getattr(was, key))
            assert not found[..., a:, :].any() and not found[..., :, b:].any()
        assert full.info["columns"][name]["out"] == [["adapters", 3], ["random", 5]]
        assert full.info["columns"][name]["in"] == [
            ["adapters", b],
            *([["random", now.k_in - b]] if now.k_in > b else []),
        ]
    assert full.info["measured"]["energy_kept"] == bare.info["measured"]["energy_kept"]
    assert full.info["measured"]["energy_random"] == pytest.approx(8 * (k_in or 8) / 320)


def test_random_ones_are_zero_mean_differ_by_module_and_seed_and_come_again():
    basis = build_basis(fleet(1, out=400, inner=300), k=3, progress=False)
    one, again, other = (complete_basis(basis, 40, seed=seed, progress=False) for seed in (0, 0, 1))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    drawn = one["a.q"].U[:, 3:]
    assert not torch.allclose(drawn, one["a.v"].U[:, 3:], atol=0.01)
    # all-positive draws, as in EigenLoRA's code, have a cosine of 0.87 with the vector of ones
    assert float((drawn.sum(0) / 400**0.5).abs().max()) < 0.3


@pytest.mark.parametrize("make", [bert, gpt2])
def test_base_weights_are_singular_vectors_beside_what_is_there(make, bases):
    old, model = bases[make], make()
    new = complete_basis(old, 10, with_="base-weights", base_model=model, progress=False)
    name = next(iter(new))
    was, now = old[name], new[name]
    weight = model.get_submodule(name).weight.detach().double()
    weight = weight.T if make is gpt2 else weight
    P, _, Th = torch.linalg.svd(weight, full_matrices=False)
    for there, found, singular in ((was.U, now.U, P), (was.V.T, now.V.T, Th.T)):
        # together with what is there they span the leading singular vectors
        span = torch.cat([there.double(), singular[:, :4]], 1)
        Q = torch.linalg.qr(span)[0]
        assert torch.allclose(Q @ Q.T, found.double() @ found.double().T, atol=1e-5)
    assert orthonormal(now) < 1e-6
    assert new.info["columns"][name]["out"] == [["adapters", 6], ["base-weights", 4]]
    for parameter, untouched in zip(model.parameters(), make().parameters(), strict=True):
        assert torch.equal(parameter, untouched)


def test_what_lies_in_the_base_weights_already_is_passed_over(bases):
    model = bert()
    own = build_basis(builder="base-weights", base_model=model, target_modules=["query"], k=4, progress=False)
    more = complete_basis(own, 9, with_="base-weights", base_model=model, progress=False)
    nine = build_basis(builder="base-weights", base_model=model, target_modules=["query"], k=9, progress=False)
    for name in own:
        assert torch.allclose(more[name].U, nine[name].U, atol=1e-5)


def test_there_are_no_more_directions_than_dimensions():
    new = complete_basis(build_basis(fleet(2), k=4, progress=False), 100, progress=False)
    assert (new["a.q"].k_out, new["a.q"].k_in) == (20, 16) and orthonormal(new["a.q"]) < 1e-6


@pytest.mark.parametrize("config", KINDS, ids=ids)
def test_tasks_move_to_a_completed_basis_exactly(config, bases, tmp_path):
    new = complete_basis(bases[bert], 12, progress=False)
    new.save_pretrained(tmp_path / "v2")
    folder, before = saved(bert, tmp_path / "old", bases[bert].location, **config)
    found = migrate_task(folder, new)
    assert found.converted is None and found.total_drift < 1e-6
    found.save_pretrained(tmp_path / "new")
    after = logits(PeftModel.from_pretrained(bert(), tmp_path / "new"))
    assert torch.allclose(after, before, atol=2e-5 * float(before.abs().max()))


def test_the_record_survives_files_updates_and_further_completion(tmp_path):
    basis = build_basis(fleet(1, out=40, inner=36), k=5, complete="random", progress=False)
    basis.save_pretrained(tmp_path / "v1")
    second = update_basis(tmp_path / "v1", fleet(1, out=40, inner=36, seed=4), progress=False)
    third = complete_basis(second, 12, progress=False)
    third.save_pretrained(tmp_path / "v3")
    read = SubspaceBasis.from_pretrained(tmp_path / "v3")
    assert read.info["columns"]["a.q"]["out"] == [["adapters", 3], ["random", 2], ["version 2", 3], ["random", 4]]
    assert read.info["version"] == 3 and validate_basis(tmp_path / "v3")["problems"] == []
    assert read.info["completed"] == {"with": "random", "k": 12, "k_in": None, "seed": 0}
    with pytest.raises(SubspaceError, match="version 3 was not made from sources alone"):
        rebuild_basis(read, progress=False)


def test_cli_and_rebuilding(fleets, bases, tmp_path, capsys):
    bert().base_model.save_pretrained(tmp_path / "model")
    for filling in ("random", "base-weights"):
        out = tmp_path / filling
        command = [*fleets[bert][:1], "-k", "7", "--complete", filling, "--base-model", str(tmp_path / "model")]
        assert main(["build", *command, "--out", str(out), "--json"]) == 0
        basis = SubspaceBasis.from_pretrained(out)
        assert basis.describe_k() == "k=7"
        again = [
            "build",
            "--from-config",
            str(out),
            "--out",
            str(tmp_path / f"{filling}-again"),
            "--base-model",
            str(tmp_path / "model"),
        ]
        assert main(again) == 0
        assert SubspaceBasis.from_pretrained(tmp_path / f"{filling}-again").fingerprint == basis.fingerprint
    capsys.readouterr()
    assert main(["build", *fleets[bert][:1], "-k", "7", "--complete", "random", "--dry-run", "--json"]) == 0
    assert {size["k_out"] for size in json.loads(capsys.readouterr().out)["modules"].values()} == {7}
    assert main(["complete", bases[bert].location, "-k", "9", "--out", str(tmp_path / "more"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["k"] == "k=9"


def test_wrong_calls(fleets, bases, capsys):
    with pytest.raises(SubspaceError, match=r"with_=.zeros."):
        complete_basis(bases[bert], 9, with_="zeros")
    with pytest.raises(SubspaceError, match="pass the base model"):
        build_basis(fleets[bert], complete="base-weights", progress=False)
    with pytest.raises(SubspaceError, match="k=0"):
        complete_basis(bases[bert], 0)
    with pytest.raises(SubspaceError, match="Give k as a number"):
        build_basis(fleets[bert], k=0.5, complete="random", progress=False)
    with pytest.raises(SubspaceError, match="is no linear layer of the base model"):
        complete_basis(bases[bert], 9, with_="base-weights", base_model=gpt2())
