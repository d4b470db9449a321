"""DESIGN's identities as a table over layer kind × coefficient kind × mean gain × dtype."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn

from subspace_peft import SubspaceConfig, export_lora
from subspace_peft.tuner import SubspaceLayer
from subspace_peft.tuner.coefficients import KINDS as ALL_KINDS

from .models import basis_storage, check_merging, check_saved, inputs, layers, logits, randomise

KINDS = [kind for kind in ALL_KINDS if kind != "none"]  # of which there is nothing to train alone
GAINS = ["none", "fixed", "trainable"]
TABLE = [*itertools.product(KINDS, GAINS), ("none", "trainable")]


def adapted(make, basis, coefficients="core", mean_gain="none", alpha=8.0, **config):
    return get_peft_model(
        make(), SubspaceConfig(basis=basis, coefficients=coefficients, mean_gain=mean_gain, r=3, alpha=alpha, **config)
    ).eval()


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
def test_starts_as_the_base_model_unless_the_mean_is_fixed(kind, bases, coefficients, gain):
    model = adapted(kind, bases[kind], coefficients, gain)
    same = torch.equal(logits(model), logits(kind()))
    assert same == (gain != "fixed")


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
def test_forward_is_the_base_plus_its_own_delta(kind, bases, coefficients, gain):
    model = randomise(adapted(kind, bases[kind], coefficients, gain))
    for layer in layers(model):
        x = torch.randn(4, layer.in_features)
        with torch.no_grad():
            delta = layer(x) - layer.base_layer(x)
        weight = layer.get_delta_weight("default")
        expected = x @ (weight if layer.fan_in_fan_out else weight.T)
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
        assert delta.abs().max() > 1e-3


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
def test_merge_keeps_the_function_and_unmerge_restores_the_weights(kind, bases, coefficients, gain):
    model = randomise(adapted(kind, bases[kind], coefficients, gain))
    expected = check_merging(model)
    merged = model.merge_and_unload()
    assert not layers(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
@pytest.mark.parametrize("save_basis", [False, True], ids=["reference", "self-contained"])
def test_save_and_load_gives_the_same_logits_and_bytes(kind, bases, coefficients, gain, save_basis, tmp_path):
    model = randomise(adapted(kind, bases[kind], coefficients, gain, save_basis=save_basis))
    check_saved(model, kind, tmp_path)


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
def test_export_gives_the_same_logits_in_stock_lora(kind, bases, coefficients, gain, tmp_path):
    model = randomise(adapted(kind, bases[kind], coefficients, gain))
    expected = logits(model)
    model.save_pretrained(tmp_path / "task")
    from_folder = export_lora(tmp_path / "task", tmp_path / "lora")
    from_model = export_lora(model, tmp_path / "lora-live", pad_to="vllm")
    assert (from_folder.rank, from_model.rank) == (6, 8)
    for folder in ("lora", "lora-live"):
        lora = PeftModel.from_pretrained(kind(), tmp_path / folder).eval()
        assert type(lora.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(logits(lora), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("coefficients", KINDS)
def test_pefts_own_lora_conversion_agrees(kind, bases, coefficients):
    model = randomise(adapted(kind, bases[kind], coefficients))
    config, state = convert_to_lora(model, rank=6)
    lora = get_peft_model(kind(), config)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora.eval()), logits(model), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("coefficients", KINDS)
def test_only_coefficients_train_and_the_gradient_is_the_projected_one(kind, bases, coefficients):
    model = adapted(kind, bases[kind], coefficients)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "subspace_coef" in name
    }
    layer = layers(model)[0]
    x = torch.randn(5, layer.in_features)
    out = layer(x)
    g = torch.randn_like(out)
    (out * g).sum().backward()
    coefficients_ = layer.subspace_coef["default"]
    U, V, s = layer.subspace_U["default"], layer.subspace_V["default"], layer.scaling["default"]
    core_gradient = s * U.T @ (g.T @ x) @ V.T
    if coefficients == "core":
        torch.testing.assert_close(coefficients_.weight.grad, core_gradient, atol=1e-4, rtol=1e-4)
    elif coefficients == "diagonal":
        torch.testing.assert_close(coefficients_.weight.grad, core_gradient.diagonal(), atol=1e-4, rtol=1e-4)
    elif coefficients == "factor":
        torch.testing.assert_close(coefficients_.up.grad, core_gradient @ coefficients_.down.T, atol=1e-4, rtol=1e-4)
    else:
        expected = torch.einsum("moi,oi->m", layer.subspace_G["default"], core_gradient)
        torch.testing.assert_close(coefficients_.weight.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("coefficients", KINDS)
def test_other_dtypes_stay_close_to_float32(kind, bases, coefficients, dtype):
    if dtype is torch.float16 and kind().config.model_type == "gpt2":
        dtype = torch.bfloat16  # CPU has no half-precision addmm for Conv1D on every build
    reference = randomise(adapted(kind, bases[kind], coefficients))
    model = get_peft_model(
        kind().to(dtype), SubspaceConfig(basis=bases[kind], coefficients=coefficients, r=3, alpha=8.0)
    ).eval()
    assert all(p.dtype in (torch.float32, torch.float64) for n, p in model.named_parameters() if "subspace_coef" in n)
    randomise(model)
    out = logits(model)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), logits(reference), atol=0.05, rtol=0.1)
    model.half() if dtype is torch.float16 else model.to(dtype)
    assert {b.dtype for layer in layers(model) for b in layer.subspace_U._buffers.values()} == {dtype}


def test_disabled_is_the_base_bit_for_bit(kind, bases):
    model = randomise(adapted(kind, bases[kind]))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(kind()))
    assert not torch.equal(logits(model), logits(kind()))


def test_several_active_adapters_add_up_and_share_one_basis(kind, bases):
    model = randomise(adapted(kind, bases[kind]))
    one = basis_storage(model)
    for i, coefficients in enumerate(["core", "factor", "diagonal"]):
        model.add_adapter(f"task{i}", SubspaceConfig(basis=bases[kind], coefficients=coefficients, r=3))
    randomise(model)
    assert basis_storage(model) == one
    for change in (lambda m: m.to(torch.float64), lambda m: m.float(), copy.deepcopy, lambda m: m.to("cpu")):
        model = change(model)
        per_number = next(iter(layers(model)[0].subspace_U._buffers.values())).element_size() // 4
        assert basis_storage(model) == one * per_number
    model.base_model.set_adapter(["default", "task0", "task2"])
    for layer in layers(model):
        x = torch.randn(4, layer.in_features)
        delta = sum(layer.get_delta_weight(name) for name in ("default", "task0", "task2"))
        with torch.no_grad():
            torch.testing.assert_close(
                layer(x) - layer.base_layer(x), x @ (delta if layer.fan_in_fan_out else delta.T), atol=1e-5, rtol=1e-4
            )


def test_a_second_basis_never_touches_the_first(kind, bases, fleets, tmp_path):
    from subspace_peft import build_basis

    other = build_basis(fleets[kind][:3], k=6, progress=False)
    first = randomise(adapted(kind, bases[kind], save_basis=True), seed=1)
    second = randomise(adapted(kind, other, save_basis=True), seed=2)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    for low_memory in (False, True):
        model = PeftModel.from_pretrained(kind(), tmp_path / "first", "one")
        model.load_adapter(tmp_path / "second", "two", low_cpu_mem_usage=low_memory)
        for name, expected in (("one", first), ("two", second), ("one", first)):
            model.set_adapter(name)
            assert torch.equal(logits(model.eval()), logits(expected))


@pytest.mark.parametrize("low_memory", [False, True])
def test_self_contained_tasks_on_one_basis_share_it_too(kind, bases, tmp_path, low_memory):
    for seed in (1, 2):
        randomise(adapted(kind, bases[kind], save_basis=True), seed=seed).save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(kind(), tmp_path / "1", "one")
    size = basis_storage(model)
    model.load_adapter(tmp_path / "2", "two", low_cpu_mem_usage=low_memory)
    assert basis_storage(model) == size
    model.set_adapter("two")
    assert torch.equal(logits(model.eval()), logits(randomise(adapted(kind, bases[kind]), seed=2)))


def test_delete_leaves_no_trace(kind, bases):
    model = randomise(adapted(kind, bases[kind]))
    model.add_adapter("gone", SubspaceConfig(basis=bases[kind], mean_gain="fixed"))
    model.delete_adapter("gone")
    for layer in layers(model):
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "gone" not in getattr(layer, name)


def test_scale_methods(kind, bases):
    model = randomise(adapted(kind, bases[kind]))
    layer = layers(model)[0]
    s = layer.scaling["default"]
    layer.set_scale("default", 2.0)
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == pytest.approx(6 * s)
    layer.unscale_layer(3.0)
    assert layer.scaling["default"] == pytest.approx(2 * s)
    layer.unscale_layer()
    assert layer.scaling["default"] == s


def test_merging_is_linear_in_the_cores(kind, bases):
    basis = bases[kind]
    name = next(iter(basis))
    a, b = torch.randn(6, 6), torch.randn(6, 6)
    mixed = basis[name].reconstruct(0.3 * a + 0.7 * b)
    torch.testing.assert_close(
        mixed, 0.3 * basis[name].reconstruct(a) + 0.7 * basis[name].reconstruct(b), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("start", ["zero", "mean", "lora2"])
@pytest.mark.parametrize("gain", GAINS)
def test_starts(kind, bases, start, gain):
    """Start at zero, at the fleet's mean update, or at a source's projection, whatever the gain."""
    model = adapted(kind, bases[kind], "core", gain, start=start)
    basis = bases[kind]
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, SubspaceLayer)]:
        module = basis[basis.find(name.removeprefix("base_model.model."))]
        core = {"zero": torch.zeros(6, 6), "mean": module.M, "lora2": module.cores[2]}[start]
        if start == "zero" and gain == "fixed":
            core = module.M
        delta = layer.get_delta_weight("default")
        expected = module.reconstruct(core)
        torch.testing.assert_close(delta.T if layer.fan_in_fan_out else delta, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("coefficients", KINDS)
def test_one_adam_step_moves_the_update_by_alpha_times_the_learning_rate(kind, bases, coefficients):
    model = adapted(kind, bases[kind], coefficients, alpha=2.0)
    layer = layers(model)[0]
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    logits_ = model(inputs()).logits
    logits_.square().sum().backward()
    if coefficients == "factor":
        # `down` is frozen for the count: with up = 0 its first gradient is zero
        assert layer.subspace_coef["default"].down.grad.abs().max() == 0
    optimiser.step()
    moved = layer.get_delta_weight("default").norm().item()
    assert moved <= 2.0 * 1e-3 * (1 + 1e-4)
    assert moved >= 0.3 * 2.0 * 1e-3


@pytest.mark.parametrize("generated", ["random", "base-weights"])
@pytest.mark.parametrize("coefficients", KINDS)
def test_generated_bases_travel_with_the_task(kind, generated, coefficients, tmp_path):
    from .models import TARGETS

    config = SubspaceConfig(basis=generated, k=4, coefficients=coefficients, target_modules=TARGETS[kind], r=2)
    model = randomise(get_peft_model(kind(), config).eval())
    for layer in layers(model):
        U, V = layer.subspace_U["default"], layer.subspace_V["default"]
        torch.testing.assert_close(U.T @ U, torch.eye(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(V @ V.T, torch.eye(4), atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_k_uses_the_leading_directions(kind, bases):
    model = adapted(kind, bases[kind], k=3)
    layer = layers(model)[0]
    name = next(iter(bases[kind]))
    assert torch.equal(layer.subspace_U["default"], bases[kind][name].U[:, :3])
    assert layer.subspace_coef["default"].weight.shape == (3, 3)


def test_dropout_acts_in_training_only(kind, bases):
    model = randomise(adapted(kind, bases[kind], dropout=0.5))
    layer = layers(model)[0]
    x = torch.randn(64, layer.in_features)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weights(kind, bases):
    model = randomise(adapted(kind, bases[kind]))
    layer = layers(model)[0]
    with torch.no_grad():
        layer.subspace_coef["default"].weight[0, 0] = float("nan")
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


class GivesFloat32(nn.Linear):
    """As layers with quantised weights, under autocast too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@pytest.mark.parametrize("layer", [nn.Linear, GivesFloat32])
def test_gradients_under_autocast_are_those_without_it_rounded(layer):
    torch.manual_seed(0)
    base = nn.Sequential(layer(16, 24), nn.Tanh(), layer(24, 8))
    model = randomise(get_peft_model(base, SubspaceConfig(basis="random", k=4, target_modules=["0", "2"])), std=0.02)
    x = torch.randn(5, 16)
    found = {}
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
            loss = out.float().pow(2).mean()
        assert out.dtype == (torch.bfloat16 if autocast and layer is nn.Linear else torch.float32)
        loss.backward()
        found[autocast] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, value in found[True].items():
        assert value.dtype == torch.float32 and value.abs().max() > 0
        assert (value - found[False][name]).norm() < 0.03 * found[False][name].norm()
