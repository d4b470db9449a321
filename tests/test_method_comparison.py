"""The experiments for PEFT's method comparison: PEFT's own code reads them, and they train what their table says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from subspace_peft import SubspaceConfig

from . import fresh

ROOT = Path(__file__).parent.parent / "benchmarks" / "method_comparison" / "MetaMathQA" / "experiments"
TRAINED = {"llama-3.2-3B-core-k16": 14_336, "llama-3.2-3B-core-k48": 129_024}
K = {"llama-3.2-3B-core-k16": 16, "llama-3.2-3B-core-k48": 48}
# the fields of `TrainConfig` in method_comparison/MetaMathQA/utils.py of huggingface/peft, commit 0134244
TRAIN_CONFIG = {
    "model_id",
    "dtype",
    "max_seq_length",
    "batch_size",
    "batch_size_eval",
    "max_steps",
    "eval_steps",
    "compile",
    "use_gc",
    "query_template",
    "seed",
    "grad_norm_clip",
    "optimizer_type",
    "optimizer_kwargs",
    "lr_scheduler",
    "use_amp",
    "autocast_adapter_dtype",
    "generation_kwargs",
    "attn_implementation",
    "init_kv_cache_prefix",
}


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
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=128256,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(shape)
    model = get_peft_model(base, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TRAINED[name]


@pytest.mark.parametrize("name", TRAINED)
def test_it_is_what_save_pretrained_writes_for_an_untrained_configuration(name, tmp_path):
    # fields younger than the file may be absent from it, which counts as their default; peft_version is that of the
    # writer
    fresh = SubspaceConfig(basis="random", k=K[name], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    fresh.save_pretrained(str(tmp_path))
    written, given = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, ROOT / "subspace" / name)
    )
    assert given["peft_type"] == "SUBSPACE" and given["subspace_version"] is None
    assert set(given) <= set(written)
    read = PeftConfig.from_pretrained(str(ROOT / "subspace" / name))
    assert {**read.to_dict(), "peft_version": None} == {**fresh.to_dict(), "peft_version": None}


@pytest.mark.parametrize("name", TRAINED)
def test_the_training_parameters_are_ones_that_the_benchmark_knows(name):
    given = json.loads((ROOT / "subspace" / name / "training_params.json").read_text())
    assert set(given) <= TRAIN_CONFIG
    # its optimizer is torch.optim.AdamW(parameters, **optimizer_kwargs)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **given["optimizer_kwargs"])


@pytest.mark.parametrize("name", TRAINED)
def test_the_benchmarks_own_sequence_runs_on_a_narrow_model(name, tmp_path):
    # get_model, get_optimizer_and_scheduler, one step of train, get_file_size and log_results of that commit, on a CPU
    torch.manual_seed(0)
    narrow = LlamaConfig(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        intermediate_size=64,
        vocab_size=50,
    )
    config = PeftConfig.from_pretrained(str(ROOT / "subspace" / name))
    model = get_peft_model(LlamaForCausalLM(narrow).to(torch.bfloat16), config, autocast_adapter_dtype=True)
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * K[name] ** 2
    given = json.loads((ROOT / "subspace" / name / "training_params.json").read_text())
    optimizer = torch.optim.AdamW(model.parameters(), **given["optimizer_kwargs"])
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    ids = torch.arange(12).reshape(2, 6)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, num_items_in_batch=12).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert torch.isfinite(loss)
    for key, value in model.named_parameters():
        assert value.requires_grad != torch.equal(value, before[key]), key
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 4 * model.get_nb_trainable_parameters()[0]
    json.dumps(config.to_dict())


def test_the_readmes_command_lets_a_script_of_the_benchmarks_form_resolve_it(tmp_path):
    shutil.copytree(ROOT / "subspace", tmp_path / "experiments" / "subspace")
    (tmp_path / "utils.py").write_text("from peft import PeftConfig\n")
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from utils import PeftConfig\n"
        "assert sys.argv[1] == '-v'\n"
        "print(PeftConfig.from_pretrained(sys.argv[2]).peft_type.value)\n"
    )
    rest = ["run.py", "-v", "experiments/subspace/llama-3.2-3B-core-k48"]
    done = fresh.run("-m", "subspace_peft", "run", *rest, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "SUBSPACE"), done.stderr
