"""Building a basis: algebra, gauge, determinism, sources of every kind, and every way a fleet can be bad."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from subspace_peft import build_basis
from subspace_peft.build import Factors, open_source
from subspace_peft.build.lora import scaling
from subspace_peft.errors import SourceError, SubspaceError

from .conftest import bert, gpt2, train_lora


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
        {key: (value @ torch.linalg.inv(R) if "lora_B" in key else R @ value) for key, value in state.items()}
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


# -- sources --------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_basis(kind, fleets):
    folders = fleets[kind][:3]
    live = [PeftModel.from_pretrained(kind(), folder) for folder in folders]
    pairs = [(get_peft_model_state_dict(model), model.peft_config["default"]) for model in live]
    reference = build_basis(folders, k=4, progress=False)
    for sources in (live, pairs):
        other = build_basis(sources, k=4, progress=False)
        assert other.digests.keys() == reference.digests.keys()
        for name in reference:
            torch.testing.assert_close(other[name].U, reference[name].U, atol=1e-5, rtol=0)
            torch.testing.assert_close(other[name].M, reference[name].M, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 16},
        {"r": 2, "lora_alpha": 3, "use_rslora": True},
        {"r": 4, "rank_pattern": {"value": 2}, "alpha_pattern": {"0.attention.self.query": 32}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_scales_and_ranks_are_folded_in_as_peft_applies_them(config, tmp_path):
    folder = train_lora(bert, tmp_path / "lora", seed=1, **config)
    source = open_source(str(folder))
    model = PeftModel.from_pretrained(bert(), folder)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            update = source.factors(name.removeprefix("base_model.model."))
            torch.testing.assert_close(
                (update.B @ update.A).float(), module.get_delta_weight("default"), atol=1e-6, rtol=1e-5
            )
    mixed = build_basis([str(folder), str(train_lora(bert, tmp_path / "b", 2, r=8))], k=4, progress=False)
    assert [entry["ranks"] for entry in mixed.info["sources"]][1] == [8]


def test_scaling_formulas():
    assert scaling({"r": 4, "lora_alpha": 8}, "m", 4) == 2
    assert scaling({"r": 4, "lora_alpha": 8, "use_rslora": True}, "m", 4) == 4
    assert scaling({"r": 4, "lora_alpha": 8, "rank_pattern": {"m": 2}, "alpha_pattern": {r".*\.m": 6}}, "x.m", 2) == 3
    with pytest.raises(ValueError, match="rank 3"):
        scaling({"r": 4, "lora_alpha": 8}, "m", 3)


def test_a_task_heads_prefix_does_not_split_the_modules(tmp_path):
    with_head = train_lora(bert, tmp_path / "with-head", 1)
    bare = train_lora_bare(tmp_path / "bare", 2)
    basis = build_basis([str(with_head), str(bare)], k=4, progress=False)
    assert len(basis) == 4
    assert all(name.startswith("encoder.layer") for name in basis)
    assert basis.find("bert.encoder.layer.0.attention.self.query") == "encoder.layer.0.attention.self.query"


def train_lora_bare(folder: Path, seed: int) -> Path:
    model = bert().bert
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def test_shared_seed_sources_are_found_and_share_one_vote():
    torch.manual_seed(0)
    start = torch.randn(3, 16, dtype=torch.float64)
    states = fleet(5, modules=("q",))
    for state in states[:3]:
        state["q.lora_A.weight"] = start + 0.1 * torch.randn(3, 16, dtype=torch.float64)
    basis = build_basis(states, k=4, progress=False)
    assert [entry["seed_group"] for entry in basis.info["sources"]] == [0, 0, 0, 1, 2]
    # three copies of one adapter weigh as much as one
    alone, tripled = ([states[0], *states[3:]], [states[0], states[0], states[0], *states[3:]])
    one, three = (build_basis(s, k=3, alternations=0, progress=False)["q"] for s in (alone, tripled))
    torch.testing.assert_close(one.U @ one.U.T, three.U @ three.U.T, atol=1e-5, rtol=0)


# -- generated bases ------------------------------------------------------------------------------------------------


def test_base_weights_are_top_singular_vectors():
    for make, target in ((bert, ["query"]), (gpt2, ["c_attn"])):
        model = make()
        basis = build_basis(builder="base-weights", base_model=model, target_modules=target, k=4, progress=False)
        for name, module in basis.items():
            weight = model.get_submodule(name).weight.detach()
            weight = weight.T if make is gpt2 else weight
            captured = module.project(weight)
            torch.testing.assert_close(
                captured.diagonal().abs(), torch.linalg.svdvals(weight)[:4], atol=1e-5, rtol=1e-4
            )


def test_random_takes_sizes_from_a_basis_from_sources_or_from_a_model(fleets, bases):
    like = build_basis(like=bases[bert], builder="random", seed=1, progress=False)
    again = build_basis(like=bases[bert], builder="random", seed=1, progress=False)
    other = build_basis(like=bases[bert], builder="random", seed=2, progress=False)
    assert like.fingerprint == again.fingerprint != other.fingerprint
    names = bases[bert].shapes()
    assert {n: (s["k_out"], s["out"]) for n, s in like.shapes().items()} == {
        n: (s["k_out"], s["out"]) for n, s in names.items()
    }
    assert build_basis(fleets[bert], k=6, builder="random", seed=1, progress=False).fingerprint == like.fingerprint
    with pytest.raises(SubspaceError, match="which modules"):
        build_basis(builder="random", progress=False)


# -- bad fleets -----------------------------------------------------------------------------------------------------


def broken(folder: str, tmp_path: Path, how: str) -> Path:
    copy = tmp_path / how
    shutil.copytree(folder, copy)
    weights, config = copy / "adapter_model.safetensors", copy / "adapter_config.json"
    tensors, settings_ = load_file(weights), json.loads(config.read_text())
    first = sorted(tensors)[0]
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif how == "nan":
        tensors[first][0, 0] = float("nan")
        save_file(tensors, weights)
    elif how == "integers":
        save_file({key: value.int() for key, value in tensors.items()}, weights)
    elif how == "zero":
        save_file({key: value * ("lora_A" in key) for key, value in tensors.items()}, weights)
    elif how == "half-missing":
        tensors.pop(first)
        save_file(tensors, weights)
    elif how == "fewer-modules":
        module = first.split(".lora_")[0]
        save_file({key: value for key, value in tensors.items() if not key.startswith(module)}, weights)
    elif how == "other-base":
        settings_["base_model_name_or_path"] = "somebody/else"
    elif how == "dora":
        settings_["use_dora"] = True
    elif how == "vera":
        settings_["peft_type"] = "VERA"
    elif how == "wrong-rank":
        settings_["r"] = 5
    elif how == "no-config":
        config.unlink()
    elif how == "no-json":
        config.write_text("{")
    elif how == "pickle-only":
        weights.rename(copy / "adapter_model.bin")
    if config.exists() and how not in ("no-json",):
        config.write_text(json.dumps(settings_))
    return copy


BAD = {
    "truncated": "truncated or damaged",
    "nan": "NaN or infinite",
    "integers": "no float",
    "zero": "every lora_B is zero",
    "half-missing": "incomplete",
    "fewer-modules": "lacks 1 modules",
    "other-base": "somebody/else",
    "dora": "use_dora",
    "vera": "VERA",
    "wrong-rank": "rank 4",
    "no-config": "adapter_config.json",
    "no-json": "adapter_config.json",
    "pickle-only": "unpickled",
}


@pytest.fixture
def named_fleet(fleets, tmp_path):
    """The fleet with a base model's name, as real adapters have."""
    folders = []
    for folder in fleets[bert]:
        copy = tmp_path / "fleet" / Path(folder).name
        shutil.copytree(folder, copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
        folders.append(str(copy))
    return folders


@pytest.mark.parametrize("how", BAD)
def test_bad_sources_are_named_with_the_reason_and_can_be_left_out(named_fleet, tmp_path, how):
    bad = broken(named_fleet[0], tmp_path, how)
    with pytest.raises(SourceError, match=BAD[how]) as caught:
        build_basis([*named_fleet, str(bad)], k=4, progress=False)
    assert str(bad) in str(caught.value)
    basis = build_basis([*named_fleet, str(bad)], k=4, skip_bad=True, progress=False)
    assert basis.fingerprint == build_basis(named_fleet, k=4, progress=False).fingerprint
    assert [str(bad) in entry["reason"] for entry in basis.info["skipped"]] == [True]


def test_all_bad_sources_are_listed_at_once(named_fleet, tmp_path):
    bad = [broken(named_fleet[0], tmp_path, how) for how in ("nan", "truncated", "zero")]
    with pytest.raises(SourceError, match="3 of 5") as caught:
        build_basis([*named_fleet[:2], *map(str, bad)], k=4, progress=False)
    assert all(str(folder) in str(caught.value) for folder in bad)


def test_partial_fleets_need_to_be_asked_for(named_fleet, tmp_path):
    part = broken(named_fleet[0], tmp_path, "fewer-modules")
    basis = build_basis([*named_fleet, str(part)], k=4, partial=True, progress=False)
    assert len(basis) == 4
    assert [entry["modules"] for entry in basis.info["sources"]].count(3) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "number of directions"),
        ({"k": 1.5}, "number of directions"),
        ({"k": True}, "number of directions"),
        ({"k_in": 0}, "at least 1"),
        ({"builder": "magic"}, "no builder"),
        ({"weights": "loud"}, "no weighting"),
        ({"k": 0.5, "builder": "eigenlora"}, "share of energy"),
        ({"directions": -1}, "0 or more"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(SubspaceError, match=message):
        build_basis(fleet(), progress=False, **arguments)


@pytest.mark.parametrize("sources", [["/no/such/folder"], [3], [], [{"x": torch.zeros(2)}]], ids=str)
def test_no_usable_source(sources):
    with pytest.raises(SourceError):
        build_basis(sources, progress=False)
