"""LoRAs for llama.cpp: merged by the rules of that format, they give the model that transformers reads out of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from subspace_peft import SubspaceConfig
from subspace_peft.convert import export_gguf
from subspace_peft.errors import BadFileError, BasisMismatchError, SubspaceError

from .models import randomise

gguf = pytest.importorskip("gguf")
X = torch.arange(1, 9)[None]


def llama(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def write_gguf(
    file, model: LlamaForCausalLM, updates: dict[str, np.ndarray] | None = None
) -> dict[str, tuple[int, ...]]:
    """`model` as a GGUF file, its matrices plus `updates`, by the names and in the order of rows of that format."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    shapes = {}
    for key, value in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        for side, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if side in key:
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        shapes[name] = tuple(value.shape)
        writer.add_tensor(name, value.numpy() + (updates or {}).get(name, 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shapes


def read_lora(file) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(str(file))
    facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    bases = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    # llama.cpp's rule: the factors' product times alpha over the rank
    rank = {name: len(tensors[f"{name}.lora_a"]) for name in bases}
    scale = {name: facts["adapter.lora.alpha"] / rank[name] for name in bases}
    return facts, {name: scale[name] * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"] for name in bases}


@pytest.fixture
def task(tmp_path):
    config = SubspaceConfig(
        basis="random", k=3, target_modules="all-linear", rank_pattern={"down_proj": 2}, task_type="CAUSAL_LM"
    )
    model = randomise(get_peft_model(llama(), config), std=0.05).eval()
    model.save_pretrained(tmp_path / "task")
    return model


@pytest.mark.parametrize("source", ["folder", "live"])
def test_a_lora_merged_as_llama_cpp_does_is_our_model(task, tmp_path, source):
    write_gguf(tmp_path / "base.gguf", llama())
    given = tmp_path / "task" if source == "folder" else task
    export_gguf(given, tmp_path / "lora.gguf", tmp_path / "base.gguf")
    facts, updates = read_lora(tmp_path / "lora.gguf")
    assert (facts["general.type"], facts["adapter.type"], facts["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    assert len(updates) == 14
    write_gguf(tmp_path / "merged.gguf", llama(), updates)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, given, base = task(X).logits, merged(X).logits, llama()(X).logits
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)


def test_own_directions_go_along(tmp_path):
    config = SubspaceConfig(
        basis="random",
        k=3,
        target_modules=["q_proj", "down_proj"],
        extra_rank=2,
        extra_rank_pattern={"layers.0.self_attn.q_proj": 0},
        task_type="CAUSAL_LM",
    )
    model = randomise(get_peft_model(llama(), config), std=0.05).eval()
    write_gguf(tmp_path / "base.gguf", llama())
    export_gguf(model, tmp_path / "lora.gguf", tmp_path / "base.gguf")
    facts, updates = read_lora(tmp_path / "lora.gguf")
    assert facts["adapter.lora.alpha"] == 5 and len(updates) == 4
    write_gguf(tmp_path / "merged.gguf", llama(), updates)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(X).logits, model(X).logits, atol=1e-5, rtol=1e-4)
        assert (model(X).logits - llama()(X).logits).abs().max() > 0.01
    # the best approximation of core and own directions together
    export_gguf(model, tmp_path / "cut.gguf", tmp_path / "base.gguf", rank=2)
    _, cut = read_lora(tmp_path / "cut.gguf")
    for name, whole in updates.items():
        S = np.linalg.svd(whole, compute_uv=False)
        assert np.linalg.norm(whole - cut[name]) == pytest.approx(np.linalg.norm(S[2:]), rel=1e-3, abs=1e-5)


def test_a_smaller_rank_is_a_truncation(task, tmp_path):
    write_gguf(tmp_path / "base.gguf", llama())
    for rank in (1, 3):
        export_gguf(task, tmp_path / f"{rank}.gguf", tmp_path / "base.gguf", rank=rank)
    whole, cut = (read_lora(tmp_path / f"{rank}.gguf")[1]["blk.1.ffn_up.weight"] for rank in (3, 1))
    singular = np.linalg.svd(whole, compute_uv=False)
    assert np.linalg.norm(whole - cut) == pytest.approx(np.linalg.norm(singular[1:]), rel=1e-4)


def test_what_llama_cpp_cannot_hold_or_is_another_model_is_refused(task, tmp_path):
    out, base = tmp_path / "lora.gguf", tmp_path / "base.gguf"
    write_gguf(base, llama(intermediate_size=40))
    with pytest.raises(BasisMismatchError, match="base model that the task was trained on"):
        export_gguf(task, out, base)
    write_gguf(base, llama(num_hidden_layers=1))
    with pytest.raises(BasisMismatchError, match=r"layers\.1"):
        export_gguf(task, out, base)
    writer = gguf.GGUFWriter(str(base), "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SubspaceError, match=r"'gemma'.*convert_lora_to_gguf"):
        export_gguf(task, out, base)
    for data in (b"", b"GGUF", b"no such format" * 100):
        base.write_bytes(data)
        with pytest.raises(BadFileError, match="not a GGUF file"):
            export_gguf(task, out, base)
    config = SubspaceConfig(basis="random", k=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(SubspaceError, match="lm_head"):
        export_gguf(get_peft_model(llama(), config), out, base)
    with pytest.raises(SubspaceError, match="rank=0"):
        export_gguf(task, out, base, rank=0)
    assert not out.exists()
