"""Identities of a task's own directions, `extra_rank`: a table over layer kind × coefficients × mean gain × φ."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import SubspaceConfig, SubspaceError
from subspace_peft.errors import BadFileError, BasisMismatchError
from subspace_peft.tasks.read import read_task
from subspace_peft.tasks.write import core_tensors, own_tensors_of, write_task
from subspace_peft.tuner.coefficients import KINDS
from subspace_peft.tuner.own_directions import own_tensors, own_units, own_update

from .models import check_merging, check_saved, inputs, layers, logits, randomise

TABLE = [*itertools.product([kind for kind in KINDS if kind != "none"], ["none", "fixed"]), ("none", "trainable")]


def adapted(make, basis, coefficients="core", mean_gain="none", **config):
    given = {"r": 3, "alpha": 8.0, "extra_rank": 2, **config}
    wanted = SubspaceConfig(basis=basis, coefficients=coefficients, mean_gain=mean_gain, **given)
    return get_peft_model(make(), wanted).eval()


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
def test_the_start_has_no_effect_and_both_sides_learn(kind, bases, coefficients, gain):
    torch.manual_seed(0)
    model = adapted(kind, bases[kind], coefficients, gain, alpha=256.0)
    plain = adapted(kind, bases[kind], coefficients, gain, alpha=256.0, extra_rank=0)
    torch.testing.assert_close(logits(model), logits(plain))
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".extra_" in name}
    for layer in layers(model):
        own = layer.subspace_coef["default"]
        # orthogonal to the basis and to one another, of one norm
        v, V = own.extra_V.detach(), layer.subspace_V["default"]
        torch.testing.assert_close(v @ v.T, layer.own_units(256.0).norm ** 2 * torch.eye(2), atol=1e-4, rtol=1e-4)
        assert (v @ V.T).abs().max() < 1e-5 and not own.extra_U.any()
    for _ in range(2):
        optimiser.zero_grad()
        model(inputs()).logits.square().sum().backward()
        optimiser.step()
    assert len(before) == 2 * len(layers(model))
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
def test_delta_is_the_cores_plus_its_own(kind, bases, coefficients, gain):
    model = randomise(adapted(kind, bases[kind], coefficients, gain))
    for layer in layers(model):
        x = torch.randn(4, layer.in_features)
        with torch.no_grad():
            delta = layer(x) - layer.base_layer(x)
            core = layer._core("default") * layer.scaling["default"]
        own = layer.subspace_coef["default"]
        part = layer.own_units(8.0).scale * own.extra_U @ own.extra_V
        dense = layer.subspace_U["default"] @ core @ layer.subspace_V["default"] + part
        weight = layer.get_delta_weight("default")
        torch.testing.assert_close(weight.T if layer.fan_in_fan_out else weight, dense, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(delta, x @ dense.T, atol=1e-5, rtol=1e-4)
        B, A = layer.own_part("default")
        torch.testing.assert_close(B @ A, part)
        assert (B @ A).abs().max() > 1e-6


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
def test_merge_and_unmerge(kind, bases, coefficients, gain):
    model = randomise(adapted(kind, bases[kind], coefficients, gain))
    check_merging(model)


@pytest.mark.parametrize(("coefficients", "gain"), TABLE)
@pytest.mark.parametrize("save_basis", [False, True], ids=["reference", "self-contained"])
def test_saved_and_loaded_it_is_the_same_task(kind, bases, coefficients, gain, save_basis, tmp_path):
    model = randomise(adapted(kind, bases[kind], coefficients, gain, save_basis=save_basis))
    check_saved(model, kind, tmp_path)
    task = read_task(tmp_path / "a")
    for layer in layers(model):
        B, A = task.own[layer.key]
        core = task.modules[layer.key].U.double() @ task.cores[layer.key] @ task.modules[layer.key].V.double()
        weight = layer.get_delta_weight("default")
        torch.testing.assert_close(
            (core + B @ A).float(), weight.T if layer.fan_in_fan_out else weight, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("save_basis", [False, True], ids=["reference", "self-contained"])
def test_a_new_task_of_a_saved_configuration_learns_its_own_directions(kind, bases, save_basis, tmp_path):
    randomise(adapted(kind, bases[kind], save_basis=save_basis)).save_pretrained(tmp_path / "a")
    config = SubspaceConfig.from_pretrained(tmp_path / "a")
    config.inference_mode = False
    if save_basis:
        # the basis comes with the first task; its configuration makes a second one
        model = PeftModel.from_pretrained(kind(), tmp_path / "a")
        model.add_adapter("new", config)
        model.set_adapter("new")
    else:
        model = get_peft_model(kind(), config)
    name = model.active_adapter
    assert torch.equal(logits(model.eval()), logits(kind()))
    for layer in layers(model):
        own, V = layer.subspace_coef[name], layer.subspace_V[name]
        assert not own.extra_U.any() and (own.extra_V @ V.T).abs().max() < 1e-5
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if f".subspace_coef.{name}." in n}
    for _ in range(2):
        optimiser.zero_grad()
        model(inputs()).logits.square().sum().backward()
        optimiser.step()
    now = dict(model.named_parameters())
    assert before and all(not torch.equal(now[n], value) for n, value in before.items())


def test_a_task_read_and_written_again_computes_the_same(kind, bases, tmp_path):
    model = randomise(adapted(kind, bases[kind]))
    model.save_pretrained(tmp_path / "a")
    task = read_task(tmp_path / "a")
    tensors = {**core_tensors(task.config, task.cores), **own_tensors_of(task.config, task.own), **task.extras}
    write_task(tmp_path / "b", task.config, tensors)
    again = PeftModel.from_pretrained(kind(), tmp_path / "b").eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_factors_are_stored_in_the_gauge_of_a_start(rank, embedding):
    torch.manual_seed(0)
    B, A = torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    units = own_units(100.0, 9, 7, embedding=embedding)
    made = own_tensors(B, A, rank, units)
    u, v = own_update(made["extra_U"], made["extra_V"], units)
    P, S, T = torch.linalg.svd(B @ A, full_matrices=False)
    best = (P[:, :rank] * S[:rank]) @ T[:rank]
    torch.testing.assert_close(u @ v, best, atol=1e-5, rtol=1e-5)
    side = made["extra_U"].T if embedding else made["extra_V"]
    torch.testing.assert_close(side @ side.T, units.norm**2 * torch.eye(rank), atol=1e-4, rtol=1e-5)
    assert tuple(made["extra_U"].shape) == (9, rank) and made["extra_V"].dtype == torch.float32


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("sizes", [(384, 384), (4096, 4096), (11008, 4096), (96, 27)])
def test_one_rate_moves_them_as_far_at_any_alpha_and_width(sizes, embedding):
    (out, inner), usual = sizes, own_units(256.0, 384, 384)
    for alpha in (1.0, 64.0, 256.0, 1000.0):
        units, rate = own_units(alpha, out, inner, embedding=embedding), 256.0 / alpha
        drawn, moved = (out, out) if embedding else (inner, out)
        # a step of the side at zero moves ΔW, and one of the other side turns it, by a multiple of the rate
        step = units.scale * units.norm * rate * moved**0.5
        assert step == pytest.approx(usual.scale * usual.norm * 384**0.5)
        assert rate * drawn**0.5 / units.norm == pytest.approx(384**0.5 / usual.norm)


def test_the_scale_that_saved_tasks_rely_on_stays():
    # a task's file holds u and v alone: another scale would change what every saved one computes
    assert own_units(256.0, 384, 384).scale == 4.0 and own_units(128.0, 384, 384).scale == 1.0
    assert own_units(256.0, 768, 3072).scale == 1.0
    assert own_units(256.0, 768, 30_000, embedding=True).scale == 2.0


def test_patterns_say_which_modules_have_them(kind, bases, tmp_path):
    names = [layer.key for layer in layers(adapted(kind, bases[kind]))]
    model = randomise(adapted(kind, bases[kind], extra_rank=0, extra_rank_pattern={names[0]: 3}))
    assert [layer.extra_rank["default"] for layer in layers(model)] == [3] + [0] * (len(names) - 1)
    model.save_pretrained(tmp_path)
    assert sum("extra_" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 2
    assert torch.equal(logits(PeftModel.from_pretrained(kind(), tmp_path).eval()), logits(model))
    assert list(read_task(tmp_path).own) == [names[0]]
    without = adapted(kind, bases[kind], extra_rank=1, extra_rank_pattern={names[0]: 0})
    assert [layer.extra_rank["default"] for layer in layers(without)] == [0] + [1] * (len(names) - 1)


def test_no_more_directions_than_fit(kind, bases):
    model = adapted(kind, bases[kind], extra_rank=10_000)
    for layer in layers(model):
        assert layer.extra_rank["default"] == min(layer.in_features, layer.out_features)


def test_a_task_without_them_is_saved_as_before(kind, bases, tmp_path):
    model = adapted(kind, bases[kind], extra_rank=0)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "extra_rank" not in saved and "extra_rank_pattern" not in saved
    assert not any("extra_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_scale_scales_them_along(kind, bases):
    model = randomise(adapted(kind, bases[kind]))
    full = [layer.get_delta_weight("default") for layer in layers(model)]
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    for layer, delta in zip(layers(model), full, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)
        x = torch.randn(3, layer.in_features)
        with torch.no_grad():
            moved = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(
            moved, x @ (0.5 * delta if layer.fan_in_fan_out else 0.5 * delta.T), atol=1e-5, rtol=1e-4
        )


def test_several_adapters_with_and_without_them_add_up(kind, bases):
    model = adapted(kind, bases[kind])
    model.add_adapter("plain", SubspaceConfig(basis=bases[kind], alpha=8.0))
    model.add_adapter("wide", SubspaceConfig(basis=bases[kind], alpha=8.0, extra_rank=3))
    randomise(model)
    names = ["default", "plain", "wide"]
    model.base_model.set_adapter(names)
    for layer in layers(model):
        x = torch.randn(4, layer.in_features)
        delta = sum(layer.get_delta_weight(name) for name in names)
        with torch.no_grad():
            moved = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(moved, x @ (delta if layer.fan_in_fan_out else delta.T), atol=1e-5, rtol=1e-4)
    model.delete_adapter("wide")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(kind()))


class Convolved(nn.Module):
    """An embedding, a strided convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.conv, self.last = nn.Embedding(50, 12), nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.Linear(12, 5)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.words(tokens)).mean() + self.conv(image).square().mean((1, 2, 3)).mean()


@pytest.mark.parametrize("coefficients", ["core", "factor", "diagonal"])
def test_embeddings_and_convolutions(coefficients, tmp_path):
    torch.manual_seed(1)
    config = SubspaceConfig(
        basis="random", k=3, target_modules=["words", "conv", "last"], coefficients=coefficients, extra_rank=2
    )
    model = get_peft_model(Convolved(), config)
    tokens, image = torch.randint(0, 50, (4, 7)), torch.randn(2, 3, 8, 8)
    words = model.base_model.model.words.subspace_coef["default"]
    assert words.extra_U.abs().min() > 0 and not words.extra_V.any()
    assert torch.equal(model(tokens, image), Convolved()(tokens, image))
    model(tokens, image).backward()
    assert words.extra_V.grad.abs().max() > 0
    assert model.base_model.model.conv.subspace_coef["default"].extra_U.grad is not None
    randomise(model)
    for name, x in (("words", tokens), ("conv", image), ("last", torch.randn(3, 12))):
        layer = getattr(model.base_model.model, name)
        dense = Convolved()
        getattr(dense, name).weight.data += layer.get_delta_weight("default")
        with torch.no_grad():
            torch.testing.assert_close(layer(x), getattr(dense, name)(x), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        expected = model(tokens, image)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Convolved(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens, image), expected)
        torch.testing.assert_close(again.merge_and_unload()(tokens, image), expected)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (None, r"lacks the embedding 'words': .*add 'words': .50, 12."),
        ("no such field", "lacks the embedding 'words'"),
        ({"conv": [6, 3, 3, 3]}, "lacks the embedding 'words'"),
        ({"words": [50, 12], "last": [5, 12]}, "calls 'last' an embedding, which it is not: .* leave 'last' out"),
    ],
)
def test_a_saved_task_that_does_not_name_its_embeddings_is_refused(shapes, said, tmp_path):
    """Own directions of an embedding have units of their own, which nothing else in the file tells."""
    config = SubspaceConfig(basis="random", k=3, target_modules=["words", "conv", "last"], extra_rank=2)
    model = randomise(get_peft_model(Convolved(), config))
    # filled in, for a configuration that is written by hand
    assert config.weight_shapes == {"words": [50, 12], "conv": [6, 3, 3, 3]}
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = {**json.loads(file.read_text()), "weight_shapes": shapes}
    if isinstance(shapes, str):
        del values["weight_shapes"]
    file.write_text(json.dumps(values))
    with pytest.raises(BasisMismatchError, match=said):
        PeftModel.from_pretrained(Convolved(), tmp_path)
    # without own directions there is nothing to tell, as in files of versions that did not know them
    plain = {**values, "extra_rank": 0}
    file.write_text(json.dumps({**plain, "weight_shapes": None}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".extra_" not in k}, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(Convolved(), tmp_path)
    assert loaded.peft_config["default"].weight_shapes == {"words": [50, 12], "conv": [6, 3, 3, 3]}


def test_an_embeddings_own_directions_are_read_as_the_model_has_them(tmp_path):
    config = SubspaceConfig(basis="random", k=3, target_modules=["words", "conv", "last"], extra_rank=2, alpha=8.0)
    model = randomise(get_peft_model(Convolved(), config))
    model.save_pretrained(tmp_path)
    task = read_task(tmp_path)
    for name in ("words", "conv", "last"):
        layer = getattr(model.base_model.model, name)
        B, A = task.own[name]
        for one, other in zip(layer.own_part("default"), (B, A), strict=True):
            torch.testing.assert_close(one, other.float())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"extra_rank": -1}, "extra_rank=-1: give a whole number from 0"),
        ({"extra_rank": 1.5}, "extra_rank=1.5: give a whole number"),
        ({"extra_rank": True}, "extra_rank=True: give a whole number"),
        ({"extra_rank_pattern": {"query": -1}}, r"extra_rank_pattern\['query'\]=-1: give a whole number"),
        ({"extra_rank_pattern": {"(": 1}}, "extra_rank_pattern"),
        ({"extra_rank_pattern": 2}, "give a dict"),
    ],
)
def test_wrong_values_are_named(wrong, says):
    with pytest.raises(SubspaceError, match=says):
        SubspaceConfig(basis="random", **wrong)


@pytest.fixture
def saved(kind, bases, tmp_path):
    model = randomise(adapted(kind, bases[kind]))
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda t, k: t[k].view(-1).__setitem__(0, float("nan")), BadFileError, "NaN or infinite"),
        (lambda t, k: t.pop(k), BasisMismatchError, "with extra_rank=2"),
        (lambda t, k: t.__setitem__(k, t[k][:1].contiguous()), BasisMismatchError, "with extra_rank=2"),
        (lambda t, k: t.__setitem__(k.replace("extra_V", "extra_W"), t.pop(k)), BasisMismatchError, "extra_rank=2"),
    ],
    ids=["nan", "one side missing", "wrong size", "unknown name"],
)
def test_damaged_files_are_refused(kind, saved, damage, error, says):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors, next(key for key in tensors if key.endswith("extra_V")))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(error, match=says):
        PeftModel.from_pretrained(kind(), saved)


def test_a_config_that_does_not_know_of_them_is_refused(kind, saved):
    file = saved / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["extra_rank"]
    file.write_text(json.dumps(config))
    with pytest.raises(BasisMismatchError, match="extra_U"):
        PeftModel.from_pretrained(kind(), saved)


def test_mixed_with_a_lora(kind, bases):
    from peft import PeftMixedModel

    model = PeftMixedModel(kind(), SubspaceConfig(basis=bases[kind], extra_rank=1, alpha=8.0), "own")
    model.add_adapter("lora", LoraConfig(target_modules=model.peft_config["own"].target_modules))
    model.set_adapter(["own", "lora"])
    randomise(model)
    model.eval()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_what_has_no_effect_is_said(kind, bases):
    names = [layer.key for layer in layers(adapted(kind, bases[kind]))]
    for given, says in (
        ({"extra_rank": 10_000}, "extra_rank=10000: .* has no more than"),
        ({"extra_rank_pattern": {"nowhere": 1}}, "no adapted module is called nowhere"),
        ({"extra_rank": 2, "extra_rank_pattern": dict.fromkeys(names, 1)}, "extra_rank=2 has no effect"),
    ):
        with pytest.warns(UserWarning, match=says):
            adapted(kind, bases[kind], **given)
