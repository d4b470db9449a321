"""Tasks with directions of their own in a bundle: packed, read alone, loaded as what they are, migrated, refused."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from subspace_peft import (
    SubspaceBasis,
    add_tasks,
    build_basis,
    bundle_tasks,
    compress_fleet,
    extract_task,
    extract_tasks,
    load_task,
    migrate_bundle,
    open_bundle,
    project_lora,
    update_basis,
)
from subspace_peft.bundle.format import BUNDLE_FILE
from subspace_peft.bundle.index import open_index
from subspace_peft.cli import main
from subspace_peft.errors import BadFileError, BasisMismatchError
from subspace_peft.tasks.read import read_task

from ..models import bert, train_lora
from .conftest import logits, rewrite, save

VALUE = "layer.1.attention.self.value"
KINDS = {
    "plain": {},
    "own": {"extra_rank": 2},
    "pattern": {"extra_rank": 1, "extra_rank_pattern": {"query": 3, VALUE: 0}},
    "only": {"extra_rank_pattern": {VALUE: 2}},
    "cut": {"k": 3, "extra_rank": 2},
    "factor": {"coefficients": "factor", "r": 3, "extra_rank": 1, "mean_gain": "fixed"},
    "value-only": {"target_modules": ["value"], "coefficients": "diagonal", "extra_rank": 2},
    "head": {"modules_to_save": ["classifier"], "extra_rank": 2},
}


@pytest.fixture(scope="module")
def made(bases, tmp_path_factory):
    """A folder for each task, and their bundle, that no test writes into."""
    root = tmp_path_factory.mktemp("own")
    folders = {
        name: saved(root / name, bases[bert].location, seed, **given)
        for seed, (name, given) in enumerate(KINDS.items())
    }
    bundle_tasks(folders, root / "bundle", progress=False)
    return root


def saved(folder, basis, seed, **given) -> Path:
    """A task whose own directions count for as much as its core."""
    save(bert, folder, basis, seed, **given)
    tensors = load_file(folder / "adapter_model.safetensors")
    small = {key: 0.02 * value if key.endswith((".weight", ".up")) else value for key, value in tensors.items()}
    save_file(small, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@contextlib.contextmanager
def silent():
    """Nothing is said of what earlier versions did."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(own directions|residual|LoRA)", FutureWarning)
        yield


@pytest.fixture
def bundle(made):
    return open_bundle(made / "bundle")


def of(folder) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(bert(), folder))


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_their_own_part_is_no_trifle_here(made, bundle):
    for name in set(KINDS) - {"plain"}:
        without = logits(load_task(bert(), bundle, name, own_directions=False))
        assert (of(made / name) - without).abs().max() > 1e-3, name


@pytest.mark.parametrize("name", KINDS)
def test_every_task_comes_out_as_it_went_in(name, made, bundle, tmp_path):
    expected = of(made / name)
    with silent():
        loaded = load_task(bert(), bundle, name)
        out = extract_task(bundle, name, tmp_path / "out")
    close(logits(loaded), expected)
    assert loaded.peft_config[name].peft_type == "SUBSPACE"
    close(of(out), expected)
    close(logits(load_task(bert(), bundle, name, as_lora=True)), expected)
    close(of(extract_task(bundle, name, tmp_path / "lora", as_lora=True)), expected)
    before, after = read_task(made / name), read_task(out)
    assert {n: B.shape for n, (B, _) in before.own.items()} == {n: B.shape for n, (B, _) in after.own.items()}
    for module, (B, A) in before.own.items():
        assert (after.own[module][0] @ after.own[module][1] - B @ A).norm() < 1e-6 * (B @ A).norm()
    # and in again
    again = bundle_tasks({name: out}, tmp_path / "again", progress=False)
    assert again.own_directions(name) == bundle.own_directions(name)
    close(logits(load_task(bert(), again, name)), expected)


def test_a_loaded_task_is_trained_further(bundle):
    model = load_task(bert(), bundle, "own", is_trainable=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".extra_" in name]
    assert len(trained) == 8
    model(torch.arange(1, 9)[None]).logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name in trained)


def test_several_with_different_numbers_in_one_model(made, bundle):
    model = None
    for name in ("own", "plain", "only", "cut", "pattern"):
        model = load_task(bert() if model is None else model, bundle, name)
        model.set_adapter(name)
        close(logits(model), of(made / name))


def test_the_index_says_what_they_have(bundle, tmp_path, capsys):
    found = open_index(bundle.location)
    assert {name: found[name].extra_rank for name in found} == {
        "plain": 0, "own": 2, "pattern": 3, "only": 2, "cut": 2, "factor": 1, "value-only": 2, "head": 2,
    }  # fmt: skip
    counts = {name: sorted(found.own_directions(name).values()) for name in found}
    assert counts["pattern"] == [0, 1, 3, 3] and counts["only"] == [0, 0, 0, 2] and counts["value-only"] == [2, 2]
    # the configuration is the user's own where it says as much
    assert bundle.config("pattern").extra_rank_pattern == KINDS["pattern"]["extra_rank_pattern"]
    assert bundle.config("plain").extra_rank == 0 and "own directions per module: 2" in repr(found["own"])
    assert main(["bundle", "ls", bundle.location]) == 0
    said = capsys.readouterr().out
    assert "own directions 2 per module" in said and "own directions 7 in 3 of 4 modules" in said
    assert main(["bundle", "ls", bundle.location, "--json", "--verify"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert tasks["pattern"]["own_directions"] == 7 and tasks["pattern"]["extra_rank"] == 3
    assert tasks["pattern"]["residual_rank"] == 3 and not any(task["problem"] for task in tasks.values())


def test_reading_one_task_reads_no_other(bundle, monkeypatch):
    asked = []
    read = type(bundle.store).read
    monkeypatch.setattr(type(bundle.store), "read", lambda self, a, b: (asked.append((a, b)), read(self, a, b))[1])
    for name in ("own", "head", "plain"):
        bundle.task(name)
    assert asked == [bundle.span(name) for name in ("own", "head", "plain")]
    start, end = bundle.span("own")
    # a core of 6 × 6 and two directions of 32 + 32, in four modules
    assert end - start == 4 * (36 + 2 * 64) * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("alpha", [256.0, 4.0])
def test_other_dtypes(dtype, alpha, bases, tmp_path):
    folder = saved(tmp_path / "task", bases[bert].location, 1, extra_rank=2, alpha=alpha)
    made = bundle_tasks([folder], tmp_path / "bundle", dtype=dtype, progress=False)
    assert made["task"].bytes == 4 * (36 + 2 * 64) * dtype.itemsize and not made.verify()
    before, after = read_task(folder), made.task("task")
    bound = 0.01 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-7
    for module, (B, A) in before.own.items():
        # neither side has left float16's range, however small u's entries are beside v's
        change = after.own[module][0] @ after.own[module][1] - B @ A
        assert change.norm() < bound * (B @ A).norm()
    added = add_tasks(made, {"more": folder}, progress=False)
    assert added.raw("task") == added.raw("more") == made_bytes(added, "more")


def made_bytes(bundle, name) -> bytes:
    start, end = bundle.span(name)
    return Path(bundle.location, BUNDLE_FILE).read_bytes()[start:end]


def test_adding_leaves_them_byte_for_byte_and_damage_is_found(made, bases, tmp_path):
    folders = [made / name for name in ("own", "plain")]
    first = bundle_tasks(folders, tmp_path / "bundle", progress=False)
    raw = {name: first.raw(name) for name in first}
    second = add_tasks(first, [made / "only"], progress=False)
    assert {name: second.raw(name) for name in raw} == raw and not second.verify()
    file = tmp_path / "bundle" / BUNDLE_FILE
    data = bytearray(file.read_bytes())
    data[second.span("own")[1] - 2] ^= 1
    file.write_bytes(bytes(data))
    found = open_bundle(tmp_path / "bundle")
    assert list(found.verify()) == ["own"]
    with pytest.raises(BadFileError, match="'own' has sha256"):
        load_task(bert(), found, "own")


# -- bundles of earlier versions, which called them residuals --------------------------------------------------------


def forget(header, index):
    """As an earlier version has it: the configuration says nothing of own directions."""
    for config in (index["config"], *(entry.get("config", {}) for entry in index["entries"].values())):
        for key in ("extra_rank", "extra_rank_pattern"):
            config.pop(key, None)


@pytest.fixture
def earlier(made, tmp_path):
    bundle_tasks([made / "own", made / "pattern"], tmp_path / "earlier", progress=False)
    rewrite(tmp_path / "earlier", forget)
    return open_bundle(tmp_path / "earlier")


def test_a_residual_is_own_directions_now(made, earlier, tmp_path, capsys):
    for name in earlier:
        with pytest.warns(FutureWarning, match="which earlier versions loaded as a stock LoRA"):
            loaded = load_task(bert(), earlier, name)
        config = loaded.peft_config[name]
        assert config.peft_type == "SUBSPACE"
        shape = {"out": 32, "in": 32}
        assert {m: config.sizes.extra_of(m, shape) for m in earlier.sizes(name)} == earlier.own_directions(name)
        close(logits(loaded), of(made / name))
    with silent():
        close(logits(load_task(bert(), earlier, "own", own_directions=True)), of(made / "own"))
        lora = load_task(bert(), earlier, "own", as_lora=True)
        out = extract_tasks(earlier, tmp_path / "alone", own_directions=False, progress=False)
    close(logits(lora), of(made / "own"))
    assert [read_task(folder).own for folder in out] == [{}, {}]
    # with the flag of earlier versions, and its new name
    for flag in ("--no-residual", "--no-own-directions"):
        line = ["bundle", "extract", earlier.location, "own", "--out", str(tmp_path / flag), flag]
        assert main(line) == 0 and read_task(tmp_path / flag / "own").own == {}
    with pytest.warns(FutureWarning, match=r"--as-lora gives the LoRA|as_lora=True \(--as-lora\)"):
        assert main(["bundle", "extract", earlier.location, "own", "--out", str(tmp_path / "new")]) == 0
    assert read_task(tmp_path / "new" / "own").own


def test_as_lora_false_leaves_them_out_as_it_did_and_says_so(bundle):
    with pytest.warns(FutureWarning, match=r"as_lora=False leaves own directions \(residuals\) out, of 'own'"):
        loaded = load_task(bert(), bundle, "own", as_lora=False)
    assert loaded.peft_config["own"].extra_rank == 0
    with silent():
        loaded = load_task(bert(), bundle, "own", as_lora=False, own_directions=True)
        load_task(bert(), bundle, "plain", as_lora=False)
    assert loaded.peft_config["own"].extra_rank == 2


# -- other bases -----------------------------------------------------------------------------------------------------


def test_they_are_carried_to_a_basis_that_lacks_them_and_absorbed_by_one_that_has_them(bases, made, bundle, tmp_path):
    other = train_lora(bert, tmp_path / "lora", 77)
    grown = update_basis(bases[bert], [other], progress=False)
    grown.save_pretrained(tmp_path / "grown")
    moved, drifts = migrate_bundle(bundle, grown, tmp_path / "moved", progress=False)
    assert max(max(each.values()) for each in drifts.values()) < 1e-5
    for name in bundle:
        assert moved.own_directions(name) == bundle.own_directions(name)
        close(logits(load_task(bert(), moved, name)), of(made / name))
    held = extract_task(bundle, "own", tmp_path / "held", as_lora=True)
    holds = update_basis(bases[bert], [held], progress=False)
    holds.save_pretrained(tmp_path / "holds")
    moved, _ = migrate_bundle(bundle, holds, tmp_path / "absorbed", progress=False)
    for name in bundle:
        assert moved[name].extra_rank == (0 if name == "own" else bundle[name].extra_rank)
        close(logits(load_task(bert(), moved, name)), of(made / name))


def test_energies_follow_what_is_absorbed(bases, tmp_path):
    folders = [train_lora(bert, tmp_path / f"l{i}", 50 + i) for i in range(2)]
    compress_fleet(folders, bases[bert], tmp_path / "bundle", min_energy=0.5, residual=4, progress=False)
    old = open_bundle(tmp_path / "bundle")
    assert all(old[name].extra_rank and old.config(name).extra_rank for name in old)
    grown = update_basis(bases[bert], folders[:1], progress=False)
    grown.save_pretrained(tmp_path / "grown")
    moved, _ = migrate_bundle(old, grown, tmp_path / "moved", progress=False)
    before, after = old.entry("l0"), moved.entry("l0")
    assert moved["l0"].extra_rank == 0 and "residual_rank" not in after and after["energy_residual"] == 0
    assert after["energy_kept"] == pytest.approx(before["energy_kept"] + before["energy_residual"])
    assert moved.entry("l1")["energy_kept"] == old.entry("l1")["energy_kept"] and moved["l1"].extra_rank


def test_what_compress_keeps_is_what_project_keeps(bases, tmp_path):
    folder = train_lora(bert, tmp_path / "l0", 50)
    report = compress_fleet([folder], bases[bert], tmp_path / "bundle", min_energy=0.5, residual=4, progress=False)
    (adapter,) = report.adapters
    projection = project_lora(folder, bases[bert], extra_rank=adapter.residual_rank)
    assert projection.energy_kept == pytest.approx(adapter.total.kept)
    assert projection.energy_with_own == pytest.approx(adapter.total.kept + adapter.total.residual, abs=1e-6)
    projection.save_pretrained(tmp_path / "task")
    close(logits(load_task(bert(), tmp_path / "bundle", "l0")), of(tmp_path / "task"))


# -- what is refused -------------------------------------------------------------------------------------------------


def side(key: str, **change):
    """Change the entries of one side, or both, in the header, or take them out."""
    shape = {name: value for name, value in change.items() if name == "shape"}

    def act(header, index):
        number = index["apart"].index("own")
        for name in [each for each in header if each.startswith(f"{number}/") and each.endswith(VALUE)]:
            if name.split("/")[1] in key:
                entry = header.pop(name)
                if change:
                    header[name.replace(VALUE, change.get("module", VALUE))] = {**entry, **shape}

    return act


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (side("A"), r"own directions in module .* of shapes B \(32, 2\) and A missing"),
        (side("B"), r"of shapes B missing and A \(2, 32\)"),
        (side("A", shape=[64]), "are no factors of one update"),
        (side("A", shape=[4, 16]), "are no factors of one update"),
        (side("BA", module="nowhere"), "own directions in module '.*nowhere', and no core"),
    ],
)
def test_headers_that_lie_are_refused(damage, says, made, tmp_path):
    bundle_tasks([made / "plain", made / "own"], tmp_path / "bundle", progress=False)
    rewrite(tmp_path / "bundle", damage)
    with pytest.raises(BadFileError, match=says):
        open_bundle(tmp_path / "bundle")


def test_shapes_that_the_basis_does_not_have_are_refused(made, tmp_path):
    bundle_tasks([made / "plain", made / "own"], tmp_path / "bundle", progress=False)

    def turned(header, index):
        number = index["apart"].index("own")
        for key in [each for each in header if each.startswith((f"{number}/A/", f"{number}/B/"))]:
            header[key]["shape"] = [16, 4] if "/B/" in key else [4, 16]

    rewrite(tmp_path / "bundle", turned)
    with pytest.raises(BasisMismatchError, match=r"has own directions \(16, 4\) in module .* whose out is 32"):
        open_bundle(tmp_path / "bundle").task("own")
    with pytest.raises(BasisMismatchError):
        load_task(bert(), tmp_path / "bundle", "own")


def test_values_that_are_not_finite_are_refused(bases, fleets, made, tmp_path):
    projection = project_lora(fleets[bert][0], bases[bert], extra_rank=1)
    next(iter(projection.own.values()))[1][0, 0] = float("nan")
    with pytest.raises(BadFileError, match=r"'lora0': A/bert\..* holds NaN"):
        bundle_tasks([projection], tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()


def test_a_basis_of_other_size_is_refused(bundle, fleets, tmp_path):
    other = build_basis(fleets[bert][:3], k=4, progress=False)
    assert isinstance(other, SubspaceBasis)
    with pytest.raises(BasisMismatchError):
        load_task(bert(), bundle, "own", basis=other)
