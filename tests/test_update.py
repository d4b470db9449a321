"""Growing a basis: old directions stay bit for bit, new adapters are kept, and old tasks lose nothing, whatever their
coefficients."""

from __future__ import annotations

import json

import pytest
import torch

import subspace_peft.builders.module_plan as module_plan
from subspace_peft import SubspaceBasis, build_basis, update_basis
from subspace_peft.basis.transfer import Transfer
from subspace_peft.builders import rebuild_basis
from subspace_peft.errors import BadFileError, SourceError, SubspaceError
from subspace_peft.report import validate_basis

from .models import bert, train_lora
from .test_build import deltas, fleet, kept

NAMES = ("a.q", "a.v")


def small(n=4, seed=0, **sizes):
    return fleet(n, out=40, inner=36, seed=seed, **sizes)


def orthonormal(module) -> float:
    eyes = torch.eye(module.k_out), torch.eye(module.k_in)
    return max(
        float((a - b).abs().max()) for a, b in zip((module.U.T @ module.U, module.V @ module.V.T), eyes, strict=True)
    )


@pytest.fixture(params=["exact", "streamed"])
def numerics(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 2)
    return request.param


# -- the basis
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (14, 14)),
        ({"add": 3}, (9, 9)),
        ({"add": 4, "add_in": 2}, (10, 8)),
        ({"add": 100}, (15, 15)),
        ({"add": 0.9}, None),
    ],
)
def test_the_old_directions_stay_and_the_new_ones_lie_beside_them(numerics, given, sizes):
    old = build_basis(small(), k=6, directions=2, progress=False)
    new = update_basis(old, small(3, seed=5), progress=False, **given)
    for name in NAMES:
        was, now, facts = old[name], new[name], new.info["update"]["modules"][name]
        assert torch.equal(now.U[:, :6], was.U) and torch.equal(now.V[:6], was.V)
        assert orthonormal(now) < 1e-6
        assert facts["numerics"] == numerics
        assert sizes is None or (now.k_out, now.k_in) == sizes
        for key in ("M", "G", "cores"):
            padded = torch.zeros(*getattr(was, key).shape[:-2], now.k_out, now.k_in)
            padded[..., :6, :6] = getattr(was, key)
            assert torch.equal(getattr(now, key)[: len(padded)] if key == "cores" else getattr(now, key), padded)
        assert torch.equal(now.spectrum_out, was.spectrum_out)
        updates = deltas(small(3, seed=5), name)
        shares = kept(new, updates, name)
        assert facts["kept"] == pytest.approx(shares, abs=1e-6)
        assert facts["kept_before"] == pytest.approx(kept(old, updates, name), abs=1e-6)
        if given.get("add") == 0.9:
            assert shares >= 0.9 and kept_with_one_less(now, updates) < 0.9
        for stored, update in zip(now.cores[4:], updates, strict=True):
            assert torch.allclose(stored.double(), now.U.double().T @ update @ now.V.double().T, atol=1e-5)
    if given.get("add") == 100:
        # 9 ranks of new adapters: all of them fit in
        assert all(each["kept"] == pytest.approx(1, abs=1e-6) for each in new.info["update"]["modules"].values())
    for name in NAMES:
        both = [old.info["measured"]["energy_kept_per_module"][name]] * 4 + [
            new.info["update"]["modules"][name]["kept"]
        ] * 3
        assert new.info["measured"]["energy_kept_per_module"][name] == pytest.approx(sum(both) / 7, abs=1e-6)


def kept_with_one_less(module, updates) -> float:
    cut = module.truncate(module.k_out - 1, module.k_in - 1)
    return kept({"a.q": cut}, updates)


def test_new_directions_are_the_leading_ones_of_what_is_left():
    old = build_basis(small(), k=6, progress=False)
    new = update_basis(old, small(3, seed=5), add=4, alternations=0, progress=False)
    U = old["a.q"].U.double()
    rest = [(torch.eye(40) - U @ U.T) @ d / d.norm() for d in deltas(small(3, seed=5))]
    _, vectors = torch.linalg.eigh(sum(r @ r.T for r in rest))
    best, found = vectors[:, -4:], new["a.q"].U[:, 6:].double()
    assert torch.allclose(best @ best.T, found @ found.T, atol=1e-5)
    alternated = update_basis(old, small(3, seed=5), add=4, progress=False)
    assert alternated.info["measured"]["energy_kept"] > new.info["measured"]["energy_kept"]


def test_an_adapter_inside_the_basis_adds_no_direction():
    old = build_basis(small(), k=12, progress=False)
    module = old["a.q"]
    inside = {
        f"{name}.lora_{side}.weight": value
        for name in NAMES
        for side, value in (("B", old[name].U[:, :3] * 2.0), ("A", old[name].V[2:5]))
    }
    new = update_basis(old, [inside], progress=False)
    assert (new["a.q"].k_out, new["a.q"].k_in) == (12, 12)
    assert torch.equal(new["a.q"].U, module.U)
    assert new.info["update"]["modules"]["a.q"]["kept_before"] == pytest.approx(1, abs=1e-6)


def test_a_basis_that_fills_a_side_grows_on_the_other():
    old = build_basis(fleet(6, out=8, inner=36), k=8, progress=False)
    assert old["a.q"].k_out == 8
    new = update_basis(old, fleet(2, out=8, inner=36, seed=3), progress=False)
    assert (new["a.q"].k_out, new["a.q"].k_in) == (8, 14)
    assert new.info["update"]["modules"]["a.q"]["added"] == [0, 6]
    assert orthonormal(new["a.q"]) < 1e-6


def test_refitting_keeps_the_size_and_reports_and_bounds_the_drift(numerics):
    old = build_basis(small(), k=6, directions=2, progress=False)
    new = update_basis(old, small(3, seed=5), k=8, k_in=7, progress=False)
    for name in NAMES:
        was, now = old[name], new[name]
        assert (now.k_out, now.k_in) == (8, 7) and orthonormal(now) < 1e-6
        move = Transfer(was, now, name)
        dense = [was.reconstruct(core) for core in was.cores]
        assert torch.allclose(now.cores[:4], torch.stack([now.project(d) for d in dense]), atol=1e-5)
        lost = [float((d - now.reconstruct(now.project(d))).norm() / d.norm()) for d in dense]
        assert new.info["update"]["drift"][name] == pytest.approx(max(lost), abs=1e-5)
        assert [move.drift(core, move.core(core)) for core in was.cores] == pytest.approx(lost, abs=1e-5)
        assert torch.allclose(now.M, now.project(was.reconstruct(was.M)), atol=1e-5)
    # better for the old and the new together than the old basis grown by as much in its own order
    assert 0 < max(new.info["update"]["drift"].values()) < 1
    bound = min(new.info["update"]["drift"].values()) / 2
    with pytest.raises(SubspaceError, match=r"would lose .* larger k, or grow"):
        update_basis(old, small(3, seed=5), k=8, k_in=7, max_drift=bound, progress=False)
    with_all = update_basis(old, small(3, seed=5), k=15, max_drift=1e-5, progress=False)
    assert "measured" not in with_all.info
    assert with_all.info["sources"][0]["energy_kept"] == pytest.approx(old.info["sources"][0]["energy_kept"], abs=1e-5)


def test_refitting_needs_to_know_what_to_keep_and_tasks_cores_say_it():
    old = build_basis(small(), k=6, keep_cores=False, progress=False)
    with pytest.raises(SubspaceError, match=r"what the old basis's tasks need is not known"):
        update_basis(old, small(2, seed=5), k=8, progress=False)
    core = torch.zeros(6, 6, dtype=torch.float64)
    core[5, 5] = 1.0  # the least of the fleet's directions, and all of the task's
    task = dict.fromkeys(NAMES, core)
    new = update_basis(old, small(1, seed=5), k=4, cores=[task] * 3, progress=False)
    assert max(new.info["update"]["drift"].values()) < 1e-3
    assert new.info["sources"][0]["energy_kept"] is None
    with pytest.raises(SubspaceError, match=r"has a core \(9, 9\)"):
        update_basis(old, small(1, seed=5), k=4, cores=[{"a.q": torch.ones(9, 9)}], progress=False)


def test_record_lineage_versions_and_second_updates(tmp_path):
    first = build_basis(small(), k=6, progress=False)
    first.save_pretrained(tmp_path / "v1")
    second = update_basis(first, small(1, seed=5), add=2, progress=False)
    second.save_pretrained(tmp_path / "v2")
    third = update_basis(tmp_path / "v2", small(1, seed=6), add=3, progress=False)
    third.save_pretrained(tmp_path / "v3")
    read = SubspaceBasis.from_pretrained(tmp_path / "v3")
    assert read.info["version"] == 3
    assert [entry["fingerprint"] for entry in read.info["lineage"]] == [first.fingerprint, second.fingerprint]
    assert read.info["columns"]["a.q"]["out"] == [["adapters", 6], ["version 2", 2], ["version 3", 3]]
    assert [entry.get("version") for entry in read.info["sources"]] == [None] * 4 + [2, 3]
    assert len({entry["name"] for entry in read.info["sources"]}) == 6
    assert validate_basis(tmp_path / "v3")["problems"] == []
    assert torch.equal(read["a.q"].U[:, :8], second["a.q"].U)
    assert len(read["a.q"].cores) == 6


def test_the_same_bytes_again_and_whatever_the_memory():
    old = build_basis(small(), k=6, progress=False)
    first, again, less = (
        update_basis(old, small(3, seed=5), max_memory=size, progress=False) for size in ("2GB", "2GB", "1MB")
    )
    assert first.fingerprint == again.fingerprint == less.fingerprint


def test_modules_that_the_new_adapters_leave_alone_stay_as_they_are():
    old = build_basis(small(), k=6, progress=False)
    new = update_basis(old, small(2, seed=5, modules=("a.q",)), progress=False)
    assert torch.equal(new["a.v"].U, old["a.v"].U) and new["a.v"].cores.shape == (6, 6, 6)
    assert not new["a.v"].cores[4:].any()
    assert "a.v" not in new.info["update"]["modules"]


def test_a_random_basis_grows_too():
    old = build_basis(small(), builder="random", k=4, progress=False)
    new = update_basis(old, small(2, seed=5), add=2, progress=False)
    assert new["a.q"].M is None and new["a.q"].k_out == 6
    assert new.info["columns"]["a.q"]["in"] == [["random", 4], ["version 2", 2]]


# -- bad input
# ------------------------------------------------------------------------------------------------------------


def test_bad_sources_are_listed_or_left_out(fleets, bases, tmp_path):
    old = bases[bert]
    good, other = (
        train_lora(bert, tmp_path / "good", 77),
        train_lora(bert, tmp_path / "mlp", 78, target_modules=["query", "value", "dense"]),
    )
    again = fleets[bert][2]
    with pytest.raises(SourceError, match=r"2 of 3 sources .*") as caught:
        update_basis(old, [again, str(good), str(other)], partial=True, progress=False)
    assert "in the basis already, as 'lora2' (the same sha256)" in str(caught.value)
    assert "which the basis does not have" in str(caught.value)
    new = update_basis(old, [again, str(good), str(other)], partial=True, skip_bad=True, progress=False)
    assert [entry["name"] for entry in new.info["skipped"]] == ["lora2", "mlp"]
    assert new.info["sources"][-1]["name"] == "good"
    with pytest.raises(SourceError, match=r"is \(48, 36\), in the basis \(40, 36\)"):
        update_basis(build_basis(small(), k=4, progress=False), fleet(1, out=48, inner=36), progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"add": 0}, "add=0"),
        ({"add": 1.5}, "add=1.5"),
        ({"add": 0.5, "add_in": 3}, "a share of energy decides both"),
        ({"k": 0}, "k=0"),
        ({"k_in": 4}, "give k as well"),
        ({"max_drift": 0.1}, "give k as well"),
        ({"k": 4, "max_drift": -1.0}, "max_drift=-1"),
        ({"weights": "loud"}, "weights=.loud.: there is no such choice"),
        ({"max_memory": "1KB"}, "too little"),
    ],
)
def test_wrong_arguments(given, message):
    old = build_basis(small(), k=4, progress=False)
    with pytest.raises(SubspaceError, match=message):
        update_basis(old, small(1, seed=5), progress=False, **given)


def test_an_update_is_built_again_from_its_record(fleets, bases, tmp_path):
    new = update_basis(bases[bert], [str(train_lora(bert, tmp_path / "new", 77))], add=3, progress=False)
    new.save_pretrained(tmp_path / "v2")
    assert rebuild_basis(tmp_path / "v2", progress=False).fingerprint == new.fingerprint
    fitted = update_basis(bases[bert], [str(tmp_path / "new")], k=5, progress=False)
    assert rebuild_basis(fitted, progress=False).fingerprint == fitted.fingerprint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "two"),
        ("lineage", {"fingerprint": "a"}),
        ("lineage", ["a"]),
        ("columns", ["adapters"]),
        ("update", "once"),
    ],
)
def test_a_record_that_is_none_is_refused(basis_folder, key, value):
    file = basis_folder / "basis_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(BadFileError, match=key):
        SubspaceBasis.from_pretrained(basis_folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"columns": {"a.q": {"out": [["adapters", 10**9]], "in": "all"}}},
        {"columns": {"a.q": [], "a.v": {"out": [["adapters"]], "in": [[1, 6]]}}},
        {"measured": {"energy_kept_per_module": {"a.q": "much", "a.v": None}}},
    ],
)
def test_what_does_not_add_up_in_a_record_counts_for_nothing(changed):
    old = build_basis(small(), k=6, progress=False)
    odd = SubspaceBasis(dict(old.items()), {**old.info, **changed})
    new = update_basis(odd, small(1, seed=5), add=2, progress=False)
    assert new.info["columns"]["a.q"]["out"] == [["adapters", 6], ["version 2", 2]]
    assert 0 < new.info["measured"]["energy_kept"] <= 1


def test_a_basis_whose_cores_and_sources_differ_is_refused():
    old = build_basis(small(), k=6, progress=False)
    odd = SubspaceBasis(dict(old.items()), {**old.info, "sources": old.info["sources"][:2]})
    with pytest.raises(SubspaceError, match="holds 4 sources' cores, and its config lists 2"):
        update_basis(odd, small(1, seed=5), progress=False)


def test_an_update_whose_record_or_first_version_is_gone_is_not_built_again(fleets, bases, tmp_path):
    source = str(train_lora(bert, tmp_path / "new", 77))
    new = update_basis(bases[bert], [source], add=3, progress=False)
    for change in ({"update": {}}, {"lineage": [{"fingerprint": "short"}]}):
        odd = SubspaceBasis(dict(new.items()), {**new.info, **change})
        with pytest.raises(SubspaceError, match="no record of how it was updated"):
            rebuild_basis(odd, progress=False)
    core = {name: torch.eye(6, dtype=torch.float64) for name in bases[bert]}
    fitted = update_basis(bases[bert], [source], k=5, cores=[core], progress=False)
    with pytest.raises(SubspaceError, match="cores of 1 tasks as well"):
        rebuild_basis(fitted, progress=False)
