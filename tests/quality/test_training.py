"""The encoder, the loop, the measure, and the texts' splits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from offline.texts import Row, TextTask
from peft import get_peft_model

from benchmarks.quality.encoder import BERT_NAMES, VIT_NAMES, Head, Top, block_state
from benchmarks.quality.rows import lora
from benchmarks.quality.tasks import split_texts
from benchmarks.quality.training import Budget, make_model, measure, outputs_of, pooled, score, train
from subspace_peft.errors import SubspaceError

from .conftest import INNER, SMALL, D, top_of, toy


def test_measure_is_accuracy_or_spearmans_correlation():
    from scipy.stats import spearmanr

    a = torch.tensor([[3.0], [1.0], [1.0], [5.0], [2.0]])
    b = torch.tensor([1.0, 0.0, 2.0, 2.0, 2.0])
    assert measure(a, b) == pytest.approx(float(spearmanr(a[:, 0], b).statistic))
    assert measure(torch.zeros(3, 1), torch.tensor([1.0, 2.0, 3.0])) == 0.0
    assert measure(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])) == 0.5
    assert np.isnan(measure(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0])))


# -- the encoder
# --------------------------------------------------------------------------------------------------------


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
    full, half = (Top(**top_of(), outputs=2, seed=0, half=half) for half in (False, True))
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


def test_gradients_are_cut_to_the_norm_that_is_given(bench):
    task, top, plain = toy("one"), top_of(), torch.optim.SGD
    norms = []
    for clip in (0.0, 1e-9):
        model = get_peft_model(make_model(top, 2, 0), lora(2).adapter())
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "AdamW", lambda groups, **_: plain(groups, lr=1.0))
            train(model, task, replace(SMALL, clip=clip), 1.0, 1, curve=False)
        after = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        norms.append(float((after - before).norm()))
    assert norms[1] <= SMALL.steps * 1e-9 * 1.01 < norms[0]


def test_texts_of_one_document_are_in_one_split():
    rows = [Row(f"text number {i} of {i // 5}", str(i % 2), f"document {i // 5}") for i in range(100)]
    parts = split_texts(TextTask("t", "", rows), {"train": 50, "validation": 15, "test": 20}, 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 50, "validation": 15, "test": 20}
    seen = [{row.document for row in part} for part in parts.values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    with pytest.raises(SubspaceError, match="too few"):
        split_texts(TextTask("t", "", rows), {"train": 90, "test": 20}, 0)
