"""A basis's config is enough to build it again; what a basis keeps of sources that it was built without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoKrConfig

from subspace_peft import build_basis
from subspace_peft.builders import rebuild_basis
from subspace_peft.cli import main
from subspace_peft.errors import SourceError, SubspaceError

from .hub import Hub
from .models import bert
from .test_build import deltas, fleet, kept
from .test_fleet import broken
from .test_foreign import trained
from .test_hub import client

# -- again
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"k": 3},
        {"k": 0.8, "weights": "norm", "directions": 2},
        {"k": 4, "k_in": 2, "alternations": 0, "keep_cores": False},
        {"k": 3, "builder": "eigenlora"},
        {"k": 3, "builder": "random", "seed": 5, "directions": 2},
    ],
    ids=str,
)
def test_the_config_alone_builds_the_same_files(fleets, kind, tmp_path, arguments):
    build_basis(fleets[kind], **arguments, progress=False).save_pretrained(tmp_path / "old")
    rebuild_basis(tmp_path / "old", progress=False).save_pretrained(tmp_path / "new")
    for file in ("basis.safetensors", "basis_config.json"):
        old, new = ((tmp_path / name / file).read_bytes() for name in ("old", "new"))
        assert old == new


def test_what_was_left_out_stays_out_and_partial_stays_partial(fleets, tmp_path, capsys):
    bad = [str(broken(fleets[bert][0], tmp_path, how)) for how in ("nan", "fewer-modules")]
    listed = [bad[0], *fleets[bert][1:], bad[1]]
    build_basis(listed, k=3, partial=True, skip_bad=True, progress=False).save_pretrained(tmp_path / "old")
    shutil.rmtree(bad[0])
    again = ["build", "--from-config", str(tmp_path / "old"), "--quiet", "--out"]
    assert main([*again, str(tmp_path / "new")]) == 0
    assert "the fingerprint is the one on record" in capsys.readouterr().out
    one, two = ((tmp_path / name / "basis_config.json").read_bytes() for name in ("old", "new"))
    assert one == two and json.loads(one)["skipped"][0]["location"] == f"../{Path(bad[0]).name}"
    assert main([*again, str(tmp_path / "x"), fleets[bert][0]]) == 1
    assert "sources on record" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_sources_that_are_not_what_they_were_are_listed(fleets, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / f"lora{n}") for n, folder in enumerate(fleets[bert][:3])]
    build_basis(list(map(str, copies)), k=3, progress=False).save_pretrained(tmp_path / "old")
    shutil.rmtree(copies[0])
    shutil.copy(Path(fleets[bert][4], "adapter_model.safetensors"), copies[1])
    with pytest.raises(SourceError, match="2 of its sources") as caught:
        rebuild_basis(tmp_path / "old", progress=False)
    assert f"{copies[0]}: there is no such folder" in str(caught.value)
    assert f"{copies[1]}: its file has sha256" in str(caught.value)
    with pytest.raises(SourceError, match="given in memory"):
        rebuild_basis(build_basis(fleet(), k=2, progress=False))
    with pytest.raises(SubspaceError, match="no record of how"):
        basis = build_basis(fleet(), k=2, progress=False)
        basis.info.pop("build")
        rebuild_basis(basis)


def test_bases_that_need_the_base_model_again(tmp_path):
    for n in range(2):
        trained(bert, LoKrConfig(r=2, target_modules=["query"], init_weights=False), tmp_path / f"lokr{n}", n)
    first = build_basis([str(tmp_path / "lokr0"), str(tmp_path / "lokr1")], k=3, base_model=bert(), progress=False)
    assert rebuild_basis(first, base_model=bert(), progress=False) == first
    with pytest.raises(SourceError, match="base_model="):
        rebuild_basis(first, progress=False)
    weights = build_basis(builder="base-weights", base_model=bert(), target_modules=["query"], k=3, progress=False)
    assert rebuild_basis(weights, base_model=bert(), progress=False) == weights
    with pytest.raises(SubspaceError, match="--base-model"):
        rebuild_basis(weights, progress=False)


def test_hub_sources_are_taken_at_the_commit_on_record(fleets, tmp_path):
    many, moved = tmp_path / "many", tmp_path / "moved"
    for target, number in ((many, 0), (moved, 3)):
        for n in range(2):
            shutil.copytree(fleets[bert][number + n], target / f"lora{n}")
    old = tmp_path / "old"
    build = f"""
        from subspace_peft import build_basis
        build_basis(["org/many:lora0", "org/many:lora1"], k=3, progress=False).save_pretrained({str(old)!r})
    """
    again = f"""
        from subspace_peft import SubspaceBasis
        from subspace_peft.builders import rebuild_basis
        print(rebuild_basis({str(old)!r}, progress=False) == SubspaceBasis.from_pretrained({str(old)!r}))
    """
    with Hub({"org/many": {"main": many}}) as hub:
        done = client(hub, tmp_path / "home", build)
    assert done.returncode == 0, done.stderr
    with Hub({"org/many": {"main": moved, "old": many}}) as hub:
        done = client(hub, tmp_path / "home2", again)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# -- left out
# -----------------------------------------------------------------------------------------------------------------


def test_the_energy_of_a_left_out_source_is_that_of_a_basis_without_it():
    states = fleet(4)
    basis = build_basis(states, k=4, progress=False)
    expected = []
    for n in range(4):
        rest = build_basis([state for i, state in enumerate(states) if i != n], k=4, progress=False)
        expected.append(kept(rest, deltas([states[n]])))
    measured = basis.info["measured"]
    assert measured["energy_left_out_per_module"]["a.q"] == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert measured["energy_left_out"] < measured["energy_kept"]
    assert measured["energy_random_per_module"]["a.q"] == 4 * 4 / (20 * 16)


def test_shared_seed_groups_are_left_out_whole():
    states = fleet(4, modules=("q",))
    generator = torch.Generator().manual_seed(1)
    for state in states[1:3]:
        noise = 0.1 * torch.randn(3, 16, generator=generator, dtype=torch.float64)
        state["q.lora_A.weight"] = states[0]["q.lora_A.weight"] + noise
    basis = build_basis(states, k=6, progress=False)
    assert [entry["seed_group"] for entry in basis.info["sources"]] == [0, 0, 0, 1]
    alone = build_basis(states[3], k=6, progress=False)
    third = build_basis(states[:3], k=6, progress=False)
    expected = [kept(alone, deltas([state], "q"), "q") for state in states[:3]] + [
        kept(third, deltas(states[3:], "q"), "q")
    ]
    assert basis.info["measured"]["energy_left_out"] == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_it_is_measured_where_it_costs_little_or_where_asked():
    def measured(n, **asked):
        return (
            "energy_left_out" in build_basis(fleet(n, modules=("q",)), k=2, progress=False, **asked).info["measured"]
        )

    assert not measured(1) and measured(2) and measured(8) and not measured(9)
    assert measured(9, leave_one_out=True) and not measured(3, leave_one_out=False)
    assert not measured(3, builder="eigenlora", leave_one_out=True)
