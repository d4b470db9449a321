"""What a stored fleet takes and gives back. Adapters of a few numbers, no downloads."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.quality.compression import alone, in_basis, joint_diagonal
from benchmarks.quality.compression.members import Fleet, Judged, Member, agreement, dense, kept
from benchmarks.quality.compression.schemes import FAMILIES, every, few, several
from benchmarks.quality.compression.storing import KINDS, restore, size_of, store
from subspace_peft import compress_fleet

OUT, INNER, RANK, COUNT = 24, 20, 2, 5
MODULES = ("layer.0.query", "layer.0.value")
FLOAT = {"basis": "float32", "core": "float32"}


def write_lora(folder, seed: int, *, frozen: bool = False) -> str:
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    tensors = {}
    for module in MODULES:
        A = torch.randn(RANK, INNER, generator=fixed if frozen else generator)
        B = torch.randn(OUT, RANK, generator=generator)
        tensors |= {
            f"base_model.model.{module}.lora_{side}.weight": each.contiguous() for side, each in (("A", A), ("B", B))
        }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["query", "value"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def judged(updates) -> Judged:
    outputs = sum((update.sum(0, keepdim=True) for update in updates.values()), torch.zeros(1, INNER))
    return Judged(0.5, 0.5, 0.0, outputs)


@pytest.fixture
def fleet(tmp_path) -> Fleet:
    for n in range(COUNT):
        write_lora(tmp_path / f"lora-{n}", n)
    return Fleet([Member(f"lora-{n}", tmp_path / f"lora-{n}", judged) for n in range(COUNT)])


def energies(fleet: Fleet, made) -> list[float]:
    return [kept(dense(fleet.factors(name)), made.updates(name)) for name in fleet.names]


def in_file(tensors, file) -> int:
    """Return what the tensors of a safetensors file take behind its header."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_off_by_half_a_step_at_most_and_take_what_they_should(kind):
    rows = torch.randn(6, 34, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 6)[:, None]
    tensors = store("x", rows, kind)
    error = (restore(tensors, "x") - rows).abs().amax(1) / rows.abs().amax(1)
    # int8 and int4: half of a step of 1/127 or 1/7 of the largest entry, and the room left for the scale's rounding
    most = {"float32": 0, "bfloat16": 2**-8, "int8": 0.5 / 127 * 1.016, "int4": 0.5 / 7 * 1.016}[kind]
    assert float(error.max()) <= most
    expected = {"float32": 4 * 204, "bfloat16": 2 * 204, "int8": 204 + 12, "int4": 102 + 12}[kind]
    assert size_of(tensors) == expected


def test_the_largest_entry_of_a_row_is_not_cut():
    rows = torch.tensor([[1.0, -0.999, 0.0, 0.5]]) * torch.linspace(0.1, 3, 500)[:, None]
    for kind, steps in (("int8", 127), ("int4", 7)):
        again = restore(store("x", rows, kind), "x")
        assert float(((again - rows).abs() / rows.abs().amax(1, keepdim=True)).max()) <= 0.51 / steps


def test_odd_numbers_of_entries_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="odd number"):
        store("x", torch.ones(3, 3), "int4")
    with pytest.raises(ValueError, match="int4"):
        store("x", torch.ones(2, 2), "int2")


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_files(fleet, tmp_path, kind):
    basis = kind if kind != "int4" else "int8"
    for made in (
        alone.as_trained(fleet, kind),
        alone.truncated(fleet, 1, kind),
        in_basis.cores(fleet, basis=basis, core=kind, k=4),
        in_basis.with_own(fleet, basis=basis, core=kind, k=4, own=1),
        in_basis.clustered(fleet, basis=basis, core=kind, k=2, clusters=2),
        joint_diagonal.full(fleet, 4, kind),
    ):
        files = [in_file(made.shared, tmp_path / "shared.file")] if made.shared else []
        files += [in_file(tensors, tmp_path / f"{name}.file") for name, tensors in made.tasks.items()]
        assert made.bytes == sum(files)


def test_our_bytes_are_in_the_packages_own_files(fleet, tmp_path):
    made = in_basis.cores(fleet, basis="int8", core="bfloat16", k=4)
    basis = fleet.basis(k=4).to_precision("int8")
    basis.save_pretrained(tmp_path / "basis")
    with safe_open(tmp_path / "basis" / "basis.safetensors", "pt") as file:
        directions = {key: file.get_tensor(key) for key in file.keys() if key.rpartition(".")[2][0] in "UV"}  # noqa: SIM118
    compress_fleet(
        fleet.folders, tmp_path / "basis", tmp_path / "bundle", min_energy=0, dtype=torch.bfloat16, progress=False
    )
    with safe_open(tmp_path / "bundle" / "bundle.safetensors", "pt") as file:
        cores = file.get_tensor("cores")
    assert size_of(directions) == size_of(made.shared)
    assert size_of({"cores": cores}) == sum(map(size_of, made.tasks.values()))


def test_what_holds_everything_gives_everything_back(fleet):
    whole = RANK * COUNT
    for made in (
        alone.as_trained(fleet, "float32"),
        alone.truncated(fleet, RANK, "float32"),
        in_basis.cores(fleet, **FLOAT, k=whole),
        in_basis.with_own(fleet, **FLOAT, k=2, own=RANK),
        in_basis.to_energy(fleet, **FLOAT, k=2, energy=1.0),
        joint_diagonal.full(fleet, whole),
    ):
        assert min(energies(fleet, made)) > 1 - 1e-6


def test_less_room_keeps_less_and_the_measure_is_the_packages_own(fleet):
    from subspace_peft import project_lora

    found = [energies(fleet, in_basis.cores(fleet, **FLOAT, k=k)) for k in (2, 4, 8)]
    assert all(sum(a) < sum(b) for a, b in itertools.pairwise(found))
    said = [project_lora(folder, fleet.basis(k=4)).energy_kept for folder in fleet.folders]
    assert found[1] == pytest.approx(said, abs=1e-5)
    random = in_basis.cores(fleet, **FLOAT, k=4, builder="random")
    assert random.bytes == in_basis.cores(fleet, **FLOAT, k=4).bytes
    assert 0 < sum(energies(fleet, random)) < 0.5 * sum(found[1])


def test_the_svd_is_the_best_of_its_rank(fleet):
    made = alone.truncated(fleet, 1, "float32")
    for name in fleet.names:
        for module, update in dense(fleet.factors(name)).items():
            left = (update - made.updates(name)[module]).double()
            assert float(left.norm()) == pytest.approx(
                float(torch.linalg.svdvals(update.double())[1:].norm()), rel=1e-4
            )


def test_own_directions_hold_so_much_of_the_energy_and_no_more_than_needed(fleet):
    made = in_basis.to_energy(fleet, **FLOAT, k=4, energy=0.7)
    assert min(energies(fleet, made)) >= 0.7 - 1e-5
    assert made.bytes < in_basis.to_energy(fleet, **FLOAT, k=4, energy=0.99).bytes
    assert made.facts["own"] > 0


def test_published_joint_diagonalisation_is_near_the_packages_basis(fleet):
    ours, full = (
        sum(energies(fleet, made)) for made in (in_basis.cores(fleet, **FLOAT, k=6), joint_diagonal.full(fleet, 6))
    )
    assert 0.9 * ours < full < 1.1 * ours


def test_diagonals_keep_no_more_than_full_cores_between_the_same_directions(fleet):
    made = joint_diagonal.diagonal(fleet, 6)
    assert sum(energies(fleet, made)) > 0.5 * COUNT
    for name in fleet.names:
        found = made.updates(name)
        for module, update in dense(fleet.factors(name)).items():
            U, V = (torch.linalg.qr(restore(made.shared, f"{module}.{side}").T.double())[0] for side in "UV")
            between = U @ (U.T @ update.double() @ V) @ V.T
            away, least = ((update - each).double().norm() for each in (found[module], between))
            assert float(away) >= float(least) - 1e-4


def test_a_diagonal_of_all_directions_is_exact_for_one_direction_per_adapter(tmp_path):
    # rank-one updates: N components hold N adapters
    for n in range(3):
        write_lora(tmp_path / f"lora-{n}", n)
    fleet = Fleet([Member(f"lora-{n}", tmp_path / f"lora-{n}", judged) for n in range(3)])
    short = alone.truncated(fleet, 1, "float32")
    for name in fleet.names:
        fleet._updates[name] = {
            module: type(each)(*(side.double() for side in _halves(short.tasks[name], module)))
            for module, each in fleet.factors(name).items()
        }
    assert min(energies(fleet, joint_diagonal.diagonal(fleet, 6))) > 1 - 1e-4


def _halves(tensors, module):
    return restore(tensors, f"{module}.B").T, restore(tensors, f"{module}.A")


def test_a_frozen_input_side_is_stored_once(tmp_path):
    for n in range(3):
        write_lora(tmp_path / f"lora-{n}", n, frozen=True)
    members = [Member(f"lora-{n}", tmp_path / f"lora-{n}", judged) for n in range(3)]
    fleet, apart = Fleet(members, frozen_inputs=True), Fleet(members)
    made = alone.as_trained(fleet, "float32")
    assert made.bytes == 4 * len(MODULES) * RANK * (INNER + 3 * OUT)
    assert alone.as_trained(apart, "float32").bytes == 4 * len(MODULES) * RANK * 3 * (INNER + OUT)
    assert min(energies(fleet, made)) > 1 - 1e-6
    # the inputs lie in as many directions as one adapter has
    small = in_basis.cores(fleet, **FLOAT, k=3 * RANK, k_in=RANK)
    assert min(energies(fleet, small)) > 1 - 1e-6


def test_a_basis_that_a_seed_makes_takes_no_bytes(fleet):
    with pytest.raises(ValueError, match="not trained in a basis"):
        in_basis.given(fleet, **FLOAT)
    on = fleet.basis(k=RANK * COUNT)
    free, stored = (Fleet(fleet.members, given=on, generated=each) for each in (True, False))
    a, b = (in_basis.given(each, **FLOAT) for each in (free, stored))
    assert b.bytes - a.bytes == 4 * sum(module.U.numel() + module.V.numel() for module in on.values())
    assert min(*energies(free, a), *energies(stored, b)) > 1 - 1e-6


def test_agreement_is_one_for_the_lora_and_none_for_the_base_model():
    def of(outputs):
        return Judged(0.0, 0.0, 0.0, torch.tensor(outputs))

    whole, bare = of([[2.0, 0.0], [0.0, 2.0]]), of([[1.0, 0.0], [1.0, 0.0]])
    assert agreement(whole, bare, whole) == {"same": 1.0, "change": 0.0}
    assert agreement(whole, bare, bare) == {"same": 0.5, "change": 1.0}
    numbers, other = of([[1.0], [2.0], [3.0]]), of([[3.0], [2.0], [1.0]])
    assert agreement(numbers, other, other)["same"] == pytest.approx(-1)


def test_what_further_seeds_measure_is_part_of_what_the_first_does():
    for most in (64, 96):
        assert all(scheme in every(most) for scheme in several(most))


def test_every_scheme_has_a_family_and_none_is_listed_twice():
    for schemes in (every(96), every(64), several(256), few()):
        assert {scheme.family for scheme in schemes} <= set(FAMILIES)
        listed = [json.dumps([scheme.family, dict(scheme.settings)], sort_keys=True) for scheme in schemes]
        assert len(set(listed)) == len(listed)
