"""Building a basis: algebra, gauge, determinism."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from subspace_peft import build_basis
from subspace_peft.sources import Factors


def fleet(n=4, out=20, inner=16, r=3, seed=0, modules=("a.q", "a.v")):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            f"{module}.lora_{side}.weight": torch.randn(*shape, generator=generator, dtype=torch.float64)
            for module in modules
            for side, shape in (("B", (out, r)), ("A", (r, inner)))
        }
        for _ in range(n)
    ]


def deltas(states, module="a.q"):
    return [state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"] for state in states]


def kept(basis, updates, module="a.q"):
    U, V = basis[module].U.double(), basis[module].V.double()
    return sum(float((U.T @ d @ V.T).square().sum() / d.square().sum()) for d in updates) / len(updates)


# -- algebra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ["adapters", "eigenlora", "random"])
def test_bases_are_orthonormal_with_fixed_signs(builder):
    basis = build_basis(fleet(), k=5, builder=builder, progress=False)
    for module in basis.values():
        torch.testing.assert_close(module.U.T @ module.U, torch.eye(module.k_out), atol=1e-6, rtol=0)
        torch.testing.assert_close(module.V @ module.V.T, torch.eye(module.k_in), atol=1e-6, rtol=0)
        for directions in (module.U, module.V.T):
            top = directions.gather(0, directions.abs().argmax(0, keepdim=True))
            assert (top > 0).all()


def test_hosvd_start_is_the_top_eigenvectors_of_the_dense_second_moments():
    states = fleet()
    basis = build_basis(states, k=5, alternations=0, progress=False)
    unit = [d / d.norm() for d in deltas(states)]
    for moment, projector in (
        (sum(d @ d.T for d in unit), basis["a.q"].U @ basis["a.q"].U.T),
        (sum(d.T @ d for d in unit), basis["a.q"].V.T @ basis["a.q"].V),
    ):
        values, vectors = torch.linalg.eigh(moment)
        top = vectors[:, -5:]
        torch.testing.assert_close(projector.double(), top @ top.T, atol=1e-5, rtol=0)
        spectrum = basis["a.q"].spectrum_out if projector.shape[0] == 20 else basis["a.q"].spectrum_in
        expected = (values.flip(0) / values.sum())[: len(spectrum)]
        torch.testing.assert_close(spectrum.double(), expected, atol=1e-6, rtol=0)


def test_alternations_never_lose_energy_and_beat_a_random_basis():
    states = fleet(6)
    scores = [kept(build_basis(states, k=4, alternations=n, progress=False), deltas(states)) for n in (0, 1, 3, 20)]
    assert all(b >= a - 1e-7 for a, b in itertools.pairwise(scores))
    assert scores[-1] > scores[0]
    assert scores[-1] > 2 * kept(build_basis(states, k=4, builder="random", progress=False), deltas(states))


def test_full_k_keeps_everything_and_is_cut_to_the_fleets_rank():
    states = fleet(2)
    basis = build_basis(states, k=64, progress=False)
    assert (basis["a.q"].k_out, basis["a.q"].k_in) == (6, 6)
    assert basis.info["measured"]["energy_kept"] == pytest.approx(1, abs=1e-6)
    cores = basis.project({"a.q": (states[0]["a.q.lora_B.weight"], states[0]["a.q.lora_A.weight"])})
    torch.testing.assert_close(basis.reconstruct(cores)["a.q"], deltas(states)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_share_of_energy_is_kept_with_no_direction_to_spare(share):
    states = fleet(5)
    basis = build_basis(states, k=share, alternations=0, progress=False)
    assert kept(basis, deltas(states)) >= share - 1e-6
    k = basis["a.q"].k_out
    assert kept(build_basis(states, k=k - 1, alternations=0, progress=False), deltas(states)) < share


def test_statistics_are_of_the_sources_own_cores():
    states = fleet(4)
    module = build_basis(states, k=5, directions=2, progress=False)["a.q"]
    cores = torch.stack([module.project(d) for d in deltas(states)])
    torch.testing.assert_close(module.cores.double(), cores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module.M.double(), cores.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module.core_rms.double(), cores.square().mean(0).sqrt(), atol=1e-4, rtol=1e-4)
    gram = torch.einsum("aoi,boi->ab", module.G, module.G)
    torch.testing.assert_close(gram, torch.eye(2), atol=1e-5, rtol=0)


def test_project_undoes_reconstruct(bases, kind):
    for module in bases[kind].values():
        core = torch.randn(module.k_out, module.k_in)
        torch.testing.assert_close(module.project(module.reconstruct(core)), core, atol=1e-5, rtol=1e-5)


def test_equal_weights_do_not_let_a_loud_adapter_dominate():
    states = fleet(4)
    states[0] = {key: value * 100 for key, value in states[0].items()}
    equal, loud = (build_basis(states, k=3, weights=w, progress=False) for w in ("equal", "norm"))
    quiet = deltas(states)[1:]
    assert kept(equal, quiet) > kept(loud, quiet)


# -- gauge and determinism ------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 3), k=st.integers(1, 6))
def test_gauge_invariance(seed, spread, k):
    """The same basis for (B, A) and (B R⁻¹, R A)."""
    states = fleet(3, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    turned = []
    for state in states:
        other = {}
        for module in ("a.q", "a.v"):
            R = torch.eye(3, dtype=torch.float64) + spread * torch.randn(
                3, 3, generator=generator, dtype=torch.float64
            )
            if torch.linalg.cond(R) > 1e3:
                R = torch.eye(3, dtype=torch.float64)
            other[f"{module}.lora_B.weight"] = state[f"{module}.lora_B.weight"] @ torch.linalg.inv(R)
            other[f"{module}.lora_A.weight"] = R @ state[f"{module}.lora_A.weight"]
        turned.append(other)
    one, two = (build_basis(s, k=k, alternations=0, progress=False) for s in (states, turned))
    for name in one:
        a, b = one[name], two[name]
        torch.testing.assert_close(a.spectrum_out, b.spectrum_out, atol=1e-6, rtol=0)
        spectrum = [*a.spectrum_out.tolist(), 0.0]
        if spectrum[k - 1] - spectrum[k] > 1e-3:  # without a gap the span itself is not determined
            torch.testing.assert_close(a.U @ a.U.T, b.U @ b.U.T, atol=1e-4, rtol=0)


def test_eigenlora_does_depend_on_the_gauge():
    states = fleet(3)
    R = torch.diag(torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64))
    turned = [
        {key: value @ torch.linalg.inv(R) if "lora_B" in key else R @ value for key, value in state.items()}
        for state in states
    ]
    one, two = (build_basis(s, k=3, builder="eigenlora", progress=False)["a.q"] for s in (states, turned))
    assert (one.U @ one.U.T - two.U @ two.U.T).abs().max() > 0.05


def test_same_inputs_same_bytes(fleets, kind, tmp_path):
    for name in "ab":
        build_basis(fleets[kind], k=4, progress=False).save_pretrained(tmp_path / name)
    for file in ("basis.safetensors", "basis_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_canonical_factors_are_the_svd(seed):
    torch.manual_seed(seed)
    update = Factors(torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64))
    P, S, T = update.canonical()
    dense = update.B @ update.A
    torch.testing.assert_close(P * S @ T.T, dense)
    torch.testing.assert_close(S, torch.linalg.svdvals(dense)[:3])
    assert update.norm() == pytest.approx(dense.norm().item())
