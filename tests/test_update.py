"""Growing a basis: old directions stay bit for bit, new adapters are kept, and old tasks lose nothing, whatever their coefficients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import subspace_peft.build.memory_plan as memory_plan
from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis, migrate_task, update_basis
from subspace_peft.basis.transfer import Transfer
from subspace_peft.build import rebuild_basis
from subspace_peft.errors import BadFileError, BasisMismatchError, SourceError, SubspaceError
from subspace_peft.report import validate_basis

from .conftest import bert, gpt2, inputs, randomise, train_lora
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
        monkeypatch.setattr(memory_plan, "EXACT_COLUMNS", 2)
    return request.param


# -- the basis ------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(SubspaceError, match=r"nothing says what the old basis's tasks need"):
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


# -- bad input ------------------------------------------------------------------------------------------------------------


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
        ({"add": 0.5, "add_in": 3}, "a share decides both"),
        ({"k": 0}, "k=0"),
        ({"k_in": 4}, "give k as well"),
        ({"max_drift": 0.1}, "give k as well"),
        ({"k": 4, "max_drift": -1.0}, "max_drift=-1"),
        ({"weights": "loud"}, "no weighting"),
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


# -- tasks ----------------------------------------------------------------------------------------------------------------

KINDS = [
    {"coefficients": coefficients, "mean_gain": gain, **more}
    for coefficients, more in (("core", {}), ("factor", {"r": 3}), ("diagonal", {}), ("directions", {}), ("none", {}))
    for gain in ("none", "fixed", "trainable")
    # with nothing but a mean core that is not used there is nothing to train
    if (coefficients, gain) not in (("none", "none"), ("none", "fixed"))
] + [{"k": 4}, {"rank_pattern": {"value": 2}, "mean_gain": "fixed"}, {"coefficients": "factor", "r": 8}]


def ids(config) -> str:
    return "-".join(map(str, config.values()))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


def saved(make, folder: Path, basis, **config: object) -> tuple[Path, torch.Tensor]:
    # the mean update of random adapters is small: a gain that shows
    std = 100.0 if config.get("coefficients") == "none" else 0.3
    model = randomise(get_peft_model(make(), SubspaceConfig(basis=basis, **config)), std=std)
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture(scope="module")
def grown(bases, tmp_path_factory):
    made = {}
    for make in (bert, gpt2):
        root = tmp_path_factory.mktemp(make.__name__)
        new = [str(train_lora(make, root / f"new{i}", seed=50 + i)) for i in range(2)]
        made[make] = update_basis(bases[make], new, add=5, add_in=3, progress=False)
        made[make].save_pretrained(root / "v2")
    return made


@pytest.mark.parametrize("config", KINDS, ids=ids)
def test_a_migrated_task_gives_the_old_outputs(kind, config, bases, grown, tmp_path):
    folder, before = saved(kind, tmp_path / "old", bases[kind].location, **config)
    found = migrate_task(folder, grown[kind])
    assert found.converted is None and found.total_drift < 1e-6
    found.save_pretrained(tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert stored["basis_fingerprint"] == grown[kind].fingerprint
    assert stored["coefficients"] == config.get("coefficients", "core")
    model = PeftModel.from_pretrained(kind(), tmp_path / "new")
    assert torch.allclose(logits(model), before, atol=2e-5 * float(before.abs().max()))
    assert not torch.allclose(logits(kind()), before, atol=1e-3)
    assert model.peft_config["default"].base_probe is not None


def test_told_k_stays_and_so_do_the_numbers(bases, grown, tmp_path):
    folder, _ = saved(bert, tmp_path / "old", bases[bert].location, k=4)
    found = migrate_task(folder, grown[bert])
    assert found.config.k == 4
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(value, found.tensors[key])


def test_a_migrated_task_trains_on_in_the_new_directions(bases, grown, tmp_path):
    folder, _ = saved(bert, tmp_path / "old", bases[bert].location)
    migrate_task(folder, grown[bert]).save_pretrained(tmp_path / "new")
    model = PeftModel.from_pretrained(bert(), tmp_path / "new", is_trainable=True)
    model(inputs()).logits.sum().backward()
    weight = next(p for name, p in model.named_parameters() if "subspace_coef" in name)
    assert weight.shape == (11, 9) and weight.grad[6:].abs().max() > 0 and not weight[6:].any()


def test_live_models_and_tasks_that_carry_their_basis(bases, grown, tmp_path):
    model = randomise(
        get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location, save_basis=True, mean_gain="fixed"))
    )
    model.save_pretrained(tmp_path / "own")
    for task in (model, tmp_path / "own"):
        found = migrate_task(task, grown[bert].location)
        found.save_pretrained(tmp_path / "new")
        assert not any("subspace_U" in key for key in found.tensors)
        assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), logits(model), atol=1e-5)


def test_trained_modules_and_scores_come_along(bases, grown, tmp_path):
    from subspace_peft import write_card

    folder, before = saved(bert, tmp_path / "old", bases[bert].location, modules_to_save=["classifier"])
    write_card(folder, datasets=["org/data"])
    migrate_task(folder, grown[bert]).save_pretrained(tmp_path / "new")
    assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), before, atol=1e-5)
    model = PeftModel.from_pretrained(bert(), tmp_path / "new")
    model.save_pretrained(tmp_path / "again")
    assert "org/data" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("config", KINDS[:13], ids=ids)
def test_onto_a_refitted_basis_the_drift_is_what_is_measured_and_is_bounded(config, bases, fleets, tmp_path):
    old = bases[bert]
    new = update_basis(old, [str(train_lora(bert, tmp_path / "new0", seed=50))], k=7, progress=False)
    new.save_pretrained(tmp_path / "v2")
    folder, _ = saved(bert, tmp_path / "old", old.location, **config)
    with pytest.raises(SubspaceError, match=r"would change by .* max_drift=1e-05"):
        migrate_task(folder, new)
    found = migrate_task(folder, new, max_drift=1.0)
    assert found.converted == ("diagonal" if config["coefficients"] == "diagonal" else None)
    found.save_pretrained(tmp_path / "task")
    was, now = PeftModel.from_pretrained(bert(), folder), PeftModel.from_pretrained(bert(), tmp_path / "task")
    layers = {name: layer for name, layer in now.named_modules() if hasattr(layer, "subspace_coef")}
    for name, layer in layers.items():
        key = name.removeprefix("base_model.model.")
        before, after = was.get_submodule(name).get_delta_weight("default"), layer.get_delta_weight("default")
        module = new[str(new.find(key))]
        assert torch.allclose(after, module.reconstruct(module.project(before)), atol=1e-5 * float(before.norm()))
        assert found.drift[key] == pytest.approx(float((before - after).norm() / before.norm()), abs=1e-5)


def test_a_mean_that_is_another_becomes_part_of_the_core(bases, tmp_path):
    old = bases[bert]
    from dataclasses import replace

    other = SubspaceBasis({name: replace(module, M=-module.M) for name, module in old.items()}, old.info)
    other.save_pretrained(tmp_path / "other")
    folder, before = saved(bert, tmp_path / "old", old.location, mean_gain="trainable", coefficients="factor")
    found = migrate_task(folder, other)
    assert found.converted == "factor" and found.config.mean_gain == "none"
    found.save_pretrained(tmp_path / "new")
    assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), before, atol=1e-5)


def test_tasks_that_cannot_be_carried_are_refused(bases, grown, tmp_path):
    folder, _ = saved(bert, tmp_path / "old", bases[bert].location)
    with pytest.raises(BasisMismatchError, match="modules are not in the new basis"):
        migrate_task(folder, grown[gpt2])
    with pytest.raises(SubspaceError, match="max_drift=-1"):
        migrate_task(folder, grown[bert], max_drift=-1)
    memory = update_basis(bases[bert], [str(train_lora(bert, tmp_path / "new", 77))], progress=False)
    with pytest.raises(SubspaceError, match="has to be stored"):
        migrate_task(folder, memory).save_pretrained(tmp_path / "new-task")
    assert not (tmp_path / "new-task").exists()


def test_embeddings_and_their_tasks_grow_too(tmp_path):
    from peft import LoraConfig

    def lora(name: str, seed: int) -> str:
        model = get_peft_model(bert(), LoraConfig(r=4, target_modules=["word_embeddings", "query"]))
        draw = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    old = build_basis([lora("one", 1), lora("two", 2)], k=5, progress=False)
    old.save_pretrained(tmp_path / "v1")
    new = update_basis(old, [lora("three", 3)], progress=False)
    new.save_pretrained(tmp_path / "v2")
    folder, before = saved(bert, tmp_path / "old", old.location)
    migrate_task(folder, new).save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert list(config["weight_shapes"].values()) == [[100, 32]]
    assert torch.allclose(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), before, atol=1e-5)


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
