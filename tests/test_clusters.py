"""Several bases for a fleet of several kinds: planted kinds are found, noise is left alone, sizes are equal where
things are compared."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from subspace_peft import SubspaceBasis, build_clusters
from subspace_peft.builders import rebuild_basis
from subspace_peft.builders.fleet import gather
from subspace_peft.builders.fleet_sample import Sample
from subspace_peft.builders.partition import compared, left_out_shares, partition
from subspace_peft.cli import main
from subspace_peft.errors import SourceError, SubspaceError

from .models import bert

SIZES = {"layer.0.up": (96, 80), "layer.1.up": (80, 96)}
OWN = 12  # directions of a kind, per side
RANK = 4


def states(
    kinds: list[int], noise: float = 0.2, seed: int = 0
) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """A source per entry, in the directions of its kind; of kind -1 in directions of its own."""
    draw = torch.Generator().manual_seed(seed)
    common = {
        (kind, name, side): torch.linalg.qr(torch.randn(d, OWN, generator=draw))[0]
        for kind in sorted(set(kinds))
        for name, size in SIZES.items()
        for side, d in enumerate(size)
    }
    made = []
    for kind in kinds:
        state = {}
        for name, size in SIZES.items():
            left, right = (
                (common[kind, name, side] @ torch.randn(OWN, RANK, generator=draw) if kind >= 0 else 0)
                + (noise if kind >= 0 else 1) * torch.randn(d, RANK, generator=draw) / d**0.5 * OWN**0.5
                for side, d in enumerate(size)
            )
            state |= {f"{name}.lora_B.weight": left, f"{name}.lora_A.weight": right.T.contiguous()}
        made.append(
            (state, {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "synthetic"})
        )
    return made


def sample_of(kinds: list[int], memory: int = 10**9) -> Sample:
    fleet = gather(states(kinds), skip_bad=False, partial=False, token=None, progress=False)
    return Sample(fleet, memory, 10)


TWO = [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1]
THREE = [0, 1, 2] * 7


def places(kinds: list[int]) -> list[list[int]]:
    parts = [[i for i, kind in enumerate(kinds) if kind == each] for each in set(kinds)]
    return sorted(parts, key=lambda part: (-len(part), part))


# -- the parts
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("columns", [512, 8], ids=["exact", "streamed"])
def test_planted_kinds_are_found_exactly(kinds, columns, monkeypatch):
    monkeypatch.setattr("subspace_peft.builders.fleet_sample.EXACT_COLUMNS", columns)
    assert partition(sample_of(kinds), len(set(kinds)), OWN) == places(kinds)


def test_a_wrong_start_is_mended(monkeypatch):
    # a quarter of the sources begin in the wrong part
    wrong = [kind ^ (i % 4 == 0) for i, kind in enumerate(TWO)]
    for start in ("_far_apart", "_linked"):
        monkeypatch.setattr(f"subspace_peft.builders.partition.{start}", lambda related, clusters: list(wrong))
    assert partition(sample_of(TWO), 2, OWN) == places(TWO)


def test_relatedness_is_that_of_second_moments():
    sample = sample_of([0, 0, 1, -1])
    related = sample.relatedness()
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    for name in SIZES:
        updates = [source.factors(name) for source in sample.fleet.sources]
        deltas = [update.B @ update.A for update in updates]
        for moments in ([d @ d.T for d in deltas], [d.T @ d for d in deltas]):
            wanted += (
                torch.tensor([[float((a * b).sum() / a.norm() / b.norm()) for b in moments] for a in moments]) / 4
            )
    assert torch.allclose(related, wanted, atol=1e-6)
    assert related[0, 1] > 2 * related[0, 2]


def test_sizes_are_equal_where_partitions_are_compared():
    sample = sample_of(TWO)
    step = compared(sample, places(TWO), [list(range(20))], OWN)
    # both modules: clusters · k · (out + in) and a core of k · k for each of 20 sources
    assert sample.numbers(2, OWN) == 2 * (2 * OWN * 176 + 20 * OWN**2)
    assert sample.numbers(1, step.against_k) <= sample.numbers(2, OWN) < sample.numbers(1, step.against_k + 1)
    assert step.taken and step.gain == pytest.approx(step.left_out - step.against_left_out)
    other = compared(sample, [places(TWO)[0][:5], places(TWO)[0][5:], places(TWO)[1]], places(TWO), OWN)
    assert not other.taken


def test_what_was_left_out_took_no_part(monkeypatch):
    sample = sample_of(TWO)
    seen: list[set[int]] = []
    fit, kept = sample.fit, sample.kept

    def noted(members, k, most):
        seen.append(set(members))
        return fit(members, k, most)

    def checked(basis, members):
        assert not seen[-1] & set(members)
        return kept(basis, members)

    monkeypatch.setattr(sample, "fit", noted)
    monkeypatch.setattr(sample, "kept", checked)
    shares = left_out_shares(sample, places(TWO), OWN)
    assert len(seen) == 2 * 5
    assert (shares > 0.5).all()


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_counts_the_bases_where_progress_is_wanted(progress, monkeypatch, capsys):
    monkeypatch.setattr("subspace_peft._io.progress.DELAY", 0)
    build_clusters(states(TWO), 2, k=OWN, progress=progress)
    assert ("comparing clusters" in capsys.readouterr().err) == progress


def test_little_memory_compares_fewer_modules_and_finds_the_same():
    small = sample_of(TWO, memory=1)
    assert len(small.modules) == 1
    assert partition(small, 2, OWN) == places(TWO)


# -- the whole
# ---------------------------------------------------------------------------------------------------------------


def found_parts(clusters) -> list[list[int]]:
    owners = [each["cluster"] for each in clusters.sources]
    return [[i for i, owner in enumerate(owners) if owner == number] for number in range(len(clusters.bases))]


@pytest.mark.parametrize("asked", ["auto", 2])
def test_two_kinds_get_two_bases(asked, tmp_path):
    found = build_clusters(states(TWO), asked, k=OWN, progress=False)
    assert found_parts(found) == places(TWO)
    facts = json.loads((found.save_pretrained(tmp_path) / "clusters.json").read_text())
    assert facts["energy_kept"] > facts["energy_kept_single"] + 0.05
    assert facts["single_k"] > OWN == facts["k"]
    for number, entry in enumerate(facts["clusters"]):
        basis = SubspaceBasis.from_pretrained(tmp_path / entry["folder"])
        assert basis.fingerprint == entry["fingerprint"] == found.bases[number].fingerprint
        assert basis.info["cluster"] == {"number": number, "of": 2}
        names = [each["name"] for each in facts["sources"] if each["cluster"] == number]
        assert [each["name"] for each in basis.info["sources"]] == names
        # all modules were compared, so what is said here is what each basis says of itself
        kept = {each["name"]: each["energy_kept"] for each in facts["sources"]}
        assert basis.info["measured"]["energy_kept"] == pytest.approx(sum(map(kept.get, names)) / len(names), abs=1e-5)
    again = build_clusters(states(TWO), asked, k=OWN, progress=False)
    assert [basis.fingerprint for basis in again.bases] == [basis.fingerprint for basis in found.bases]


def test_three_kinds_get_three():
    found = build_clusters(states(THREE), k=OWN, progress=False)
    assert found_parts(found) == places(THREE)
    assert [step.taken for step in found.steps].count(True) >= 1


@pytest.mark.parametrize("kinds", [[-1] * 20, [0] * 20], ids=["noise", "one kind"])
def test_where_nothing_is_gained_auto_says_one(kinds):
    found = build_clusters(states(kinds), k=OWN, progress=False)
    assert len(found.bases) == 1
    assert found.single_k == OWN
    assert not any(step.taken for step in found.steps) and found.steps


def test_the_command_line_writes_folders_and_says_who_sits_where(fleets, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(
            ["build", *fleets[bert], "--clusters", "2", "--out", str(out), "-k", "4", "--precision", "int8", "--quiet"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "2 bases, k=4" in printed and "lora0: cluster" in printed and "one basis of as many parameters" in printed
    assert sorted(file.name for file in out.iterdir()) == ["cluster-0", "cluster-1", "clusters.json"]
    assert not (tmp_path / "out.partial").exists()
    basis = SubspaceBasis.from_pretrained(out / "cluster-0")
    assert basis.precision == "int8"
    assert rebuild_basis(basis, progress=False) == basis
    assert (
        main(
            [
                "build",
                *fleets[bert],
                "--clusters",
                "auto",
                "--out",
                str(tmp_path / "auto"),
                "-k",
                "4",
                "--json",
                "--quiet",
            ]
        )
        == 0
    )
    assert len(json.loads(capsys.readouterr().out)["clusters"]) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clusters": 0}, "clusters=0"),
        ({"clusters": "many"}, "clusters='many'"),
        ({"clusters": 6}, "there are 5 sources"),
        ({"k": 0.5}, "k=0.5"),
        ({"builder": "random"}, "does not go with builder="),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given, message, fleets):
    with pytest.raises(SubspaceError, match=message):
        build_clusters(fleets[bert], **{"progress": False, "k": 4, **given})


def test_bad_sources_and_flags_are_refused(fleets, tmp_path, capsys):
    with pytest.raises(SourceError, match="nowhere"):
        build_clusters([*fleets[bert], str(tmp_path / "nowhere")], progress=False)
    assert main(["build", *fleets[bert], "--clusters", "2", "--builder", "random", "--out", str(tmp_path / "x")]) == 1
    assert "--clusters does not go with --builder" in capsys.readouterr().err
    assert main(["build", *fleets[bert], "--clusters", "2", "--budget", "99", "--out", str(tmp_path / "x")]) == 1
    assert "--clusters does not go with --budget" in capsys.readouterr().err


def test_the_command_line_has_the_default_k_and_completes(fleets, tmp_path):
    out = tmp_path / "bases"
    flags = ["--clusters", "1", "--complete", "random", "--out", str(out), "--quiet"]
    assert main(["build", *fleets[bert], *flags]) == 0
    shapes = SubspaceBasis.from_pretrained(out / "cluster-0").shapes().values()
    # five LoRAs of rank 4 span 20 of the 32 dimensions
    assert {(shape["k_out"], shape["k_in"]) for shape in shapes} == {(32, 32)}
