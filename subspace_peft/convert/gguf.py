"""Export a task as a LoRA file of llama.cpp (GGUF), for a base model in that format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from .._io.atomic import write_aside
from .._io.occupied import GGUF, GGUF_MARK
from ..basis import SubspaceBasis
from ..basis.overwriting import Planned, check_target, replacing
from ..errors import BadFileError, BasisMismatchError, SubspaceError
from ..tasks.read import read_task
from .factored import task_factors

ROTATED = re.compile(r"blk\.\d+\.attn_(q|k)\.weight")


def export_gguf(
    task: Any,
    out: str | Path,
    base: str | Path,
    *,
    adapter_name: str | None = None,
    basis: SubspaceBasis | str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    **hub: Any,
) -> Path:
    """Write a task as a LoRA that llama.cpp applies to the base model `base`, exact and in float32.

    llama.cpp keeps the rows of a Llama's query and key weights in another order than transformers, and so does its
    LoRA.

    Args:
        task: Folder or Hub id of a saved task, or a live PeftModel, exported at its configured scale.
        out: The ``.gguf`` file to write.
        base: The base model as a GGUF file, of any quantisation. Its architecture, heads and shapes are read from it.
            Of llama.cpp's architectures ``llama`` is supported: the Llama and Mistral classes of transformers.
        adapter_name: The adapter of a live model; the active one by default.
        basis: The basis, its folder or its Hub id; by default the place that the task's config names.
        rank: Highest rank, reached by truncation; None keeps all.
        overwrite: Replace another file. An earlier export from the same basis is replaced in any case.
        **hub: `revision`, `token`, `cache_dir` and `subfolder` of a task on the Hub.

    Returns:
        The file.

    Raises:
        SubspaceError: The package `gguf` is missing, the architecture is another one, the rank is out of range, or the
            task has trained modules that a LoRA of llama.cpp cannot hold.
        BadFileError: `base` is not a GGUF file of a model.
        BasisMismatchError: The base model lacks a module, or has it in another shape.
        OSError: The disk refuses; an earlier file stays.
    """
    try:
        import gguf
    except ImportError as error:
        raise SubspaceError("Writing GGUF needs the package gguf: pip install 'subspace-peft[gguf]'.") from error
    if rank is not None and rank < 1:
        raise SubspaceError(f"rank={rank}: give at least 1.")
    read = read_task(task, adapter_name=adapter_name, basis=basis, **hub)
    planned = Planned(GGUF, read.config.basis_fingerprint)
    check_target(out, planned, overwrite=overwrite, inputs=[task], needed=[base])
    if read.extras or read.config.weight_shapes:
        name = sorted(read.extras or read.config.weight_shapes or ())[0]
        raise SubspaceError(
            f"{task}: the task has trained {name} as well, which is not the update of a linear layer. Train it"
            " without, or export it with export_lora."
        )
    facts, shapes = _read_base(gguf, Path(base))
    heads = {"q": facts["llama.attention.head_count"], "k": facts["llama.attention.head_count_kv"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, facts["llama.block_count"])
    tensors: dict[str, torch.Tensor] = {}
    r = 0
    for module in read.cores:
        B, A, *_ = task_factors(read, module, rank)
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name not in shapes or shapes[name] != (len(B), A.shape[1]):
            raise BasisMismatchError(
                f"{base}: module {module!r} of shape {(len(B), A.shape[1])} is {name} there, of shape"
                f" {shapes.get(name)}. Pass the GGUF file of the base model that the task was trained on."
            )
        if found := ROTATED.fullmatch(str(name)):
            B = _rotary_order(B, heads[found[1]])
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A, B
        r = max(r, len(A))

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp scales by alpha over the rank, which is one for all modules only once they are filled up
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(r))
        for key, value in tensors.items():
            fill = r - (value.shape[0] if key.endswith("a") else value.shape[1])
            padded = torch.nn.functional.pad(value, (0, 0, 0, fill) if key.endswith("a") else (0, fill))
            writer.add_tensor(key, padded.float().contiguous().numpy())
        if planned.basis is not None:
            writer.add_string(GGUF_MARK, planned.basis)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    with replacing(out, planned, overwrite=overwrite, needed=[base]):
        write_aside(Path(out), write)
    return Path(out)


def _read_base(gguf: Any, base: Path) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Return the sizes of the model in a GGUF file, and the shapes of its matrices, (out, in)."""
    try:
        reader = gguf.GGUFReader(str(base))
        architecture = str(reader.fields["general.architecture"].contents())
        if architecture != "llama":
            raise SubspaceError(
                f"{base}: its architecture is {architecture!r}; supported is 'llama'. Write a LoRA with `export_lora`,"
                " and convert it by llama.cpp's own convert_lora_to_gguf.py."
            )
        keys = ("llama.block_count", "llama.attention.head_count", "llama.attention.head_count_kv")
        facts = {key: int(reader.fields[key].contents()) for key in keys}
        shapes = {t.name: (int(t.shape[1]), int(t.shape[0])) for t in reader.tensors if len(t.shape) == 2}
    except SubspaceError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadFileError(
            f"{base}: not a GGUF file of a model ({type(error).__name__}: {error}). Pass the base model's .gguf file."
        ) from error
    return facts, shapes


def _rotary_order(B: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows of (heads · d, r) from transformers' order of rotated pairs to llama.cpp's.

    transformers keeps the first members of a head's pairs before the second ones, llama.cpp each pair side by side.
    """
    if heads < 1 or len(B) % (2 * heads):
        raise BadFileError(f"{len(B)} rows cannot be those of {heads} heads. Pass the base model's .gguf file.")
    return B.view(heads, 2, len(B) // heads // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
