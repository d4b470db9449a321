"""Large fleets: streamed numerics against exact ones, the bound, determinism, and the memory a build takes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from subspace_peft import build_basis
from subspace_peft.builders import (
    memory,
    module_plan,
    module_stack,
    plan_build,
    rebuild_basis,
    spectral_bound,
    streaming,
)
from subspace_peft.builders.hosvd import exact, factor_pca
from subspace_peft.builders.module_stack import ModuleStack
from subspace_peft.builders.option_checks import parse_size
from subspace_peft.builders.streaming import compress
from subspace_peft.errors import SubspaceError
from subspace_peft.sources.factors import Factors

from .test_build import deltas, kept


def shared_fleet(n=40, out=120, inner=90, ranks=(8,), shared=12, noise=0.4, seed=0):
    """Per source B (out, r) and A (r, in), float16: a few shared directions of falling weight, and own noise."""
    draw = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, shared + 1) ** -0.5
    left = torch.linalg.qr(torch.randn(out, shared, generator=draw))[0] * fall
    right = torch.linalg.qr(torch.randn(inner, shared, generator=draw))[0] * fall
    pairs = []
    for number in range(n):
        r = ranks[number % len(ranks)]
        B = left @ torch.randn(shared, r, generator=draw) + noise / out**0.5 * torch.randn(out, r, generator=draw)
        A = torch.randn(r, shared, generator=draw) @ right.T + noise / inner**0.5 * torch.randn(
            r, inner, generator=draw
        )
        pairs.append((B.half(), A.half()))
    return pairs


def both(pairs, k, *, raw=False, width=None, bound=True):
    """The same stack compressed exactly and by streaming."""
    doubles = [(B.double(), A.double()) for B, A in pairs]
    updates = [Factors(B, A) for B, A in doubles]
    norms = [update.norm() for update in updates]
    ones, weights, energy = [1.0] * len(pairs), [1 / norm for norm in norms], float(len(pairs))
    whole = factor_pca(doubles, ones, weights, energy) if raw else exact(updates, weights)
    stack = ModuleStack(
        pairs.__getitem__, [A.shape[0] for _, A in pairs], updates[0].shape, ones, weights, energy, raw=raw
    )
    return whole, compress(stack, width or 2 * k, k, bound)


@pytest.fixture
def streamed(monkeypatch):
    """Every stack counts as large, and is cut into pieces."""
    monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 0)
    monkeypatch.setattr(module_stack, "PIECE", 1000)


# -- numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(8,), (4, 8, 2)])
@pytest.mark.parametrize("raw", [False, True])
def test_streamed_directions_hold_what_the_exact_ones_do(ranks, raw, monkeypatch):
    monkeypatch.setattr(module_stack, "PIECE", 210 * 30)
    whole, found = both(shared_fleet(ranks=ranks), 8, raw=raw)
    for ours, true in ((found.out, whole.out), (found.inner, whole.inner)):
        best, held = float(true.values[:8].sum()), float(ours.values[:8].sum())
        assert best * 0.999 <= held <= best + 1e-6
        # what the subspace is said to hold, it holds: measured against the exact eigenvectors
        overlap = true.Q.T @ ours.Q[:, :8]
        assert float((true.values[:, None] * overlap.square()).sum()) == pytest.approx(held, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    noise=st.floats(0, 3),
    k=st.integers(1, 12),
    n=st.integers(3, 40),
    oversampled=st.sampled_from([1, 2, 4]),
)
def test_the_bound_is_never_below_the_exact_energy(seed, noise, k, n, oversampled):
    whole, found = both(shared_fleet(n=n, noise=noise, seed=seed), k, width=k * oversampled)
    for ours, true in ((found.out, whole.out), (found.inner, whole.inner)):
        for size in (1, k):
            best = float(true.values[:size].sum())
            assert float(ours.values[:size].sum()) - 1e-6 <= best <= ours.reach(size) + 1e-6


def test_the_bound_is_tight_where_the_subspace_is_good_and_open_where_it_is_not():
    pairs = shared_fleet(n=60, noise=0.3)
    whole, found = both(pairs, 8, width=16)
    best = float(whole.out.values[:8].sum())
    assert found.out.reach(8) - best < 0.005
    # a subspace that missed the leading direction: what is out there shows in the probe
    missing = whole.out.Q[:, 3:12]
    stack = ModuleStack(pairs.__getitem__, [8] * 60, (120, 90), [1.0] * 60, found.weights, 60.0)
    out, _ = spectral_bound.largest_missed(lambda X: streaming._apply(stack, X, None), [missing, whole.inner.Q[:, :8]])
    assert out / 60.0 >= float(whole.out.values[0])


def test_bases_of_both_ways_keep_the_same_energy(streamed, monkeypatch):
    states = [{"q.lora_B.weight": B, "q.lora_A.weight": A} for B, A in shared_fleet(n=60)]
    found = build_basis(states, k=8, progress=False)
    monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 1 << 20)
    true = build_basis(states, k=8, progress=False)
    updates = [d.double() for d in deltas([{k: v.double() for k, v in s.items()} for s in states], "q")]
    ours, best = kept(found, updates, "q"), kept(true, updates, "q")
    assert best - 0.003 < ours < best + 1e-4
    for basis, numerics, energy in ((found, "streamed", ours), (true, "exact", best)):
        facts = basis.info["measured"]["certificates"]["q"]
        assert facts["numerics"] == numerics
        assert facts["kept"] == pytest.approx(energy, abs=1e-5)
        assert facts["kept"] <= facts["at_most"]
        assert facts["out"][0] <= facts["out"][1] <= facts["out"][0] + 0.005
    module = found["q"]
    torch.testing.assert_close(module.U.T @ module.U, torch.eye(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(module.V @ module.V.T, torch.eye(8), atol=1e-6, rtol=0)
    cores = torch.stack([module.project(d.double()) for d in updates])
    torch.testing.assert_close(module.M.double(), cores.mean(0), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(module.cores.double(), cores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_share_of_energy_is_kept_however_many_directions_it_takes(streamed, monkeypatch, share):
    monkeypatch.setattr(memory, "GUESSED_K", 2)
    states = [{"q.lora_B.weight": B, "q.lora_A.weight": A} for B, A in shared_fleet(n=30)]
    basis = build_basis(states, k=share, alternations=0, progress=False)
    updates = deltas([{k: v.double() for k, v in s.items()} for s in states], "q")
    assert kept(basis, updates, "q") >= share - 1e-5
    monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 1 << 20)
    assert abs(build_basis(states, k=share, alternations=0, progress=False)["q"].k_out - basis["q"].k_out) <= 1


def test_a_streamed_basis_makes_up_no_directions(streamed):
    # 12 adapters, each of one of 3 sources' A and its own mixture of that one's B: all together span 6 directions
    draw = torch.Generator().manual_seed(0)
    states = [
        {"q.lora_B.weight": B.float() @ torch.randn(2, 2, generator=draw), "q.lora_A.weight": A}
        for B, A in shared_fleet(n=3, ranks=(2,)) * 4
    ]
    basis = build_basis(states, k=32, progress=False)
    assert (basis["q"].k_out, basis["q"].k_in) == (6, 6)
    assert basis.info["measured"]["energy_kept"] == pytest.approx(1, abs=1e-5)


def test_a_badly_scaled_gauge_changes_nothing():
    pairs = [(B.double(), A.double()) for B, A in shared_fleet(n=30)]
    R = torch.diag(torch.logspace(-3, 3, 8, dtype=torch.float64))
    turned = [(B @ torch.linalg.inv(R), R @ A) for B, A in pairs]
    (_, one), (_, two) = (both(given, 6) for given in (pairs, turned))
    for a, b in ((one.out, two.out), (one.inner, two.inner)):
        torch.testing.assert_close(a.values[:6], b.values[:6], atol=1e-5, rtol=0)


def saved_fleet(root: Path, pairs, modules=("m.q", "m.v")) -> list[str]:
    folders = []
    for number, (B, A) in enumerate(pairs):
        folder = root / f"lora-{number}"
        folder.mkdir(parents=True)
        tensors = {}
        for shift, module in enumerate(modules):
            tensors[f"base_model.model.{module}.lora_B.weight"] = B.roll(shift, 0).contiguous()
            tensors[f"base_model.model.{module}.lora_A.weight"] = A.roll(shift, 1).contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": B.shape[1], "lora_alpha": 2 * B.shape[1]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    return folders


@pytest.mark.parametrize("builder", ["adapters", "eigenlora"])
def test_the_bytes_are_the_same_whatever_the_memory(streamed, monkeypatch, tmp_path, builder):
    folders = saved_fleet(tmp_path, shared_fleet(n=30))
    roomy = build_basis(folders, k=6, builder=builder, progress=False)
    # nothing fits: every piece of every pass is read from the files again
    monkeypatch.setattr(memory.MemoryPlan, "__init__", squeezed(memory.MemoryPlan.__init__))
    tight = build_basis(folders, k=6, builder=builder, progress=False)
    assert roomy.fingerprint == tight.fingerprint
    assert roomy.info == tight.info


def squeezed(original):
    def init(self, *args):
        original(self, *args)
        self.keep, self.held = 0, 10

    return init


# -- memory ---------------------------------------------------------------------------------------------------------


def test_sizes():
    assert [parse_size(s) for s in ("2GB", "512MiB", "1.5g", " 3 kb ", 7, "7")] == [
        2 * 10**9,
        512 * 2**20,
        1_500_000_000,
        3000,
        7,
        7,
    ]
    for wrong in ("much", "-2GB", 0, "2XB", "", True, 1.5e9j):
        with pytest.raises(SubspaceError, match="max_memory"):
            parse_size(wrong)


def test_too_little_memory_is_refused_with_what_suffices(tmp_path):
    folders = saved_fleet(tmp_path, shared_fleet(n=4))
    with pytest.raises(SubspaceError, match=r"'m\.q'.*at least (\d+)MB") as caught:
        build_basis(folders, k=4, max_memory=1000, progress=False)
    enough = str(caught.value).split("at least ")[1].rstrip(".")
    build_basis(folders, k=4, max_memory=enough, progress=False)


def test_a_build_stays_under_its_bound(tmp_path):
    """200 adapters × 8 modules × 1024, r = 16: 105 MB of half precision, 210 MB as a stack in float32, 420 MB in
    float64."""
    draw = torch.Generator().manual_seed(0)
    folders = []
    for number in range(200):
        folder = tmp_path / f"lora-{number}"
        folder.mkdir()
        tensors = {
            f"base_model.model.m.{module}.lora_{side}.weight": torch.randn(*shape, generator=draw).half()
            for module in range(8)
            for side, shape in (("A", (16, 1024)), ("B", (1024, 16)))
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 16}))
        folders.append(str(folder))
    script = f"""
        import re, torch, pathlib
        from subspace_peft import build_basis
        def peak(name):
            return int(re.search(name + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
        a = torch.randn(300, 64, dtype=torch.float64)  # what the libraries load at their first use is no part of it
        torch.linalg.svd(a), torch.linalg.qr(a), torch.linalg.eigh(a.T @ a), a.float().T @ a.float()
        before = peak("VmRSS")
        build_basis({folders!r}, k=16, max_memory="120MB", progress=False)
        print((peak("VmHWM") - before) / 1e6)
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert 20 < float(done.stdout) < 120


# -- sources of every kind --------------------------------------------------------------------------------------------


def kinds_of(tmp_path, pairs):
    """The same updates, 2 B A: as PEFT folders; and as a kohya file, a pickled folder, a state dict with its config,
    and a folder."""
    plain = saved_fleet(tmp_path / "plain", pairs, modules=("unet.down_blocks.0.attentions.0.proj_in",))
    mixed = saved_fleet(tmp_path / "mixed", pairs, modules=("unet.down_blocks.0.attentions.0.proj_in",))
    kohya, pickled, memory, *rest = map(Path, mixed)
    tensors = load_file(kohya / "adapter_model.safetensors")
    A, B = (next(value for key, value in tensors.items() if f"lora_{side}" in key) for side in "AB")
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    file = tmp_path / "kohya.safetensors"
    alpha = torch.tensor(2.0 * len(A))
    save_file({f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": alpha}, file)
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    state = load_file(memory / "adapter_model.safetensors")
    config = json.loads((memory / "adapter_config.json").read_text())
    return plain, [str(file), str(pickled), (state, config), *map(str, rest)]


@pytest.mark.parametrize("weights", ["equal", "norm"])
@pytest.mark.parametrize("exactly", [False, True])
def test_foreign_pickled_and_given_sources_stream_to_the_same_bytes(tmp_path, monkeypatch, exactly, weights):
    monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 1 << 20 if exactly else 0)
    plain, mixed = kinds_of(tmp_path, shared_fleet(n=6))
    expected = build_basis(plain, k=4, weights=weights, progress=False)
    found = build_basis(mixed, k=4, weights=weights, allow_bin=True, work_folder=tmp_path / "work", progress=False)
    assert found.fingerprint == expected.fingerprint
    monkeypatch.setattr("subspace_peft.builders.build._build_module", None)
    again = build_basis(mixed, k=4, weights=weights, allow_bin=True, work_folder=tmp_path / "work", progress=False)
    assert (again.fingerprint, again.info) == (found.fingerprint, found.info)
    assert [entry["dtypes"] for entry in found.info["sources"]] == [["float16"]] * 6
    assert ("energy_left_out" in found.info["measured"]) == exactly
    kohya = found.info["sources"][0]
    assert kohya["sha256"] == hashlib.sha256((tmp_path / "kohya.safetensors").read_bytes()).hexdigest()


def test_duplicates_are_found_in_the_one_pass(tmp_path):
    plain, mixed = kinds_of(tmp_path, shared_fleet(n=6))
    with pytest.raises(SubspaceError, match="3 of 9 sources") as caught:
        build_basis([*plain, *mixed[:3]], allow_bin=True, progress=False)
    assert str(caught.value).count("cosine of the updates 1.00000") == 3


def test_the_plan_of_a_streamed_fleet_keeps_the_bound(streamed, tmp_path):
    folders = saved_fleet(tmp_path, shared_fleet(n=30))
    roomy = plan_build(folders, k=6, progress=False)
    assert 0 < roomy.memory < 10**8 and roomy.seconds > 0
    assert plan_build(folders, k=6, max_memory=roomy.memory - 1000, progress=False).memory == roomy.memory - 1000
    assert plan_build(folders, k=0.5, progress=False).seconds > 0
    with pytest.raises(SubspaceError, match="at least"):
        plan_build(folders, k=6, max_memory=1000, progress=False)


def test_a_build_again_may_be_bounded_too(streamed, tmp_path):
    basis = build_basis(saved_fleet(tmp_path, shared_fleet(n=20)), k=4, progress=False)
    assert rebuild_basis(basis, max_memory="1GB", work_folder=tmp_path / "work", progress=False) == basis
    with pytest.raises(SubspaceError, match="at least"):
        rebuild_basis(basis, max_memory=1000, progress=False)
