"""What recipes leave behind between their stages, and the models they train."""

from __future__ import annotations

import math

import common as shared
import pytest
import torch
from transformers import AutoModel, BertConfig, RobertaConfig

from subspace_peft.errors import SubspaceError


def test_markers_hold_for_the_same_settings_only(tmp_path):
    shared.finish(tmp_path, {"rate": 1e-3, "layers": (1, 2)}, {"validation": 0.5})
    assert shared.finished(tmp_path, {"layers": [1, 2], "rate": 1e-3}) == {"validation": 0.5}
    assert shared.finished(tmp_path, {"rate": 2e-3, "layers": [1, 2]}) is None
    (tmp_path / "recipe.json").write_text("{")
    assert shared.finished(tmp_path, {"rate": 1e-3, "layers": [1, 2]}) is None


def test_the_last_complete_checkpoint_is_taken(tmp_path):
    assert shared.last_checkpoint(tmp_path / "none") is None
    for step, complete in ((8, True), (16, True), (104, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert shared.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")


def test_a_diverged_adapter_is_not_saved(tmp_path):
    with pytest.raises(SubspaceError, match="diverged"):
        shared.save_finished(None, tmp_path / "a", {}, {"validation": math.nan})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
@pytest.mark.parametrize("classes", [3, 1])
def test_mean_pooling_leaves_padding_out(config, classes):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 100,
    }
    encoder = AutoModel.from_config(config(**shape, num_labels=classes, max_position_embeddings=40))
    model = shared.MeanPooledClassifier(encoder).eval()
    ids = torch.randint(5, 100, (2, 7))
    padded = torch.cat([ids, torch.full((2, 3), encoder.config.pad_token_id)], dim=1)
    mask = (torch.arange(10) < 7).long().expand(2, 10)
    labels = torch.tensor([0.5, 2.0]) if classes == 1 else torch.tensor([0, 2])
    out = model(input_ids=padded, attention_mask=mask, labels=labels, output_attentions=None, return_dict=True)
    torch.testing.assert_close(out.logits, model(input_ids=ids).logits)
    assert out.logits.shape == (2, classes) and out.loss.ndim == 0
    assert any(name.startswith(f"{encoder.base_model_prefix}.encoder.layer.0.") for name, _ in model.named_modules())
