"""A fleet of LoRAs in one bundle: energies add up, a residual is what was missing, bytes are counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import SubspaceBasis, build_basis, compress_fleet, export_lora, load_task, open_bundle, project_lora
from subspace_peft.bundle.compress import enough, shares
from subspace_peft.cli import main
from subspace_peft.convert.residual import fits_of
from subspace_peft.errors import SubspaceError

from .bundle.conftest import logits
from .models import bert, gpt2, train_lora
from .test_layer_kinds import Small, lora, outputs


def deltas(make, folder) -> dict[str, torch.Tensor]:
    """Module → ΔW (out, in) as PEFT computes it, of a stock LoRA; a convolution's as a matrix, an embedding's
    transposed."""
    return updates(make, PeftModel.from_pretrained(make(), folder))


def updates(make, model) -> dict[str, torch.Tensor]:
    """The same of a live model."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach().double().flatten(1)
            turned = make is gpt2 or isinstance(module.get_base_layer(), nn.Embedding)
            found[name] = delta.T if turned else delta
    return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, fleets):
    """Per kind of layers: how the model is made, a basis of two of its LoRAs, and a LoRA that is only partly in it."""
    root = tmp_path_factory.mktemp("compress")
    made = {}
    for make, folders in (
        (Small, [lora(root / f"s{i}", i) for i in range(3)]),
        (bert, fleets[bert]),
        (gpt2, fleets[gpt2]),
    ):
        basis = build_basis(folders[:2], k=4, progress=False)
        basis.save_pretrained(root / f"{make.__name__}-basis")
        made[make] = (basis, folders)
    return made


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
@pytest.mark.parametrize("make", [Small, bert, gpt2], ids=["embedding, convolutions, linear", "linear", "conv1d"])
def test_energies_add_up_against_the_dense_update(make, rank, fleet):
    basis, folders = fleet[make]
    for folder in folders[:3]:
        alone = project_lora(folder, basis)
        projection = alone.with_fits(fits_of(alone, dict.fromkeys(alone.places, rank)))
        dense = deltas(make, folder)
        total, modules = shares(projection)
        assert modules.keys() == dense.keys() and len(dense) in (2, 4)
        for name, delta in dense.items():
            place = str(basis.find(name))
            module = basis[place]
            projected = module.reconstruct(module.U.double().T @ delta @ module.V.double().T)
            S, energy = torch.linalg.svdvals(delta - projected), float(delta.square().sum())
            share, now = modules[name], module.reconstruct(projection.cores[place])
            if rank:
                B, A = projection.own[place]
                now = now + B @ A
            assert share.kept == pytest.approx(float(projected.square().sum()) / energy, abs=1e-5)
            assert share.lost == pytest.approx(float((delta - now).square().sum()) / energy, abs=1e-5)
            assert share.kept + share.residual + share.lost == pytest.approx(1, abs=1e-12)
            # at least as good as the best residual beside the projection; without one it is the projection
            best = float(S[rank:].square().sum()) / energy
            assert share.lost <= best + 1e-5 and (rank or share.lost == pytest.approx(best, abs=1e-5))
        assert total.kept + total.residual + total.lost == pytest.approx(1, abs=1e-12)
        assert total.kept == pytest.approx(alone.energy_kept, abs=1e-12)


@pytest.mark.parametrize("make", [Small, bert, gpt2])
def test_what_is_loaded_is_projection_plus_residual(make, fleet, tmp_path):
    basis, folders = fleet[make]
    run = outputs if make is Small else logits
    # the whole residual: the bundle gives the LoRA back
    report = compress_fleet([folders[2]], basis, tmp_path / "whole", min_energy=1.0, residual=16, progress=False)
    (whole,) = report.adapters
    assert whole.total.lost < 1e-6 and whole.total.kept < 0.9 and 0 < whole.residual_rank <= 16
    expected = run(PeftModel.from_pretrained(make(), folders[2]))
    loaded = load_task(make(), tmp_path / "whole", whole.name)
    assert loaded.peft_config[whole.name].peft_type == "SUBSPACE"
    torch.testing.assert_close(run(loaded), expected, atol=1e-4, rtol=1e-3)
    loaded = load_task(make(), tmp_path / "whole", whole.name, as_lora=True)
    assert loaded.peft_config[whole.name].peft_type == "LORA"
    torch.testing.assert_close(run(loaded), expected, atol=1e-4, rtol=1e-3)
    # a part of it: U C V + B A, to float32's precision
    most = 1 - 1e-6 - whole.total.residual / 2
    report = compress_fleet([folders[2]], basis, tmp_path / "part", min_energy=most, residual=3, progress=False)
    (part,) = report.adapters
    assert 1 <= part.residual_rank <= 3
    bundle = open_bundle(tmp_path / "part")
    assert bundle[part.name].extra_rank == part.residual_rank
    with pytest.warns(FutureWarning, match="now called extra_rank"):
        assert bundle[part.name].residual_rank == part.residual_rank
    task = bundle.task(part.name)
    export_lora(task, tmp_path / "lora")
    written = deltas(make, tmp_path / "lora")
    for name, core in task.cores.items():
        B, A = task.own[name]
        assert B.shape[1] == part.residual_rank
        wanted = task.modules[name].reconstruct(core.double()) + B.double() @ A.double()
        torch.testing.assert_close(written[name], wanted, atol=1e-5, rtol=1e-4)
    # truncated, it is the best approximation of the sum
    export_lora(task, tmp_path / "cut", rank=2)
    for name, delta in deltas(make, tmp_path / "cut").items():
        S = torch.linalg.svdvals(written[name])
        assert float((written[name] - delta).norm()) == pytest.approx(float(S[2:].norm()), rel=1e-3, abs=1e-5)
    # without it, the projection, which is not the core that was fitted together with it
    projection = project_lora(folders[2], basis, extra_rank=part.residual_rank)
    project_lora(folders[2], basis).save_pretrained(tmp_path / "bare")
    core = run(PeftModel.from_pretrained(make(), tmp_path / "bare"))
    alone = load_task(make(), bundle, part.name, own_directions=False)
    assert alone.peft_config[part.name].peft_type == "SUBSPACE" and alone.peft_config[part.name].extra_rank == 0
    torch.testing.assert_close(run(alone), core, atol=1e-5, rtol=1e-4)
    with pytest.warns(FutureWarning, match=r"as_lora=False leaves own directions .* Say own_directions=False"):
        alone = load_task(make(), bundle, part.name, as_lora=False)
    torch.testing.assert_close(run(alone), core, atol=1e-5, rtol=1e-4)
    alone = load_task(make(), bundle, part.name, as_lora=True, own_directions=False)
    assert alone.peft_config[part.name].peft_type == "LORA"
    torch.testing.assert_close(run(alone), core, atol=1e-5, rtol=1e-4)
    # with directions of its own it is a task like others: the projection with as many
    projection.save_pretrained(tmp_path / "own")
    torch.testing.assert_close(
        run(load_task(make(), bundle, part.name)),
        run(PeftModel.from_pretrained(make(), tmp_path / "own")),
        atol=1e-5,
        rtol=1e-4,
    )


def test_the_smallest_rank_that_suffices_is_kept_and_good_adapters_need_none(fleet, tmp_path):
    basis, folders = fleet[bert]
    report = compress_fleet(
        folders, basis, tmp_path / "out", min_energy=0.6, residual=4, skip_bad=True, progress=False
    )
    ranks = {each.residual_rank for each in report.adapters}
    assert 0 in ranks and len(ranks) > 1
    for each, folder in zip(report.adapters, folders, strict=True):
        assert each.refused is None and enough(each.total, 0.6)
        if each.residual_rank:
            fewer = project_lora(folder, basis, extra_rank=each.residual_rank - 1)
            assert not enough(shares(fewer)[0], 0.6)
            now = project_lora(folder, basis, extra_rank=each.residual_rank)
            assert each.total.kept == pytest.approx(now.energy_kept, abs=1e-9)
            assert each.total.kept + each.total.residual == pytest.approx(now.energy_with_own, abs=1e-9)
            entry = open_bundle(tmp_path / "out").entry(each.name)
            assert (entry["energy_kept"], entry["energy_residual"]) == (each.total.kept, each.total.residual)


def test_the_storage_table_counts_files(fleet, tmp_path):
    basis, folders = fleet[bert]
    report = compress_fleet(folders, basis, tmp_path / "out", min_energy=0, progress=False)
    storage, weights = report.storage, [Path(folder, "adapter_model.safetensors").stat().st_size for folder in folders]
    assert storage.before == sum(weights) and [each.bytes_before for each in report.adapters] == weights
    assert storage.basis == Path(basis.location, "basis.safetensors").stat().st_size
    assert storage.bundle == (tmp_path / "out" / "bundle.safetensors").stat().st_size
    assert storage.after == storage.basis + storage.bundle
    n, saved = storage.break_even, storage.per_adapter_before - storage.per_adapter_after
    assert n * saved >= storage.basis > (n - 1) * saved
    assert json.loads(json.dumps(report.to_dict()))["storage"]["break_even"] == n
    # a basis so large, and adapters so small, that nothing is saved
    tiny = [str(train_lora(bert, tmp_path / f"r1-{i}", i, r=1)) for i in range(2)]
    wide = build_basis(builder="random", base_model=bert(), target_modules=["query", "value"], k=24, progress=False)
    wide.save_pretrained(tmp_path / "wide")
    assert compress_fleet(tiny, wide, tmp_path / "more", min_energy=0, progress=False).storage.break_even is None


def test_heads_and_sources_in_memory_come_along(tmp_path):
    folders = [train_lora(bert, tmp_path / f"l{i}", i, modules_to_save=["classifier"]) for i in range(2)]
    build_basis(folders, k=16, progress=False).save_pretrained(tmp_path / "basis")
    live = PeftModel.from_pretrained(bert(), folders[1], adapter_name="live")
    report = compress_fleet([folders[0], live], tmp_path / "basis", tmp_path / "out", progress=False)
    assert [each.name for each in report.adapters] == ["l0", "live"]
    assert report.adapters[1].bytes_before > 0 and report.adapters[0].verdict == "faithful"
    for name, folder in (("l0", folders[0]), ("live", folders[1])):
        expected = logits(PeftModel.from_pretrained(bert(), folder))
        torch.testing.assert_close(logits(load_task(bert(), tmp_path / "out", name)), expected, atol=1e-4, rtol=1e-3)


def test_what_is_refused_and_what_is_left_out(fleet, fleets, tmp_path, capsys):
    basis, folders = fleet[bert]
    broken, torn = tmp_path / "nan", tmp_path / "torn"
    for folder in (broken, torn):
        train_lora(bert, folder, 1)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    (torn / "adapter_model.safetensors").write_bytes((torn / "adapter_model.safetensors").read_bytes()[:-9])
    twin = shutil.copytree(folders[0], tmp_path / "twin" / Path(folders[0]).name)
    stranger = train_lora(bert, tmp_path / "stranger", 99)
    given = [folders[0], stranger, broken, torn, fleets[gpt2][0], twin, tmp_path / "nowhere"]
    reasons = [
        "the basis keeps 2.3 %",
        "NaN",
        "truncated",
        "not in the basis",
        "is called 'lora0' as well",
        "no such folder",
    ]
    with pytest.raises(SubspaceError) as caught:
        compress_fleet(given, basis, tmp_path / "out", progress=False)
    said = str(caught.value)
    assert [reason for reason in (*reasons, "skip_bad=True", "6 of 7") if reason not in said] == [], said
    assert not (tmp_path / "out").exists()
    report = compress_fleet(given, basis, tmp_path / "out", skip_bad=True, progress=False)
    for each, reason in zip(report.adapters[1:], reasons, strict=True):
        assert reason in each.refused
    assert list(open_bundle(tmp_path / "out")) == ["lora0"] and report.storage.adapters == 1
    with pytest.raises(SubspaceError, match="in a residual of rank 1"):
        compress_fleet([stranger], basis, tmp_path / "no", min_energy=0.99, residual=1, progress=False)
    with pytest.raises(SubspaceError, match="2 of 2"):
        compress_fleet([stranger, broken], basis, tmp_path / "no", skip_bad=True, progress=False)
    memory = build_basis(folders[:2], k=4, progress=False)
    memory = SubspaceBasis(dict(memory.items()), memory.info)
    for arguments, message in (
        ({"min_energy": 1.5}, "from 0 to 1"),
        ({"min_energy": float("nan")}, "from 0 to 1"),
        ({"residual": -1}, "give a rank"),
        ({"residual": 1.5}, "give a rank"),
        ({"loras": []}, "No adapters"),
        ({"basis": memory}, "memory only"),
    ):
        with pytest.raises(SubspaceError, match=message):
            compress_fleet(
                **{"loras": folders, "basis": basis, "out": tmp_path / "no", "progress": False, **arguments}
            )
    assert not (tmp_path / "no").exists()
    line = [
        "compress",
        str(stranger),
        folders[0],
        "--basis",
        basis.location,
        "--out",
        str(tmp_path / "cli"),
        "--quiet",
    ]
    assert main(line) == 1 and "--residual" in capsys.readouterr().err
    assert main([*line, "--residual", "4"]) == 0
    said = capsys.readouterr().out
    assert "basis and bundle" in said and "smaller in all" in said and "residual of rank" not in said.split("\n")[-8]
    assert main([*line, "--residual", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in facts["adapters"]] == ["stranger", "lora0"] and facts["residual"] == 4
    assert (
        main(["bundle", "extract", str(tmp_path / "cli"), "stranger", "--as-lora", "--out", str(tmp_path / "x")]) == 0
    )
    assert (tmp_path / "x" / "stranger" / "adapter_model.safetensors").is_file()


def test_it_takes_what_build_basis_takes(fleet, tmp_path, monkeypatch, capsys):
    basis, folders = fleet[bert]
    for number in range(3):
        shutil.copytree(folders[number], tmp_path / "loras" / f"l{number}")
    (tmp_path / "fleet.txt").write_text("# the fleet\nloras/l[01]\nloras/l2  # the last one\n")
    monkeypatch.setattr(
        "subspace_peft.sources.references._collection", lambda slug, token: [str(tmp_path / "loras" / "l1")]
    )
    every = ["l0", "l1", "l2"]
    for number, (given, names) in enumerate(
        (
            (f"{tmp_path}/loras/*", every),
            (Path(tmp_path, "loras", "*"), every),
            (f"{tmp_path}/loras/**/adapter_config.json", every),
            (str(tmp_path / "fleet.txt"), every),
            ((str(tmp_path / "loras" / "l2"), f"{tmp_path}/loras/l[01]"), ["l2", "l0", "l1"]),
            ("collection:owner/some-fleet", ["l1"]),
            (str(tmp_path / "loras" / "l0"), ["l0"]),
            (PeftModel.from_pretrained(bert(), folders[0], adapter_name="live"), ["live"]),
        )
    ):
        report = compress_fleet(given, basis, tmp_path / f"out{number}", min_energy=0, progress=False)
        assert [each.name for each in report.adapters] == names and not any(each.refused for each in report.adapters)
        assert list(open_bundle(tmp_path / f"out{number}")) == names
    # the shell's pattern that a program passes on, and a list, from the command line
    for given, count in ((f"{tmp_path}/loras/l[01]", 2), (str(tmp_path / "fleet.txt"), 3)):
        line = [
            "compress",
            given,
            "--basis",
            basis.location,
            "--out",
            str(tmp_path / f"cli{count}"),
            "--min-energy",
            "0",
        ]
        assert main([*line, "--quiet"]) == 0 and capsys.readouterr().out.startswith(f"{count} adapters: {count} in ")


def test_a_pattern_without_a_match_and_a_place_listed_twice_are_refused_by_name(fleet, tmp_path):
    basis, folders = fleet[bert]
    nothing = f"{tmp_path}/nothing/*"
    with pytest.raises(SubspaceError, match="1 of 1 adapters cannot be compressed") as caught:
        compress_fleet(nothing, basis, tmp_path / "out", progress=False)
    assert str(caught.value).count(nothing) == 1 and "matches no folder" in str(caught.value)
    with pytest.raises(SubspaceError, match="listed twice: list it once"):
        compress_fleet([folders[0], folders[0]], basis, tmp_path / "out", min_energy=0, progress=False)
    given = [nothing, folders[0], folders[0], tmp_path / "gone.txt"]
    report = compress_fleet(given, basis, tmp_path / "out", min_energy=0, skip_bad=True, progress=False)
    assert [bool(each.refused) for each in report.adapters] == [True, True, False, True]
    assert list(open_bundle(tmp_path / "out")) == ["lora0"] and report.storage.adapters == 1
    # a bundle inside the folders that a pattern names would be one of them
    with pytest.raises(SubspaceError, match="Give another place"):
        compress_fleet(f"{Path(folders[0]).parent}/lora*", basis, folders[0], min_energy=0, progress=False)
