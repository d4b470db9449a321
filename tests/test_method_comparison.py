"""The experiments for PEFT's method comparison: PEFT's own code reads them, and they train what their table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from subspace_peft import SubspaceConfig

ROOT = Path(__file__).parent.parent / "benchmarks" / "method_comparison" / "MetaMathQA" / "experiments"
TRAINED = {"llama-3.2-3B-core-k16": 14_336, "llama-3.2-3B-core-k48": 129_024}
# the fields of `TrainConfig` in method_comparison/MetaMathQA/utils.py of huggingface/peft, commit 0134244
TRAIN_CONFIG = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile", "use_gc",
    "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp",
    "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip


def test_every_experiment_is_in_the_table():
    # three parts, experiments/<method>/<name>: PEFT's benchmark refuses anything else
    assert {folder.name for folder in (ROOT / "subspace").iterdir()} == set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_pefts_code_reads_it_and_it_trains_what_the_table_says(name):
    folder = ROOT / "subspace" / name
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "training_params.json"}
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, SubspaceConfig)
    assert not config.loaded
    shape = LlamaConfig(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
        intermediate_size=8192, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        base = LlamaForCausalLM(shape)
    model = get_peft_model(base, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TRAINED[name]


@pytest.mark.parametrize("name", TRAINED)
def test_the_training_parameters_are_ones_that_the_benchmark_knows(name):
    given = json.loads((ROOT / "subspace" / name / "training_params.json").read_text())
    assert set(given) <= TRAIN_CONFIG
    # its optimizer is torch.optim.AdamW(parameters, **optimizer_kwargs)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **given["optimizer_kwargs"])
