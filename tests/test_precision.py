"""Bases stored in fewer bits: smaller files, orthonormal directions, the loss stated as it is, damaged files
refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from subspace_peft import ModuleBasis, SubspaceBasis, SubspaceConfig, build_basis, project_lora
from subspace_peft.basis.module import combine_digests
from subspace_peft.basis.precision import stored_digest
from subspace_peft.builders import rebuild_basis
from subspace_peft.cli import main
from subspace_peft.errors import BadFileError, SubspaceError
from subspace_peft.report import validate_basis
from subspace_peft.report.inspect import inspect_path
from subspace_peft.sources import open_source

from .models import bert, inputs, randomise

LOWER = ("bfloat16", "float16", "int8")
# of a fleet of 12 in 256 × 192 dimensions: share of the energy in the basis
LOST = {"bfloat16": 2e-5, "float16": 2e-6, "int8": 1e-3}


@pytest.fixture(scope="module")
def fleet() -> list[tuple[dict[str, torch.Tensor], dict[str, object]]]:
    """State dicts that have 12 directions per side in common, and noise."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"layer.0.up": (256, 192), "layer.1.up": (256, 192)}
    common = {name: [torch.randn(d, 12, generator=draw) for d in size] for name, size in sizes.items()}
    made = []
    for _ in range(8):
        state = {}
        for name, sides in common.items():
            left, right = (
                side @ torch.randn(12, 4, generator=draw) + 0.3 * torch.randn(len(side), 4, generator=draw)
                for side in sides
            )
            state |= {f"{name}.lora_B.weight": left, f"{name}.lora_A.weight": right.T.contiguous()}
        made.append((state, {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "synthetic"}))
    return made


@pytest.fixture(scope="module")
def basis(fleet) -> SubspaceBasis:
    return build_basis(fleet, k=12, directions=3, progress=False)


# -- what comes back
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOWER)
def test_directions_come_back_orthonormal_and_near(basis, precision, tmp_path):
    small = basis.to_precision(precision)
    small.save_pretrained(tmp_path)
    loaded = SubspaceBasis.from_pretrained(tmp_path)
    assert loaded == small and loaded != basis
    assert (loaded.precision, basis.precision) == (precision, None)
    assert loaded.shapes() == small.shapes() == basis.shapes()
    for name in basis:
        old, new = basis[name], loaded[name]
        assert {value.dtype for value in new.tensors().values()} == {torch.float32}
        for one, same in zip(new.tensors().values(), small[name].tensors().values(), strict=True):
            assert torch.equal(one, same)
        for directions, before in ((new.U.T, old.U.T), (new.V, old.V)):
            assert torch.allclose(directions @ directions.T, torch.eye(12), atol=1e-6)
            cosines = torch.linalg.svdvals(directions @ before.T)
            assert float(cosines.min()) ** 2 > 1 - LOST[precision]
        # what is stored of the fleet is the least-squares optimum in the new directions
        for key in ("M", "cores"):
            assert torch.allclose(
                getattr(new, key),
                (
                    new.project(old.U @ getattr(old, key) @ old.V)
                    if key == "M"
                    else torch.stack([new.project(old.reconstruct(core)) for core in old.cores])
                ),
                atol=1e-4,
            )
        assert torch.allclose(new.G.flatten(1).norm(dim=1), torch.ones(3), atol=1e-5)
        core = torch.randn(12, 12)
        assert torch.allclose(new.project(new.reconstruct(core)), core, atol=1e-4)


@pytest.mark.parametrize("precision", LOWER)
def test_the_loss_is_stated_as_it_is(basis, fleet, precision):
    small = basis.to_precision(precision)
    said = small.info["precision"]
    assert said["stored"] == precision and said["of"] == basis.fingerprint
    lost = []
    for state in fleet:
        source = open_source(state)
        for name in basis:
            update = source.factors(name)
            energies = [
                float(each[name].project((update.B, update.A)).double().square().sum()) for each in (basis, small)
            ]
            # what lies outside the basis may come into its reach: that is no loss
            inside = (
                basis[name].U.double() @ basis[name].project((update.B, update.A)).double() @ basis[name].V.double()
            )
            kept = float(small[name].project(inside).square().sum())
            lost.append(1 - kept / energies[0])
            assert lost[-1] <= said["energy_lost_at_most"]
    assert sum(lost) / len(lost) == pytest.approx(said["energy_lost"], rel=0.2)
    assert 0 < said["energy_lost"] < said["energy_lost_at_most"] < LOST[precision]
    assert 0 < said["orthonormality"] < 1e-2


def test_int8_loses_most_and_float16_least(basis):
    lost = {precision: basis.to_precision(precision).info["precision"]["energy_lost"] for precision in LOWER}
    assert lost["float16"] < lost["bfloat16"] < lost["int8"]


@pytest.mark.parametrize(("precision", "share"), [("bfloat16", 0.52), ("float16", 0.52), ("int8", 0.28)])
def test_files_are_smaller(fleet, precision, share, tmp_path):
    plain = build_basis(fleet, k=12, keep_cores=False, progress=False)
    sizes = []
    for number, each in enumerate((plain, plain.to_precision(precision))):
        folder = each.save_pretrained(tmp_path / str(number))
        sizes.append((folder / "basis.safetensors").stat().st_size)
    # what is of the cores' size stays float32
    small = 4 * sum(
        m.M.numel() + m.core_rms.numel() + m.spectrum_out.numel() + m.spectrum_in.numel() for m in plain.values()
    )
    assert sizes[1] - small < share * (sizes[0] - small)


def test_float32_is_the_basis_itself_and_nothing_is_rounded_twice(basis, tmp_path):
    assert basis.to_precision("float32") is basis
    small = basis.to_precision("int8")
    assert small.to_precision("int8") is small
    for other in ("float32", "bfloat16"):
        with pytest.raises(SubspaceError, match=f"stored as int8 already.*{basis.fingerprint}"):
            small.to_precision(other)
    with pytest.raises(SubspaceError, match=r"no precision 'int4'.*int8"):
        basis.to_precision("int4")


def test_copies_and_cuts(basis):
    small = basis.to_precision("int8")
    assert copy.deepcopy(small) is small
    again = pickle.loads(pickle.dumps(small))
    assert again == small and again.precision == "int8"
    for other in (small.truncate(4), small.to(torch.float64)):
        assert other.precision is None and "precision" not in other.info
        assert other == pickle.loads(pickle.dumps(other))


def test_directions_that_int8_cannot_hold_are_refused_naming_the_module():
    # one entry near 1, the others below half a step: rounded away
    spiky = torch.full((60_000, 1), 0.0035)
    spiky[0] = (1 - float(spiky[1:].square().sum())) ** 0.5
    basis = SubspaceBasis({"odd.one": ModuleBasis(spiky, torch.eye(1, 8))})
    with pytest.raises(SubspaceError, match=r"'odd.one'.*far larger.*bfloat16"):
        basis.to_precision("int8")
    assert basis.to_precision("bfloat16")["odd.one"].U.double().norm() == pytest.approx(1, abs=1e-6)


# -- in use
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOWER)
def test_a_task_in_it_is_saved_and_loaded(bases, precision, tmp_path):
    bases[bert].to_precision(precision).save_pretrained(tmp_path / "basis")
    config = SubspaceConfig(basis=str(tmp_path / "basis"), task_type="SEQ_CLS", mean_gain="fixed")
    model = randomise(get_peft_model(bert(), config)).eval()
    model.save_pretrained(tmp_path / "task")
    with torch.no_grad():
        wanted = model(input_ids=inputs()).logits
        found = PeftModel.from_pretrained(bert(), tmp_path / "task").eval()(input_ids=inputs()).logits
    assert torch.equal(found, wanted)
    said = json.loads((tmp_path / "task" / "adapter_config.json").read_text())["basis_fingerprint"]
    assert said == SubspaceBasis.from_pretrained(tmp_path / "basis").fingerprint


def test_projection_keeps_about_as_much(bases, fleets):
    one, other = (
        project_lora(fleets[bert][0], basis).energy_kept for basis in (bases[bert], bases[bert].to_precision("int8"))
    )
    assert other == pytest.approx(one, abs=1e-2)


def test_the_command_line_states_it_and_builds_it_again(fleets, tmp_path, capsys):
    out = tmp_path / "basis"
    assert main(["build", *fleets[bert], "--out", str(out), "-k", "4", "--precision", "int8", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "stored as int8, which loses" in printed
    facts = inspect_path(out)
    assert facts["verified"] and facts["precision"]["stored"] == "int8"
    assert f"stored as `int8`, which loses {facts['precision']['energy_lost']:.2g}" in (out / "README.md").read_text()
    assert validate_basis(out)["problems"] == []
    assert main(["validate", str(out)]) == 0
    assert rebuild_basis(out, progress=False).fingerprint == facts["fingerprint"]
    assert json.loads((out / "basis_config.json").read_text())["format_version"] == 2
    main(["build", "--from-config", str(out), "--out", str(tmp_path / "again"), "--quiet"])
    assert "is the one on record" in capsys.readouterr().out
    # without it everything is as it was before there were precisions
    main(["build", *fleets[bert], "--out", str(tmp_path / "plain"), "-k", "4", "--quiet"])
    config = json.loads((tmp_path / "plain" / "basis_config.json").read_text())
    assert config["format_version"] == 1 and "precision" not in config


# -- files from elsewhere
# --------------------------------------------------------------------------------------------------


def tamper(folder: Path, change, precision: str | None = "as it is") -> None:
    """Change a module's stored tensors, with hashes that fit."""
    file, config = folder / "basis.safetensors", folder / "basis_config.json"
    tensors, content = load_file(file), json.loads(config.read_text())
    name = next(iter(content["modules"]))
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    change(own)
    rest = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    save_file(rest | {f"{name}.{key}": value.contiguous() for key, value in own.items()}, file)
    content["modules"][name]["sha256"] = stored_digest(own)
    content["fingerprint"] = combine_digests({key: each["sha256"] for key, each in content["modules"].items()})
    if precision is None:
        content.pop("precision")
        content["format_version"] = 1
    config.write_text(json.dumps(content))


def setter(key: str, value):
    return lambda own: own.__setitem__(key, value(own[key]) if callable(value) else value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("U_scale"), "has U_scale of shape None"),
        (lambda own: own.pop("V_scale"), "has V_scale of shape None"),
        (setter("U_scale", lambda s: s * float("nan")), "U_scale holds values that are not positive numbers"),
        (setter("V_scale", lambda s: s * float("inf")), "V_scale holds values that are not positive numbers"),
        (setter("U_scale", lambda s: -s), "U_scale holds values that are not positive numbers"),
        (setter("U_scale", lambda s: s * 0), "U_scale holds values that are not positive numbers"),
        (setter("U_scale", lambda s: s[:-1]), "has U_scale of shape"),
        (setter("U_scale", lambda s: s[:, None]), "has U_scale of shape"),
        (setter("U_scale", lambda s: s.double()), "has U_scale of another dtype than F32"),
        (setter("U", lambda u: u.float()), "has U of another dtype than I8"),
        (setter("V", lambda v: v.half()), "has V of another dtype than I8"),
        (setter("U", lambda u: u[:-1]), "has U of shape"),
        (setter("U_scale", lambda s: s * 1.5), "U is not orthonormal"),
        (setter("U_scale", lambda s: s * 1e30), "U is not orthonormal"),
        (setter("V", lambda v: torch.zeros_like(v)), "V is not orthonormal"),
        (setter("V", lambda v: v[:1].repeat(len(v), 1)), "V is not orthonormal"),
        (setter("M", lambda m: m * float("nan")), "M holds NaN"),
    ],
)
def test_corrupt_int8_files_are_refused_naming_the_file(bases, change, message, tmp_path):
    bases[bert].to_precision("int8").save_pretrained(tmp_path)
    tamper(tmp_path, change)
    with pytest.raises(BadFileError, match=message) as caught:
        for module in SubspaceBasis.from_pretrained(tmp_path).values():
            assert module
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "change", "message"),
    [
        ("bfloat16", setter("U", lambda u: u * float("nan")), "U holds NaN"),
        ("bfloat16", setter("U", lambda u: u.float()), "another dtype than BF16"),
        ("float16", setter("V", lambda v: v * 2), "V is not orthonormal"),
    ],
)
def test_corrupt_half_precision_files_are_refused(bases, precision, change, message, tmp_path):
    bases[bert].to_precision(precision).save_pretrained(tmp_path)
    tamper(tmp_path, change)
    with pytest.raises(BadFileError, match=message):
        for module in SubspaceBasis.from_pretrained(tmp_path).values():
            assert module


def test_int8_without_a_precision_is_no_basis(bases, tmp_path):
    bases[bert].to_precision("int8").save_pretrained(tmp_path)
    tamper(tmp_path, lambda own: None, precision=None)
    with pytest.raises(BadFileError, match=r"dtype torch.int8; expected one of"):
        for module in SubspaceBasis.from_pretrained(tmp_path).values():
            assert module
    assert validate_basis(tmp_path)["problems"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stored": "int4"}, "precision is stored='int4'"),
        ({"stored": ["int8"]}, "precision is stored="),
        ({"energy_lost": float("inf")}, "precision has energy_lost"),
        ({"energy_lost": "little"}, "precision has energy_lost='little'"),
        ("int8", "precision is a str"),
        (None, "format version 2 without a precision"),
    ],
)
def test_a_config_that_says_nonsense_of_its_precision_is_refused(bases, given, message, tmp_path):
    bases[bert].to_precision("int8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "basis_config.json").read_text())
    config["precision"] = {**config["precision"], **given} if isinstance(given, dict) else given
    (tmp_path / "basis_config.json").write_text(json.dumps(config))
    with pytest.raises(BadFileError, match=message):
        SubspaceBasis.from_pretrained(tmp_path)


def test_a_flipped_bit_is_noticed(bases, tmp_path):
    bases[bert].to_precision("int8").save_pretrained(tmp_path)
    file = tmp_path / "basis.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadFileError, match="altered or damaged"):
        for module in SubspaceBasis.from_pretrained(tmp_path).values():
            assert module
    assert len(validate_basis(tmp_path)["problems"]) == 1
