"""Tasks' own directions become part of the basis: it grows by what they need, and nothing that there is changes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    build_basis,
    bundle_tasks,
    load_task,
    migrate_bundle,
    migrate_task,
    open_bundle,
    rebuild_basis,
    update_basis,
)
from subspace_peft.cli import main
from subspace_peft.convert import absorb_task
from subspace_peft.errors import SourceError, SubspaceError
from subspace_peft.tasks.read import read_task

from .models import bert, randomise, train_lora
from .test_migrate import KINDS, ids, logits, saved

WEIGHTS = "adapter_model.safetensors"
TABLE = [{**config, "extra_rank": 2} for config in KINDS]


def own(make, folder: Path, basis: SubspaceBasis, change=None, **config: object) -> tuple[Path, torch.Tensor]:
    """A saved task with own directions, which `change` may edit: its tensors, by side, of one module."""
    folder, before = saved(make, folder, basis.location, **{"extra_rank": 2, "alpha": 64.0, **config})
    if change is None:
        return folder, before
    tensors = load_file(folder / WEIGHTS)
    for key in [key for key in tensors if key.endswith(".extra_U")]:
        name = key.removeprefix("base_model.model.").removesuffix(".subspace_coef.extra_U")
        sides = {side: f"{key.removesuffix('extra_U')}extra_{side}" for side in "UV"}
        u, v = change(tensors[sides["U"]], tensors[sides["V"]], basis[str(basis.find(name))], name)
        tensors |= {sides["U"]: u.contiguous(), sides["V"]: v.contiguous()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder, logits(PeftModel.from_pretrained(make(), folder))


def begins(new: SubspaceBasis, old: SubspaceBasis) -> bool:
    return all(
        torch.equal(new[n].U[:, : m.k_out], m.U) and torch.equal(new[n].V[: m.k_in], m.V) for n, m in old.items()
    )


def growth(new: SubspaceBasis, old: SubspaceBasis) -> set[tuple[int, int]]:
    return {(new[n].k_out - m.k_out, new[n].k_in - m.k_in) for n, m in old.items()}


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    # float32's rounding of the model's own layers is among it
    return float((one - other).norm()) <= 1e-6 * float(other.norm())


@pytest.mark.parametrize("config", TABLE, ids=ids)
def test_the_task_is_a_plain_core_and_computes_the_same(kind, config, bases, tmp_path):
    folder, before = own(kind, tmp_path / "task", bases[kind], **config)
    older, outputs = saved(kind, tmp_path / "older", bases[kind].location)
    new, moved = absorb_task(folder, progress=False)
    assert begins(new, bases[kind]) and growth(new, bases[kind]) == {(2, 2)}
    assert moved.total_drift <= 1e-6 and max(moved.drift.values()) <= 1e-6
    assert moved.config.coefficients == "core" and moved.config.mean_gain == "none" and moved.config.extra_rank == 0
    assert {key.rpartition(".")[2] for key in moved.tensors} == {"weight"}
    new.save_pretrained(tmp_path / "v2")
    moved.save_pretrained(tmp_path / "moved")
    assert close(logits(PeftModel.from_pretrained(kind(), tmp_path / "moved")), before)
    assert not close(logits(kind()), before)
    # tasks that were there before: as they are, or padded
    migrate_task(older, new, pad=False).save_pretrained(tmp_path / "kept")
    assert (tmp_path / "kept" / WEIGHTS).read_bytes() == (older / WEIGHTS).read_bytes()
    assert torch.equal(logits(PeftModel.from_pretrained(kind(), tmp_path / "kept")), outputs)
    padded = migrate_task(older, new)
    assert padded.total_drift < 1e-6


def test_version_lineage_and_record(bases, tmp_path):
    old = bases[bert]
    folder, _ = own(bert, tmp_path / "task", old)
    new = update_basis(old, [folder], progress=False)
    assert new.info["version"] == 2 and new.info["lineage"][-1]["fingerprint"] == old.fingerprint
    import hashlib

    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert new.info["update"]["absorbed"] == [{"name": "task", "sha256": digest}]
    assert all(each["added"] == each["needed"] == [2, 2] for each in new.info["update"]["modules"].values())
    entry = new.info["sources"][-1]
    assert entry["sha256"] == digest and entry["task_on"] == old.fingerprint and entry["version"] == 2
    assert entry["energy_kept"] == pytest.approx(1, abs=1e-6) and entry["ranks"] == [8]
    new.save_pretrained(tmp_path / "v2")
    assert rebuild_basis(tmp_path / "v2", progress=False).fingerprint == new.fingerprint
    with pytest.raises(SourceError, match="it is in the basis already, as 'task'"):
        update_basis(tmp_path / "v2", [folder], progress=False)
    with pytest.raises(SourceError, match="it is in the basis already"):
        absorb_task(folder, tmp_path / "v2", progress=False)
    # the same task, moved without its tensors being touched, is known by them
    migrate_task(folder, new, pad=False).save_pretrained(tmp_path / "again")
    with pytest.raises(SourceError, match="it is in the basis already"):
        update_basis(new, [tmp_path / "again"], progress=False)


def inside(u, v, module, name):
    x, y = torch.ones(module.k_out, 2), torch.ones(2, module.k_in)
    x[1, 0] = y[0, 1] = -2.0
    return module.U @ x, y @ module.V


@pytest.mark.parametrize(
    ("change", "more"),
    [
        (inside, (0, 0)),
        (lambda u, v, m, n: (inside(u, v, m, n)[0], v), (0, 2)),
        (lambda u, v, m, n: (u, inside(u, v, m, n)[1]), (2, 0)),
        (lambda u, v, m, n: (u[:, :1].expand(-1, 2), v), (1, 1)),
        (lambda u, v, m, n: (torch.cat([u[:, :1], 0 * u[:, :1]], 1), v), (1, 1)),
        (lambda u, v, m, n: (torch.cat([u[:, :1], m.U[:, :1]], 1), v), (1, 2)),
        (lambda u, v, m, n: (1e-3 * u, 1e-2 * v), (2, 2)),
        (lambda u, v, m, n: (0 * u, v), (0, 0)),
        (lambda u, v, m, n: (u, 0 * v), (0, 0)),
    ],
    ids=["inside", "U inside", "V inside", "twice the same u", "one is zero", "half inside", "weak", "no u", "no v"],
)
def test_it_grows_by_what_is_needed(kind, change, more, bases, tmp_path):
    folder, before = own(kind, tmp_path / "task", bases[kind], change)
    new, moved = absorb_task(folder, progress=False)
    assert begins(new, bases[kind]) and growth(new, bases[kind]) == {more}
    # what it holds already needs no new version
    assert (new.fingerprint == bases[kind].fingerprint) is (more == (0, 0))
    assert moved.total_drift <= 1e-6 and not moved.config.extra_rank
    new.save_pretrained(tmp_path / "v2")
    moved.save_pretrained(tmp_path / "moved")
    assert close(logits(PeftModel.from_pretrained(kind(), tmp_path / "moved")), before)


def test_several_tasks_share_directions(bases, tmp_path):
    old = bases[bert]
    shared: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(u, v, module, name):
        shared[name] = u, v
        return u, v

    def mixed(u, v, module, name):
        draw = torch.Generator().manual_seed(5)
        return shared[name][0] @ torch.randn(2, 2, generator=draw), torch.cat([shared[name][1][:1], v[1:] + 1])

    folders = [own(bert, tmp_path / "one", old, remember), own(bert, tmp_path / "two", old, mixed)]
    new = update_basis(old, [folder for folder, _ in folders], progress=False)
    # the second one's u's lie in the span of the first one's, and one of its v's does
    assert growth(new, old) == {(2, 3)} and begins(new, old)
    assert len(new.info["update"]["absorbed"]) == 2
    new.save_pretrained(tmp_path / "v2")
    for folder, before in folders:
        moved = migrate_task(folder, new)
        assert moved.total_drift <= 1e-6 and not moved.config.extra_rank
        moved.save_pretrained(tmp_path / "moved")
        assert close(logits(PeftModel.from_pretrained(bert(), tmp_path / "moved")), before)


def test_own_directions_that_the_basis_does_not_contain_stay(bases, tmp_path):
    old = bases[bert]
    folder, _ = own(bert, tmp_path / "task", old)
    other, outputs = own(bert, tmp_path / "other", old, lambda u, v, m, n: (u.flip(0), v.flip(1)), extra_rank=1)
    new = update_basis(old, [folder], progress=False)
    new.save_pretrained(tmp_path / "v2")
    moved = migrate_task(other, new)
    assert moved.config.extra_rank == 1 and moved.total_drift < 1e-6
    file = load_file(other / WEIGHTS)
    assert all(torch.equal(moved.tensors[key], file[key]) for key in file if ".extra_" in key)
    moved.save_pretrained(tmp_path / "moved")
    assert close(logits(PeftModel.from_pretrained(bert(), tmp_path / "moved")), outputs)
    # on the earlier version that the new one begins with, a task is absorbed as well
    third = update_basis(new, [other], progress=False)
    assert growth(third, new) == {(1, 1)} and begins(third, new)
    third.save_pretrained(tmp_path / "v3")
    last = migrate_task(other, third)
    assert last.total_drift <= 1e-6 and not last.config.extra_rank
    assert migrate_task(folder, third).total_drift <= 1e-6


def test_a_task_of_pinned_size_is_absorbed_later(bases, tmp_path):
    old = bases[bert]
    other = update_basis(old, [str(train_lora(bert, tmp_path / "lora", 61))], add=3, progress=False)
    other.save_pretrained(tmp_path / "v2")
    folder, before = own(bert, tmp_path / "task", old, k=4)
    migrate_task(folder, other, pad=False).save_pretrained(tmp_path / "pinned")
    new, moved = absorb_task(tmp_path / "pinned", progress=False)
    assert begins(new, other) and moved.config.k is None and not moved.config.extra_rank
    assert moved.total_drift <= 1e-6
    new.save_pretrained(tmp_path / "v3")
    moved.save_pretrained(tmp_path / "moved")
    assert close(logits(PeftModel.from_pretrained(bert(), tmp_path / "moved")), before)


def test_only_some_modules_have_own_directions(bases, tmp_path):
    old = bases[bert]
    folder, before = own(bert, tmp_path / "task", old, extra_rank=0, extra_rank_pattern={"layer.0.*query": 3})
    new, moved = absorb_task(folder, progress=False)
    assert growth(new, old) == {(3, 3), (0, 0)} and moved.total_drift <= 1e-6
    new.save_pretrained(tmp_path / "v2")
    moved.save_pretrained(tmp_path / "moved")
    assert close(logits(PeftModel.from_pretrained(bert(), tmp_path / "moved")), before)
    # a basis of which one module alone has them: there it becomes part of the core, elsewhere it stays
    both, _ = own(bert, tmp_path / "both", old)
    name = next(iter(old))
    part = read_task(both)
    from dataclasses import replace

    half = replace(part, own={n: pair for n, pair in part.own.items() if old.find(n) == name})
    moved = migrate_task(both, update_basis(old, [half], progress=False))
    assert moved.config.extra_rank == 2 and list(moved.config.extra_rank_pattern.values()) == [0]
    assert moved.total_drift <= 1e-6 and sum(key.endswith("extra_U") for key in moved.tensors) == len(old) - 1


def test_tasks_on_the_basis_need_not_have_the_same_modules(bases, tmp_path):
    old = bases[bert]
    one, _ = own(bert, tmp_path / "one", old, lambda u, v, m, n: (u.flip(0), v.flip(1)), target_modules=["query"])
    two, _ = own(bert, tmp_path / "two", old)
    new = update_basis(old, [one, two], progress=False)
    assert {n: growth(new, {n: m}) for n, m in old.items()} == {
        n: {(4, 4) if n.endswith("query") else (2, 2)} for n in old
    }
    assert all(migrate_task(each, new).total_drift <= 1e-6 for each in (one, two))
    # adapters still have to agree with one another
    loras = [train_lora(bert, tmp_path / f"lora{i}", 70 + i, target_modules=["query", "value"][i:]) for i in range(2)]
    with pytest.raises(SourceError, match=r"unlike the others. partial=True"):
        update_basis(old, [one, *map(str, loras)], progress=False)
    # so do tasks that are taken as adapters
    with pytest.raises(SourceError, match=r"unlike the others. partial=True"):
        update_basis(old, [one, two], add=0.9, progress=False)


def test_a_core_alone_needs_no_new_version(bases, tmp_path):
    folder, before = saved(bert, tmp_path / "task", bases[bert].location, coefficients="factor", r=2)
    new, moved = absorb_task(folder, progress=False)
    assert new.fingerprint == bases[bert].fingerprint and moved.total_drift == 0
    assert moved.config.coefficients == "factor"
    moved.save_pretrained(tmp_path / "moved")
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "moved")), before)


def test_live_models_and_tasks_in_memory(bases, tmp_path):
    old = bases[bert]
    folder, _ = own(bert, tmp_path / "task", old)
    model = PeftModel.from_pretrained(bert(), folder)
    task = read_task(folder)
    bases_made = [update_basis(old, [each], progress=False) for each in (folder, model, task)]
    assert len({each.fingerprint for each in bases_made}) == 1
    for each in (model, task):
        new, moved = absorb_task(each, progress=False)
        assert new == bases_made[0] and moved.total_drift <= 1e-6 and not moved.config.extra_rank
    with pytest.raises(SourceError, match="in the basis already"):
        update_basis(bases_made[2], [task], progress=False)
    next(p for n, p in model.named_parameters() if "extra_U" in n).data[0, 0] = float("nan")
    with pytest.raises(SourceError, match="NaN or infinite"):
        update_basis(old, [model], progress=False)


def test_a_number_bounds_what_is_absorbed(bases, tmp_path):
    old = bases[bert]
    folder, _ = own(bert, tmp_path / "task", old)
    with pytest.warns(UserWarning, match=r"own directions need up to 2 .*in 4 modules.*only the strongest"):
        new = update_basis(old, [folder], add=1, progress=False)
    assert growth(new, old) == {(1, 1)}
    moved = migrate_task(folder, new)
    assert moved.config.extra_rank == 2 and moved.total_drift < 1e-6
    assert growth(update_basis(old, [folder], add=20, progress=False), old) == {(2, 2)}
    with pytest.warns(UserWarning, match="only the strongest"):
        assert growth(update_basis(old, [folder], add=2, add_in=1, progress=False), old) == {(2, 1)}
    # a share of energy takes the task as an adapter
    shared = update_basis(old, [folder], add=0.999, progress=False)
    assert "absorbed" not in shared.info["update"] and max(growth(shared, old))[0] <= 2


def test_tasks_beside_adapters_and_on_other_bases(bases, tmp_path):
    old = bases[bert]
    folder, _ = own(bert, tmp_path / "task", old)
    lora = str(train_lora(bert, tmp_path / "lora", 60))
    new = update_basis(old, [lora, folder], progress=False)
    # the task's two, exactly, and what of the default of eight the adapter of rank 4 needs
    assert begins(new, old) and growth(new, old) == {(6, 6)}
    assert migrate_task(folder, new).total_drift <= 1e-6
    # a task on another basis is an adapter like any other
    small = old.truncate(4)
    small.save_pretrained(tmp_path / "small")
    stranger, _ = own(bert, tmp_path / "stranger", small)
    third = update_basis(new, [stranger], progress=False)
    assert "absorbed" not in third.info["update"] and begins(third, new)
    other = flipped(old, tmp_path / "flipped")
    turned, _ = own(bert, tmp_path / "turned", other, extra_rank=10)
    with pytest.raises(SubspaceError, match="would change by"):
        absorb_task(turned, new.truncate(2), progress=False)


def test_the_same_bytes_on_another_basis_are_another_task(bases, tmp_path):
    old = bases[bert]
    folder, _ = own(bert, tmp_path / "task", old)
    other = flipped(old, tmp_path / "flipped")
    turned, _ = own(bert, tmp_path / "turned", other)
    shutil.copy(folder / WEIGHTS, turned / WEIGHTS)
    new = update_basis(old, [folder], progress=False)
    third = update_basis(new, [turned], progress=False)
    assert [entry["task_on"] for entry in third.info["sources"][-2:]] == [old.fingerprint, other.fingerprint]
    assert len({entry["sha256"] for entry in third.info["sources"][-2:]}) == 1
    assert len(build_basis([folder, turned], k=4, progress=False).info["sources"]) == 2
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(SourceError, match=r"a duplicate of .*the same bytes"):
        build_basis([folder, tmp_path / "copy"], k=4, progress=False)


def flipped(basis: SubspaceBasis, folder: Path) -> SubspaceBasis:
    from dataclasses import replace

    new = SubspaceBasis({n: replace(m, U=m.U.flip(0), V=m.V.flip(1)) for n, m in basis.items()}, dict(basis.info))
    new.save_pretrained(folder)
    return new


def test_bases_are_built_from_tasks_too(bases, fleets, tmp_path):
    folders = []
    for i in range(3):
        model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location, extra_rank=2)), seed=i)
        model.save_pretrained(tmp_path / f"t{i}")
        folders.append(tmp_path / f"t{i}")
    made = build_basis([*folders, fleets[bert][0]], k=12, progress=False)
    assert [entry["name"] for entry in made.info["sources"]] == ["t0", "t1", "t2", "lora0"]
    # that they share V is no shared seed
    assert len({entry["seed_group"] for entry in made.info["sources"]}) == 4
    assert made.info["sources"][0]["task_on"] == bases[bert].fingerprint


def test_tasks_of_a_bundle_are_absorbed_and_moved(bases, tmp_path):
    old = bases[bert]
    folder, _ = own(bert, tmp_path / "spam", old)
    bundle_tasks([folder], tmp_path / "bundle", progress=False)
    bundle = open_bundle(tmp_path / "bundle")
    new = update_basis(old, [bundle.task("spam")], progress=False)
    assert growth(new, old) == {(2, 2)} and new.info["sources"][-1]["name"] == "spam"
    new.save_pretrained(tmp_path / "v2")
    moved, drifts = migrate_bundle(bundle, tmp_path / "v2", tmp_path / "moved", progress=False)
    assert max(drifts["spam"].values()) <= 1e-6 and not moved.task("spam").own
    before, now = (logits(load_task(bert(), each, "spam")) for each in (bundle, moved))
    assert close(now, before)
    kept, _ = migrate_bundle(bundle, tmp_path / "v2", tmp_path / "kept", pad=False, progress=False)
    assert kept.task("spam").own.keys() == bundle.task("spam").own.keys()
    # a bundle stores own directions by their singular values, each time to the rounding of float32
    assert close(logits(load_task(bert(), kept, "spam")), before)


@pytest.mark.parametrize("numerics", ["exact", "streamed"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_large_fleets_and_rounded_bases(numerics, precision, bases, tmp_path, monkeypatch):
    if numerics == "streamed":
        monkeypatch.setattr("subspace_peft.builders.module_plan.EXACT_COLUMNS", 4)
    old = bases[bert].to_precision(precision)
    old.save_pretrained(tmp_path / "v1")
    folder, before = own(bert, tmp_path / "task", old)
    lora = str(train_lora(bert, tmp_path / "lora", 60))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "its next version is stored as float32|.*is stored as int8")
        new = update_basis(tmp_path / "v1", [folder, lora], progress=False)
    assert begins(new, old) and growth(new, old) == {(6, 6)}
    assert {each["numerics"] for each in new.info["update"]["modules"].values()} == {numerics}
    moved = migrate_task(folder, new)
    assert moved.total_drift <= 1e-6 and not moved.config.extra_rank
    new.save_pretrained(tmp_path / "v2")
    moved.save_pretrained(tmp_path / "moved")
    assert close(logits(PeftModel.from_pretrained(bert(), tmp_path / "moved")), before)


def test_a_model_without_the_head_has_shorter_names(bases, tmp_path):
    old = bases[bert]
    plain = get_peft_model(bert().bert, SubspaceConfig(basis=old.location, extra_rank=2, alpha=64.0))
    randomise(plain, seed=9).save_pretrained(tmp_path / "plain")
    folder, _ = own(bert, tmp_path / "task", old)
    new = update_basis(old, [folder, tmp_path / "plain"], progress=False)
    assert growth(new, old) == {(4, 4)} and len(new.info["update"]["absorbed"]) == 2
    for each in (folder, tmp_path / "plain"):
        assert migrate_task(each, new).total_drift <= 1e-6


def test_a_file_that_is_gone_or_a_basis_that_is_nowhere_is_named(bases, tmp_path):
    old = bases[bert]
    folder, _ = own(bert, tmp_path / "task", old)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"basis": str(tmp_path / "nowhere"), "basis_fingerprint": "0" * 64}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"1 of 1 sources cannot be used:\n.*nowhere"):
        update_basis(old, [folder], progress=False)
    with pytest.raises(SubspaceError, match="carries its own basis"):
        absorb_task(own(bert, tmp_path / "carried", old, save_basis=True)[0], progress=False)
    model = get_peft_model(bert(), SubspaceConfig(basis=old.location, extra_rank=2))
    with pytest.raises(SourceError, match="the adapter does nothing"):
        update_basis(old, [model], progress=False)


def test_on_the_command_line(bases, tmp_path, capsys):
    folder, before = own(bert, tmp_path / "task", bases[bert])
    command = ["update", bases[bert].location, str(folder), "--out", str(tmp_path / "v2"), "--tasks", str(folder)]
    assert main([*command, "--tasks-out", str(tmp_path / "moved")]) == 0, capsys.readouterr().err
    assert "+2 to +2 output and +2 to +2 input directions" in capsys.readouterr().out
    assert close(logits(PeftModel.from_pretrained(bert(), tmp_path / "moved" / "task")), before)
    assert main([*command, "--tasks-out", str(tmp_path / "moved")]) == 0, capsys.readouterr().err
