"""Projection, export, and the command line's doors to them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model

from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis, export_lora, project_lora
from subspace_peft.cli import main
from subspace_peft.errors import BasisMismatchError, SubspaceError
from subspace_peft.report import inspect_path, null_basis
from subspace_peft.tasks import read_task

from .models import bert, gpt2, inputs, randomise, train_lora


def logits(model):
    with torch.no_grad():
        return model.eval()(inputs()).logits


@pytest.fixture
def task(bases, kind, tmp_path):
    model = randomise(get_peft_model(kind(), SubspaceConfig(basis=bases[kind].location)))
    model.save_pretrained(tmp_path / "task")
    return str(tmp_path / "task")


# -- project ----------------------------------------------------------------------------------------------------------


def test_a_lora_inside_the_basis_survives_projection_exactly(kind, fleets, tmp_path):
    basis = build_basis(fleets[kind], k=20, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    projection = project_lora(fleets[kind][2], basis)
    assert projection.energy_kept == pytest.approx(1, abs=1e-5)
    assert projection.verdict == "faithful"
    projection.save_pretrained(tmp_path / "task")
    projected = PeftModel.from_pretrained(kind(), tmp_path / "task")
    original = PeftModel.from_pretrained(kind(), fleets[kind][2])
    torch.testing.assert_close(logits(projected), logits(original), atol=1e-4, rtol=1e-3)


def test_projection_is_the_least_squares_optimum_and_its_energy_is_honest(kind, fleets, bases):
    projection = project_lora(fleets[kind][0], bases[kind])
    model = PeftModel.from_pretrained(kind(), fleets[kind][0])
    kept = total = 0.0
    for name, module in bases[kind].items():
        layer = model.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default").double()
        delta = delta.T if kind is gpt2 else delta
        core = projection.cores[name]
        error = (delta - module.reconstruct(core)).norm()
        for _ in range(5):
            assert (delta - module.reconstruct(core + 0.01 * torch.randn_like(core))).norm() >= error - 1e-9
        share = 1 - float(error**2 / delta.norm() ** 2)
        assert projection.energy[name] == pytest.approx(share, abs=1e-5)
        kept, total = kept + share * float(delta.norm() ** 2), total + float(delta.norm() ** 2)
    assert projection.energy_kept == pytest.approx(kept / total, abs=1e-5)
    assert projection.relative_error == pytest.approx((1 - kept / total) ** 0.5, abs=1e-4)


def test_verdicts(fleets, bases, tmp_path):
    stranger = train_lora(bert, tmp_path / "stranger", seed=99)
    random = build_basis(like=bases[bert], builder="random", progress=False)
    assert project_lora(stranger, random).verdict == "poor"
    assert project_lora(stranger, random).energy_kept == pytest.approx(
        project_lora(stranger, random).energy_random, abs=0.04
    )


def test_modules_to_save_go_along(tmp_path):
    folders = [train_lora(bert, tmp_path / f"l{i}", i, modules_to_save=["classifier"]) for i in range(3)]
    basis = build_basis(folders, k=12, progress=False)
    basis.save_pretrained(tmp_path / "basis")
    project_lora(folders[0], basis).save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(bert(seed=0), tmp_path / "task")
    torch.testing.assert_close(
        logits(loaded), logits(PeftModel.from_pretrained(bert(), folders[0])), atol=1e-4, rtol=1e-3
    )


def test_projections_that_cannot_be(fleets, bases, tmp_path):
    with pytest.raises(BasisMismatchError, match="not in the basis"):
        project_lora(fleets[gpt2][0], bases[bert])
    with pytest.raises(BasisMismatchError, match="not in the basis"):
        project_lora(train_lora(bert, tmp_path / "key", 1, target_modules=["key"]), bases[bert])
    memory = build_basis(fleets[bert], k=3, progress=False)
    with pytest.raises(SubspaceError, match="stored"):
        project_lora(fleets[bert][0], memory).save_pretrained(tmp_path / "t")


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncated_export_is_the_best_approximation_of_that_rank(task, kind, tmp_path, rank):
    result = export_lora(task, tmp_path / "lora", rank=rank)
    full = read_task(task)
    lora = PeftModel.from_pretrained(kind(), tmp_path / "lora")
    kept = total = 0.0
    for name, core in full.cores.items():
        delta = lora.base_model.model.get_submodule(name).get_delta_weight("default").double()
        delta = delta.T if kind is gpt2 else delta
        dense = full.modules[name].reconstruct(core)
        S = torch.linalg.svdvals(dense)
        assert float((dense - delta).norm()) == pytest.approx(float(S[rank:].norm()), rel=1e-3, abs=1e-5)
        kept, total = kept + float(S[:rank].square().sum()), total + float(S.square().sum())
    assert result.rank == rank
    assert result.energy_kept == pytest.approx(kept / total, rel=1e-4)


def test_export_needs_no_patterns_where_modules_differ_in_size(fleets, tmp_path):
    basis = build_basis(fleets[bert], k=0.6, progress=False)
    assert len({shape["k_out"] for shape in basis.shapes().values()}) > 1
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=basis, save_basis=True)))
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["lora_alpha"] == config["r"]
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


def test_unequal_sides_export_at_the_smaller_one(fleets, tmp_path):
    for k, k_in in ((3, 7), (7, 3)):
        basis = build_basis(fleets[bert], k=k, k_in=k_in, progress=False)
        model = randomise(get_peft_model(bert(), SubspaceConfig(basis=basis, save_basis=True)))
        assert export_lora(model, tmp_path / f"lora{k}").rank == 3
        loaded = PeftModel.from_pretrained(bert(), tmp_path / f"lora{k}")
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rank": 0}, "at least 1"), ({"pad_to": 2}, "has rank 6"), ({"pad_to": "mlx"}, "has rank 6")],
)
def test_exports_that_cannot_be(task, tmp_path, arguments, message):
    with pytest.raises(SubspaceError, match=message):
        export_lora(task, tmp_path / "lora", **arguments)
    assert not (tmp_path / "lora").exists()


def test_a_lora_is_no_task(fleets, tmp_path):
    for refuse in (lambda: export_lora(fleets[bert][0], tmp_path / "x"), lambda: inspect_path(fleets[bert][0])):
        with pytest.raises(SubspaceError, match="peft_type is LORA, not SUBSPACE"):
            refuse()


def test_modules_to_save_can_stay_behind(bases, tmp_path):
    config = SubspaceConfig(basis=bases[bert].location, modules_to_save=["classifier"])
    get_peft_model(bert(), config).save_pretrained(tmp_path / "task")
    assert export_lora(tmp_path / "task", tmp_path / "with").modules_to_save == ["classifier"]
    assert export_lora(tmp_path / "task", tmp_path / "without", modules_to_save=False).modules_to_save == []


# -- reports ----------------------------------------------------------------------------------------------------------


def test_the_null_has_the_same_strengths_and_keeps_less(fleets, bases):
    null = null_basis(fleets[bert], k=6, progress=False)
    for a, b in zip(null.info["sources"], bases[bert].info["sources"], strict=True):
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-6)
    assert null.fingerprint == null_basis(fleets[bert], k=6, progress=False).fingerprint


def test_inspect_tells_a_basis_from_a_task(bases, task, kind, tmp_path):
    facts = inspect_path(bases[kind].location)
    assert (facts["kind"], facts["fingerprint"], facts["verified"]) == ("basis", bases[kind].fingerprint, True)
    facts = inspect_path(task)
    assert (facts["kind"], facts["basis_fingerprint"]) == ("task", bases[kind].fingerprint)
    with pytest.raises(SubspaceError, match="neither a basis"):
        inspect_path(tmp_path)


# -- command line -----------------------------------------------------------------------------------------------------


def cli(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_build_inspect_project_export(capsys, fleets, kind, tmp_path):
    basis, lora, task = str(tmp_path / "basis"), fleets[kind][0], str(tmp_path / "task")
    code, out, _ = cli(capsys, "build", *fleets[kind], "--out", basis, "-k", "6", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["fingerprint"] == SubspaceBasis.from_pretrained(basis).fingerprint
    code, out, _ = cli(capsys, "inspect", basis)
    assert code == 0
    assert "every tensor verified" in out
    code, out, _ = cli(capsys, "project", lora, "--basis", basis, "--out", task)
    assert code == 0
    assert out.splitlines()[-1].startswith("energy kept ")
    code, out, _ = cli(capsys, "project", lora, "--basis", basis, "--json")
    assert json.loads(out)["verdict"] in ("faithful", "partial", "poor")
    code, out, _ = cli(capsys, "inspect", task, "--json")
    assert json.loads(out)["kind"] == "task"
    code, out, _ = cli(capsys, "export-lora", task, "--out", str(tmp_path / "lora"), "--pad-to", "vllm", "--json")
    assert json.loads(out)["rank"] == 8
    same = PeftModel.from_pretrained(kind(), task), PeftModel.from_pretrained(kind(), tmp_path / "lora")
    torch.testing.assert_close(logits(same[0]), logits(same[1]), atol=1e-5, rtol=1e-4)
    again = ["build", *fleets[kind], "--out", basis, "-k", "0.9", "--builder", "adapters", "--quiet"]
    code, out, err = cli(capsys, *again)
    assert (code, out) == (1, "") and "holds a basis" in err and "1 task or bundle of this machine needs" in err
    with pytest.warns(UserWarning, match="replaced, and 1 task or bundle of this machine needs"):
        code, out, _ = cli(capsys, *again, "--force")
    assert code == 0
    assert float(re.search(r"^energy kept ([\d.]+) %", out, re.M)[1]) >= 90


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "/no/such/lora", "--out", "OUT"],
        ["build", "/no/such/lora", "--out", "OUT", "-k", "many"],
        ["inspect", "/no/such/basis"],
        ["project", "/no/such/lora", "--basis", "/no/such/basis"],
        ["export-lora", "/no/such/task", "--out", "OUT"],
        ["export-lora", "/no/such/task", "--out", "OUT", "--pad-to", "some"],
        ["run"],
    ],
)
def test_errors_are_one_plain_message_and_exit_1(capsys, tmp_path, arguments):
    code, out, err = cli(capsys, *[str(tmp_path / "out") if a == "OUT" else a for a in arguments])
    assert (code, out) == (1, "")
    assert err.startswith(f"subspace-peft {arguments[0]}: ")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["build", "update", "complete", "inspect", "project", "export-lora", "demo", "run"])
def test_help_is_instant_and_imports_nothing_heavy(verb):
    program = (
        "import sys; from subspace_peft.cli.main import parser\n"
        f"try: parser().parse_args([{verb!r}, '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'peft', 'transformers', 'numpy', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
