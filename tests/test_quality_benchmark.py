"""The quality benchmark's own parts: statistics, caching, leaving out, bases, tables. No downloads, models of a few numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model

from benchmarks.quality import bench as bench_module
from benchmarks.quality import fleet as fleet_module
from benchmarks.quality.bases import (
    centred,
    completed,
    from_activation_metric,
    hybrid,
    input_roots,
    one_sided,
    preconditioned,
    scaled_inputs,
    shared_inputs,
)
from benchmarks.quality.bench import Bench, Experiment, OutOfTime, perform, usual_rate
from benchmarks.quality.encoder import BERT_NAMES, VIT_NAMES, Head, Top, block_state
from benchmarks.quality.fleet import others, require_left_out
from benchmarks.quality.rows import head_only, inside, lora, vera
from benchmarks.quality.tasks import Split, Task, split_texts
from benchmarks.quality.training import Budget, make_model, measure, outputs_of, pooled, score, train
from subspace_peft import build_basis
from subspace_peft.errors import SubspaceError
from subspace_peft.offline.texts import Row, TextTask

D, INNER = 16, 32
SMALL = Budget(examples=24, steps=4, batch=8, checks=(2,))


def blocks(count: int = 2) -> list[dict[str, torch.Tensor]]:
    from benchmarks.quality.encoder import Block

    torch.manual_seed(0)
    return [{k: v.detach() for k, v in Block(D, INNER, 2, 1e-5, False).state_dict().items()} for _ in range(count)]


def top_of() -> dict:
    return {"blocks": blocks(), "heads": 2, "eps": 1e-5, "before": False, "final": None}


def toy(name: str, outputs: int = 2) -> Task:
    generator = torch.Generator().manual_seed(len(name))
    splits = {}
    for split, n in (("train", 32), ("validation", 20), ("test", 30)):
        hidden, lengths = torch.randn(n, 6, D, generator=generator), torch.randint(2, 7, (n,), generator=generator)
        value = hidden[:, 0, 0]
        splits[split] = Split(hidden, lengths, value if outputs == 1 else (value > 0).long())
    return Task(name, splits, outputs, name)


NAMES = ("one", "three", "seventh")


@pytest.fixture
def toys(monkeypatch):
    for module in (bench_module.tasks, fleet_module):
        monkeypatch.setattr(module, "load", lambda name, folder: toy(name))
        monkeypatch.setattr(module, "top_layers", lambda kind, folder: top_of())
    monkeypatch.setattr(bench_module.tasks, "kind_of", lambda name: "text")
    monkeypatch.setattr(bench_module.tasks, "names", lambda kind: NAMES)


@pytest.fixture
def bench(tmp_path, toys):
    return Bench(tmp_path, source_budget=SMALL, seeds=(1, 2))


def test_measure_is_accuracy_or_spearmans_correlation():
    from scipy.stats import spearmanr

    a = torch.tensor([[3.0], [1.0], [1.0], [5.0], [2.0]])
    b = torch.tensor([1.0, 0.0, 2.0, 2.0, 2.0])
    assert measure(a, b) == pytest.approx(float(spearmanr(a[:, 0], b).statistic))
    assert measure(torch.zeros(3, 1), torch.tensor([1.0, 2.0, 3.0])) == 0.0
    assert measure(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])) == 0.5
    assert np.isnan(measure(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0])))


# -- the encoder --------------------------------------------------------------------------------------------------------


def test_the_top_layers_compute_what_the_whole_encoder_does():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=3, num_attention_heads=2, intermediate_size=INNER
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    ids, mask = torch.randint(0, 50, (3, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states = [block_state(layer, BERT_NAMES) for layer in model.encoder.layer[-2:]]
        top = Top(states, 1, heads=2, eps=config.layer_norm_eps, before=False, final=None, seed=0)
        found = top.features(out.hidden_states[-3], mask.sum(1))
    wanted = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_top_layers_of_a_vit_too():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=2, intermediate_size=INNER, image_size=8, patch_size=4
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        out = model(pixel_values=torch.randn(2, 3, 8, 8), output_hidden_states=True)
        states = [block_state(layer, VIT_NAMES) for layer in model.layers[-2:]]
        final = (model.layernorm.weight, model.layernorm.bias)
        top = Top(states, 1, heads=2, eps=config.layer_norm_eps, before=True, final=final, seed=0)
        found = top.features(out.hidden_states[-3], torch.full((2,), 5))
    assert torch.allclose(found, out.last_hidden_state.mean(1), atol=1e-5)


def test_a_head_on_pooled_features_is_the_untouched_model_with_that_head():
    task, model = toy("one"), make_model(top_of(), 2, 5)
    kept = pooled(top_of(), task)
    head = Head(D, 2, 5)
    assert torch.allclose(outputs_of(head, kept.splits["test"]), outputs_of(model, task.splits["test"]), atol=1e-5)


def test_half_precision_is_near_full_precision():
    task = toy("one")
    full, half = Top(**top_of(), outputs=2, seed=0), make_model(top_of(), 2, 0)
    a, b = (outputs_of(model.features, task.splits["test"]) for model in (full, half))
    assert (a - b).norm() < 0.02 * a.norm() and not torch.equal(a, b)


def test_training_is_a_function_of_its_seed_and_learns():
    task = toy("one")

    def once(seed: int) -> tuple[float, list]:
        torch.manual_seed(seed)
        model = get_peft_model(make_model(top_of(), 2, seed), lora(2).adapter())
        result = train(model, task, Budget(examples=32, steps=100, batch=8, checks=(20,)), 2e-2, seed, curve=True)
        return score(model, task, "train"), result["curve"]

    assert once(1) == once(1)
    assert once(1)[0] > 0.8 and [step for step, _ in once(1)[1]] == [20, 100]


# -- leaving out --------------------------------------------------------------------------------------------------------


def test_a_held_out_tasks_own_adapter_is_never_in_its_basis(bench):
    basis = bench.basis("one", k=4)
    assert {each["name"] for each in basis.info["sources"]} == {"three", "seventh"}
    own = bench.source("one")
    all_of_them = build_basis([str(bench.source(name)) for name in NAMES], k=4, progress=False)
    with pytest.raises(SubspaceError, match="own adapter"):
        require_left_out(all_of_them, own)
    with pytest.raises(SubspaceError, match="lists no sources"):
        require_left_out(bench.control("random", "one", 4), own)


def test_a_copy_of_the_own_adapter_under_another_name_is_noticed(bench, tmp_path):
    import shutil

    copy = tmp_path / "innocent"
    shutil.copytree(bench.source("one"), copy)
    basis = build_basis([str(copy), str(bench.source("three"))], k=4, progress=False)
    with pytest.raises(SubspaceError, match="own adapter"):
        require_left_out(basis, bench.source("one"))


def test_a_fleet_of_one_leaves_nothing():
    assert others("a", ["a", "b"]) == ["b"]
    with pytest.raises(SubspaceError, match="empty"):
        others("a", ["a"])


def test_sources_that_start_at_their_inputs_axes(bench, monkeypatch):
    monkeypatch.setattr(fleet_module, "SOURCE_RATE", 0.0)
    from safetensors.torch import load_file

    state = load_file(bench.source("one", "axes") / "adapter_model.safetensors")
    axes = input_roots(make_model(top_of(), 2, 0), fleet_module.some_inputs(toy("one")))
    for key in (key for key in state if "lora_A" in key):
        module = next(module for module in axes if f".{module}." in key)
        assert torch.allclose(state[key] / state[key].norm(dim=1, keepdim=True), axes[module]["axes"][:8], atol=1e-5)


def test_the_nearest_source_is_one_of_the_basiss(bench, monkeypatch):
    from benchmarks.quality import starts

    monkeypatch.setattr(starts, "FIT", 20)
    monkeypatch.setattr(starts, "HELD", 12)
    basis = bench.basis("one", k=4)
    losses = []
    original = starts.ridge_loss
    monkeypatch.setattr(starts, "ridge_loss", lambda *given: losses.append(original(*given)) or losses[-1])
    chosen = starts.nearest_source(bench, "one", basis)
    names = [each["name"] for each in basis.info["sources"]]
    assert len(losses) == 2 and losses[0] != losses[1] and chosen == names[losses.index(min(losses))]


# -- bases --------------------------------------------------------------------------------------------------------------


def orthonormal(columns: torch.Tensor) -> bool:
    return torch.allclose(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5)


def test_a_hybrid_keeps_the_fleets_leading_half_and_is_orthonormal(bench):
    fleet, base = bench.basis("one", k=8), bench.control("base-weights", "one", 8)
    for name, module in hybrid(fleet, base, 8).items():
        assert torch.equal(module.U[:, :4], fleet[name].U[:, :4]) and torch.equal(module.V[:4], fleet[name].V[:4])
        assert orthonormal(module.U) and orthonormal(module.V.T) and module.U.shape[1] == 8
        both = torch.cat([fleet[name].U[:, :4], base[name].U], 1)
        assert torch.linalg.matrix_rank(torch.cat([both, module.U], 1)) == torch.linalg.matrix_rank(both)


def test_completing_needs_enough_directions():
    first = torch.linalg.qr(torch.randn(6, 2))[0]
    with pytest.raises(ValueError, match="2 directions, 3 wanted"):
        completed(first, first.flip(1), 3)


def test_sides_are_taken_from_where_they_are_said_to_be(bench):
    fleet, random = bench.basis("one", k=4), bench.control("random", "one", 4)
    mixed = one_sided(random, fleet)
    for name in fleet:
        assert torch.equal(mixed[name].U, random[name].U) and torch.equal(mixed[name].V, fleet[name].V)
    assert require_left_out(mixed, bench.source("one")) is mixed


def test_preconditioning_moves_entries_in_proportion_to_the_fleets_use(bench):
    fleet = bench.basis("one", k=4)
    entries, sides = preconditioned(fleet, "rms"), preconditioned(fleet, "sides")
    for name, module in fleet.items():
        total = entries[name].G.sum(0)
        assert total.square().mean() == pytest.approx(1.0, abs=1e-4)
        assert torch.allclose(total / total.norm(), module.core_rms / module.core_rms.norm(), atol=1e-5)
        assert torch.allclose(sides[name].U / sides[name].U.norm(dim=0), module.U, atol=1e-5)
        assert sides[name].U.norm(dim=0).square().mean() == pytest.approx(1.0, abs=1e-4)


def test_the_activation_metric_of_white_inputs_changes_nothing(bench):
    fleet = bench.basis("one", k=4)
    roots = {name: torch.eye(D, dtype=torch.float64) for name in fleet}
    for back in ("as-is", "inverse", "forward"):
        for name, module in from_activation_metric(fleet, roots, back).items():
            assert torch.allclose((module.V @ fleet[name].V.T).abs(), torch.eye(4), atol=1e-5)


def test_roots_are_those_of_the_inputs_second_moment(bench):
    task = toy("one")
    model = make_model(top_of(), 2, 0)
    split = task.splits["train"]
    known = input_roots(model, [(split.hidden, split.lengths)], ridge=0.0)
    real = split.hidden[torch.arange(6) < split.lengths[:, None]].double()
    moment = real.T @ real
    root = known["layer.0.query"]["root"]
    assert torch.allclose(root @ root, moment / moment.diagonal().mean(), atol=1e-6)
    state = {"base_model.model.layer.0.query.lora_A.weight": torch.randn(2, D)}
    scaled = scaled_inputs(state, {"layer.0.query": root})
    assert torch.allclose(next(iter(scaled.values())), (next(iter(state.values())).double() @ root).float())


def test_every_experiments_rows_can_be_trained(bench, monkeypatch):
    from benchmarks.quality import experiments as listed
    from benchmarks.quality import starts

    for name, value in (("SENTIMENT", NAMES), ("TOPIC", NAMES), ("IMAGES", NAMES)):
        monkeypatch.setattr(bench_module.tasks, name, value)
    monkeypatch.setattr(starts, "FIT", 20)
    monkeypatch.setattr(starts, "HELD", 12)
    sweeps = [
        {"method": m, "sweep": [[1e-3, 0.5]]}
        for m in (
            "head only",
            "LoRA r=8",
            "LoRA r=1",
            "VeRA r=384",
            "fleet",
            "random",
            "hybrid",
            "eigenlora",
            "base weights",
        )
    ]
    (bench.folder / "main.json").write_text(json.dumps({"experiment": "main", "tasks": {"three": sweeps}}))
    bench.results = bench.folder
    for group in listed.experiments().values():
        for experiment in group:
            rows = experiment.rows(bench, "one")
            assert len({row.name for row in rows}) == len(rows)
            for row in rows:
                if row.adapter is not None:
                    model = get_peft_model(make_model(top_of(), 2, 0), row.adapter())
                    assert torch.isfinite(outputs_of(model, toy("one").splits["test"])).all()


# -- caching ------------------------------------------------------------------------------------------------------------


def test_finished_runs_are_never_done_twice(bench, monkeypatch):
    methods = [head_only(), lora(2), inside("random", bench.control("random", "one", 4))]
    first = bench.compare("one", methods, SMALL)
    assert all(len(row["tests"]) == 2 and None not in row["tests"] for row in first)

    def never(*_, **__):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(bench_module, "train", never)
        assert bench.compare("one", methods, SMALL) == first
        # whatever decides a run is in its key
        with pytest.raises(AssertionError, match="trained again"):
            bench.compare("one", methods, Budget(examples=24, steps=5, batch=8, checks=(2,)))
        with pytest.raises(AssertionError, match="trained again"):
            bench.compare("one", [inside("random", bench.control("random", "one", 4, seed=1))], SMALL)


def test_an_interrupted_experiment_keeps_what_is_done_and_goes_on(bench, tmp_path):
    experiment = Experiment("main", ["one", "three"], SMALL, lambda bench, name: [head_only(), vera(4)])
    bench.until = 0
    with pytest.raises(OutOfTime):
        perform(bench, experiment, tmp_path / "results")
    assert not (tmp_path / "results" / "main.json").exists()
    bench.until = float("inf")
    perform(bench, experiment, tmp_path / "results")
    body = json.loads((tmp_path / "results" / "main.json").read_text())
    assert list(body["tasks"]) == ["one", "three"] and [row["method"] for row in body["tasks"]["one"]] == [
        "head only",
        "VeRA r=4",
    ]


def test_the_usual_rate_comes_from_the_other_tasks_only(tmp_path):
    def body(sweep: list) -> list[dict]:
        return [{"method": "fleet", "sweep": sweep}]

    tasks = {
        "a": body([[0.1, 0.9], [0.2, 0.1], [0.3, 0.1]]),
        "b": body([[0.1, 0.3], [0.2, 0.5], [0.4, 0.9]]),
        "c": body([[0.1, None], [0.2, 0.6]]),
    }
    (tmp_path / "main.json").write_text(json.dumps({"experiment": "main", "tasks": tasks}))
    assert usual_rate(tmp_path, "fleet", "a") == 0.2 and usual_rate(tmp_path, "fleet", "b") == 0.1
    with pytest.raises(SubspaceError, match="no sweep of 'hybrid'"):
        usual_rate(tmp_path, "hybrid", "a")


def test_texts_of_one_document_are_in_one_split():
    rows = [Row(f"text number {i} of {i // 5}", str(i % 2), f"document {i // 5}") for i in range(100)]
    parts = split_texts(TextTask("t", "", rows), {"train": 50, "validation": 15, "test": 20}, 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 50, "validation": 15, "test": 20}
    seen = [{row.document for row in part} for part in parts.values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    with pytest.raises(SubspaceError, match="too few"):
        split_texts(TextTask("t", "", rows), {"train": 90, "test": 20}, 0)


# -- further bases ---------------------------------------------------------------------------------------------------------


def dense_fleet(n=5, out=8, inner=6):
    draw = torch.Generator().manual_seed(0)
    names = [f"layers.0.attention.{side}" for side in ("query", "value")]
    return {name: [torch.randn(out, inner, generator=draw, dtype=torch.float64) for _ in range(n)] for name in names}


def basis_of(updates, k=3):
    count = len(next(iter(updates.values())))
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, each in updates.items():
        for state, update in zip(states, each, strict=True):
            state[f"{name}.lora_B.weight"] = update
            state[f"{name}.lora_A.weight"] = torch.eye(update.shape[1], dtype=torch.float64)
    # identical A's are one shared-seed group, which changes nothing where all are in it
    return build_basis(states, k=k, alternations=0, progress=False)


def same_span(a, b):
    cosines = torch.linalg.svdvals(a.double() @ b.double().T)
    torch.testing.assert_close(cosines, torch.ones(len(a), dtype=torch.float64), atol=1e-5, rtol=0)


def test_one_v_per_layer_is_that_of_both_modules_together():
    updates = dense_fleet()
    basis = basis_of(updates)
    found = shared_inputs(basis, updates)
    query, value = found.values()
    assert torch.equal(query.V, value.V)
    for name in basis:
        assert torch.equal(found[name].U, basis[name].U)
    rows = torch.cat([d / d.norm() for each in updates.values() for d in each])
    same_span(query.V, torch.linalg.svd(rows)[2][:3])


def test_centring_of_updates_without_a_mean_changes_nothing():
    updates = dense_fleet()
    # each beside its negative: the mean is zero
    updates = {name: [*each, *(-d for d in each)] for name, each in updates.items()}
    basis = basis_of({name: each[:5] for name, each in updates.items()})
    found = centred(basis, updates)
    for name in basis:
        same_span(found[name].V, basis[name].V)
        same_span(found[name].U.T, basis[name].U.T)
    # a mean that outweighs all else is gone
    common = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = {name: [d + 5 * common for d in each] for name, each in updates.items()}
    first = centred(basis, shifted)["layers.0.attention.query"]
    lead = torch.linalg.svd(common)
    assert float((first.V.double() @ lead[2][0]).norm()) < 1
    assert (
        float(
            (
                basis_of({n: e[:5] for n, e in shifted.items()})["layers.0.attention.query"].V.double() @ lead[2][0]
            ).norm()
        )
        > 0.99
    )
