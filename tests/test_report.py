"""The report of a basis: what it measures against dense algebra, and its verdict on fleets whose answer is known."""

from __future__ import annotations

import html
import math
import shutil
from pathlib import Path

import pytest
import torch

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.errors import SourceError, SubspaceError
from subspace_peft.report import null_basis, report_basis
from subspace_peft.report.headlines import headlines
from subspace_peft.report.measure import measure
from subspace_peft.report.page import page
from subspace_peft.report.pays import break_even_on_record
from subspace_peft.report.verdict import LIMITS, useful_k, verdict, verdict_of
from subspace_peft.sources.factors import Factors

from .models import bert
from .test_build import deltas, fleet
from .test_fleet import broken
from .test_streaming import saved_fleet, shared_fleet

pytest.importorskip("matplotlib")


def factors(states, module="a.q"):
    return [Factors(state[f"{module}.lora_B.weight"], state[f"{module}.lora_A.weight"]) for state in states]


def related(n=10, out=40, inner=30, r=2, shared=3, noise=0.05, seed=0):
    """Sources in a common subspace of `shared` directions per side, almost."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(out, shared, generator=draw, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(inner, shared, generator=draw, dtype=torch.float64))[0]
    states = []
    for _ in range(n):
        B = left @ torch.randn(shared, r, generator=draw, dtype=torch.float64)
        A = torch.randn(r, shared, generator=draw, dtype=torch.float64) @ right.T
        B = B + noise * torch.randn(out, r, generator=draw, dtype=torch.float64) / out**0.5
        A = A + noise * torch.randn(r, inner, generator=draw, dtype=torch.float64) / inner**0.5
        states.append({"a.q.lora_B.weight": B, "a.q.lora_A.weight": A})
    return states


# -- identities
# ----------------------------------------------------------------------------------------------------------


def dense_bases(updates, weights, k):
    """U and V of a truncated HOSVD, from matrices of size out × in."""
    out = sum(w * w * d @ d.T for w, d in zip(weights, updates, strict=True))
    inner = sum(w * w * d.T @ d for w, d in zip(weights, updates, strict=True))
    return tuple(torch.linalg.eigh(moment)[1].flip(1)[:, :k] for moment in (out, inner))


@pytest.mark.parametrize("folds", [[0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 1, 2]])
def test_everything_measured_is_what_dense_algebra_gives(folds):
    states = fleet(n=4)
    dense = deltas(states)
    source_weights = [1.0, 0.5, 0.5, 1.0]
    weights = [v**0.5 / float(d.norm()) for v, d in zip(source_weights, dense, strict=True)]
    found = measure(factors(states), source_weights, folds, [0.1, 0.2, 0.3, 0.4], (5, 3), seed=0)[0]
    assert (found.shape, found.kept) == ((20, 16), [0.1, 0.2, 0.3, 0.4])
    total = sum(w * w * float(d.square().sum()) for w, d in zip(weights, dense, strict=True))
    moment = sum(w * w * d @ d.T for w, d in zip(weights, dense, strict=True))
    expected = torch.linalg.eigvalsh(moment).flip(0)[: len(found.spectrum_out)] / total
    torch.testing.assert_close(torch.tensor(found.spectrum_out, dtype=torch.float64), expected)
    assert found.ks == [1, 2, 4, 8, 12]

    def share(update, rest, a, b):
        U, V = dense_bases([dense[i] for i in rest], [weights[i] for i in rest], max(a, b))
        return float((U[:, :a].T @ update @ V[:, :b]).square().sum() / update.square().sum())

    for k, seen, left_out, chance in zip(found.ks, found.seen, found.left_out, found.random, strict=True):
        assert chance == pytest.approx(k * k / 320)
        assert seen == pytest.approx(sum(share(d, range(4), k, k) for d in dense) / 4)
        if k <= 3 * min(sum(f != fold for f in folds) for fold in folds):
            rests = [[j for j in range(4) if folds[j] != folds[i]] for i in range(4)]
            assert left_out == pytest.approx(
                sum(share(d, rest, k, k) for d, rest in zip(dense, rests, strict=True)) / 4
            )
            assert found.left_out_here[0] == pytest.approx(share(dense[0], rests[0], 5, 3))
    for i, value in enumerate(found.mean_only):
        mean = sum(dense[j] / dense[j].norm() for j in range(4) if folds[j] != folds[i])
        cosine = float((dense[i] * mean).sum() / dense[i].norm() / mean.norm())
        assert value == pytest.approx(cosine**2)


def test_the_null_has_the_strengths_and_nothing_in_common():
    states = related(n=8)
    found = measure(factors(states), [1.0] * 8, list(range(8)), [1.0] * 8, (3, 3), seed=1)[0]
    again = measure(factors(states), [1.0] * 8, list(range(8)), [1.0] * 8, (3, 3), seed=1)[0]
    assert found == again
    # energies are shares: both add up to one, the fleet's in three directions
    assert sum(found.spectrum_out) == pytest.approx(1) and sum(found.null_out) == pytest.approx(1)
    assert sum(found.spectrum_out[:3]) > 0.98 and sum(found.null_out[:3]) < 0.5
    # of directions above the null there are those shared ones that carry enough
    assert 1 <= found.above_out <= 3 and 1 <= found.above_in <= 3
    noise = null_basis(states, seed=1, k=3, alternations=0, progress=False)
    spectrum = noise["a.q"].spectrum_out
    assert found.null_out[0] == pytest.approx(float(spectrum[0]), rel=0.3)


def test_one_fold_leaves_nothing_out():
    found = measure(factors(fleet(n=2)), [0.5, 0.5], [0, 0], [1.0, 1.0], (2, 2), seed=0)[0]
    assert found.left_out_here == [None, None] and found.mean_only == [None, None]
    assert all(math.isnan(value) for value in found.left_out)


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [([0.3, 0.4, 0.44], 4), ([0.3, 0.31, 0.6], 1), ([0.02, 0.5, 0.6], None), ([math.nan] * 3, None)],
)
def test_the_useful_k(left_out, expected):
    assert useful_k([1, 2, 4], left_out, [0.01, 0.02, 0.03]) == expected


# -- through the public face
# ---------------------------------------------------------------------------------------------


def test_a_fleet_that_shares_is_told_from_one_that_does_not():
    shares, unrelated = related(), fleet(n=10, out=40, inner=30, r=2, modules=("a.q",))
    good = report_basis(build_basis(shares, k=3, progress=False), shares, progress=False)
    bad = report_basis(build_basis(unrelated, k=3, progress=False), unrelated, progress=False)
    assert good.numbers["unseen"] > 0.9 > 0.1 > bad.numbers["unseen"]
    assert good.numbers["k_for_new_tasks"] == 4 and good.numbers["kept"] > 0.9
    assert bad.numbers["k_for_new_tasks"] is None or bad.numbers["k_for_new_tasks"] <= 2
    assert "natural choice" in good.verdict[1] and "does not tell where a new task will go" in bad.verdict[1]
    assert good.numbers["null_kept"] < 0.6 and "because they are few" not in good.verdict[0]
    assert all(entry["in_basis"] for entry in good.sources)
    assert good.numbers["kept_of_new"] is None


def test_findings_have_their_old_names():
    found = measure(factors(related(n=3)), [1.0] * 3, [0, 1, 2], [1.0] * 3, (2, 2), seed=0)[0]
    with pytest.warns(FutureWarning, match="is now called left_out;"):
        assert found.unseen is found.left_out
    with pytest.warns(FutureWarning, match="is now called left_out_here;"):
        assert found.unseen_here is found.left_out_here


def test_few_adapters_fit_into_anything():
    states = fleet(n=2, out=40, inner=30, r=2, modules=("a.q",))
    found = report_basis(build_basis(states, k=4, progress=False), states, progress=False)
    assert found.numbers["kept"] == pytest.approx(1) and found.numbers["null_kept"] == pytest.approx(1)
    assert "because they are few, not because they are related" in found.verdict[0]


def test_adapters_that_are_new_to_the_basis_are_counted_apart():
    states = related()
    found = report_basis(build_basis(states[:6], k=3, progress=False), states, progress=False)
    assert [entry["in_basis"] for entry in found.sources] == [True] * 6 + [False] * 4
    assert 0.9 < found.numbers["kept_of_new"] <= found.numbers["kept"] + 0.05


def test_numbers_of_the_bytes():
    states = related()
    found = report_basis(build_basis(states, k=3, progress=False), states, progress=False)
    # float64 sources
    assert found.numbers["bytes_per_lora"] == 8 * 2 * (40 + 30) and found.numbers["bytes_per_task"] == 4 * 9
    stored = 4 * 3 * (40 + 30)
    assert found.numbers["bytes_of_basis"] == stored
    assert found.numbers["break_even"] == math.ceil(stored / (1120 - 36))
    large = report_basis(build_basis(states, k=20, progress=False), states, progress=False)
    assert large.numbers["bytes_per_task"] == 1600
    assert large.numbers["break_even"] is None and "never smaller in all" in large.verdict[0]


def test_seed_groups_are_left_out_together(tmp_path):
    states = fleet(n=4, out=40, inner=30, r=2, modules=("a.q",))
    for state in states[:2]:
        state["a.q.lora_A.weight"] = states[0]["a.q.lora_A.weight"]
    found = report_basis(build_basis(states, k=2, progress=False), states, progress=False)
    assert found.numbers["in_seed_groups"] == 2 and "2 of 4 adapters began" in " ".join(found.verdict)
    assert found.how["folds"] == 3


def test_large_fleets_are_sampled_and_folded(tmp_path):
    folders = saved_fleet(tmp_path, shared_fleet(n=40), modules=[f"m.{i}" for i in range(5)])
    basis = build_basis(folders, k=6, progress=False)
    found = report_basis(basis, folders, sample=20, modules=3, progress=False)
    assert found.how == {"modules": [3, 5], "sources": [20, 40], "folds": 4, "left_out": "in folds", "seed": 0}
    assert list(found.modules) == ["m.0", "m.2", "m.4"]
    whole = report_basis(basis, folders, progress=False)
    assert whole.how["sources"] == [40, 40]
    # fewer adapters tell less of a new one, in expectation
    assert found.numbers["unseen"] < whole.numbers["unseen"] + 0.02
    assert report_basis(basis, folders, sample=20, modules=3, progress=False) == found


def test_the_sources_on_record_are_found_and_missing_ones_named(tmp_path):
    folders = saved_fleet(tmp_path / "loras", shared_fleet(n=6))
    build_basis(folders, k=4, progress=False).save_pretrained(tmp_path / "basis")
    found = report_basis(tmp_path / "basis", progress=False)
    assert [entry["in_basis"] for entry in found.sources] == [True] * 6 and not found.skipped
    shutil.rmtree(folders[0])
    fewer = report_basis(tmp_path / "basis", progress=False)
    assert len(fewer.sources) == 5 and "lora-0" in fewer.skipped[0]["reason"]
    shutil.rmtree(tmp_path / "loras")
    none = report_basis(tmp_path / "basis", progress=False)
    assert not none.sources and len(none.skipped) == 6
    basis = SubspaceBasis.from_pretrained(tmp_path / "basis")
    assert none.numbers["kept"] == basis.info["measured"]["energy_kept"]
    assert none.numbers["unseen"] == basis.info["measured"]["energy_left_out"]
    assert "Pass the fleet" in none.verdict[0] and not any("in all" in line for line in none.verdict)
    page = none.save(tmp_path / "report").read_text()
    assert "no adapter was read" in page and "<svg" not in page and 'id="choose"' not in page


def test_what_cannot_be_reported(fleets, bases, tmp_path):
    with pytest.raises(SubspaceError, match="none of the adapters'"):
        report_basis(bases[bert], fleet(), progress=False)
    with pytest.raises(SubspaceError, match="at least 2 adapters"):
        report_basis(bases[bert], fleets[bert], sample=1, progress=False)
    with pytest.raises(SourceError):
        report_basis(bases[bert], [str(broken(fleets[bert][0], tmp_path, "nan"))], progress=False)
    (tmp_path / "file").write_text("here")
    found = report_basis(bases[bert], fleets[bert], progress=False)
    with pytest.raises(SubspaceError, match="is a file"):
        found.save(tmp_path / "file")


@pytest.mark.parametrize("builder", ["random", "eigenlora"])
def test_any_basis_can_be_reported(builder):
    states = related()
    basis = build_basis(states, k=3, builder=builder, progress=False)
    found = report_basis(basis, states, progress=False)
    if builder == "random":
        # it has no sources of its own, so all adapters are new to it
        assert found.numbers["kept"] is None and found.numbers["kept_of_new"] < 0.05
        assert "which it was not built from, beside " in found.verdict[0] and ": poor." in found.verdict[0]
        # the fleet's own basis would hold them: that one is to be built, and nobody is sent into this one
        assert "about what random directions do" in found.verdict[1] and "of one left out of it" in found.verdict[1]
        assert "or build a basis of them; for new tasks, build a basis of these adapters" in found.verdict[2]
        existing, new = headlines(found.numbers, "b", builder)
        assert "random directions" in existing.beside and "noise" not in existing.beside
        assert new.word == "unrelated" and new.command.startswith("subspace-peft build ")
        assert new.share == existing.share == found.numbers["kept_of_new"]
        assert not found.choices["same"]
    else:
        assert found.numbers["kept"] > 0.5


@pytest.mark.parametrize("builder", ["random", "base-weights"])
def test_a_control_is_called_one_everywhere(builder, tmp_path):
    states = related(n=2)
    basis = build_basis(states, k=3, progress=False)
    basis.info |= {"sources": [], "builder": builder}
    basis.info.pop("measured")
    found = report_basis(basis, progress=False)
    said = verdict_of(basis)
    assert found.verdict == [*said, LIMITS] and "the control" in said[0]
    for headline, line in zip(headlines(found.numbers, None, builder), said, strict=False):
        assert headline.sentence == line and headline.advice in said[2] and headline.advice
    assert said[0] in html.unescape(page(found))


def test_no_basis_is_advised_that_saves_no_bytes():
    one = related(n=1)
    basis = build_basis(one, k=4, progress=False)
    said, found = verdict_of(basis), report_basis(basis, one, progress=False)
    assert "because they are few" in said[0] and "because they are few" in found.verdict[0]
    for lines in (said, found.verdict):
        assert "Next: keep this adapter as a LoRA: a basis is for several; " in lines[2]
    assert not headlines(found.numbers)[0].command
    # three adapters whose directions a basis has all: their record tells as much as the report adds up
    three = [{key: value.float() for key, value in state.items()} for state in related(n=3, noise=1.0)]
    basis = build_basis(three, k=6, progress=False)
    found = report_basis(basis, three, progress=False)
    assert break_even_on_record(basis.info, basis.shapes()) == (found.numbers["break_even"], True)
    assert found.numbers["break_even"] is None or found.numbers["break_even"] > 3
    for line in (verdict_of(basis)[2], found.verdict[2]):
        assert "keep these adapters as LoRAs: basis and tasks together take no fewer bytes" in line
    assert break_even_on_record({"sources": [{}]}, {}) == (None, False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_the_record_and_the_report_count_the_same_bytes(precision):
    states = fleet(n=5, out=40, inner=30, r=2, modules=("a.q", "b.v"))
    basis = build_basis(states, k=3, progress=False).to_precision(precision)
    even = report_basis(basis, states, progress=False).numbers["break_even"]
    assert even and break_even_on_record(basis.info, basis.shapes()) == (even, True)


def test_adapters_that_share_nothing_are_not_said_to_fit():
    states = fleet(n=4, out=40, inner=30, r=4, modules=("a.q",))
    basis = build_basis(states, k=3, progress=False)
    said = verdict_of(basis)
    assert ": poor. It keeps of noise about as much" in said[0] and "they fit" not in said[0].lower()
    assert said[2].startswith("Next: keep these adapters as LoRAs; ")


def test_a_page_of_an_updated_basis_without_its_sources_says_what_its_record_does():
    folder = Path(__file__).parent / "saved" / "v0.1.0" / "bases" / "updated"
    found, said = report_basis(folder, progress=False), verdict_of(folder)
    assert "keeps at least " in said[0] and "keeps at least " in found.verdict[1]
    assert said[1] == found.verdict[2] and "not measured" in said[1]
    assert "kept, at least" in headlines(found.numbers)[0].of
    shown = found._repr_html_()
    assert shown.index("<strong>Compressing these adapters</strong>: poor, 55.8 %") < shown.index("<table")
    assert "<strong>Training new tasks</strong>: unknown. Next: use LoRA" in shown


def test_every_sentence_of_the_verdict():
    base = {
        "kept": 0.6,
        "kept_of_new": None,
        "null_kept": 0.2,
        "unseen": 0.2,
        "random": 0.001,
        "mean_only": 0.15,
        "k_for_share": 40,
        "above": (0, 0),
        "k_for_new_tasks": None,
        "bytes_per_lora": 10,
        "bytes_per_task": 1,
        "bytes_of_basis": 5,
        "break_even": 1,
        "sources": 3,
        "in_seed_groups": 0,
    }
    words = " ".join(verdict(base))
    assert "no longer themselves" in words and "95.0 % take k=40" in words
    assert "fleet's mean, which alone keeps 15.0 %" in words
    assert "No direction stands out" in words
    assert "lose a part" in " ".join(verdict({**base, "kept": 0.85}))
    assert "answer as they did" in " ".join(verdict({**base, "kept": 0.96}))
    assert "too few sources" in " ".join(verdict({**base, "unseen": None}))
    assert "does not tell" in " ".join(verdict({**base, "unseen": 0.002}))
    assert "holds little of where new tasks go" in " ".join(verdict({**base, "unseen": 0.03}))
