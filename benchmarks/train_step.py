"""What one training step costs beside the frozen base: LoRA, VeRA, TinyLoRA, and coefficients in a basis.

    python benchmarks/train_step.py                # encoder and decoder, query and value, and all linear layers
    python benchmarks/train_step.py --rounds 5 --only encoder
    python benchmarks/train_step.py --own          # cores with own directions beside LoRAs of ranks 1 to 8

One process, one thread by default; every contender once per round in random order. The floor is the base model,
frozen, with gradients flowing to its inputs. Prints ratios to it, median and quartiles over rounds, and the bytes that
autograd keeps beyond the floor's. Writes JSON and a Markdown table to benchmarks/results/: train_step, or
train_step_own with `--own`.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TinyLoraConfig, VeraConfig, get_peft_model
from timing import paired, peak_bytes, ratios, saved_bytes, write
from torch import nn
from transformers import BertConfig, BertModel, MistralConfig, MistralModel

from subspace_peft import SubspaceConfig

WHERE = {
    "encoder": {"query, value": ["query", "value"], "all linear": "all-linear"},
    "decoder": {"query, value": ["q_proj", "v_proj"], "all linear": "all-linear"},
}


def encoder() -> nn.Module:
    return BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        add_pooling_layer=False,
    )


def decoder() -> nn.Module:
    return MistralModel(
        MistralConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=4096,
            sliding_window=None,
        )
    )


def contenders(targets: Any, k: int) -> dict[str, Callable[[], PeftConfig]]:
    basis = {"basis": "random", "k": k, "target_modules": targets, "save_basis": True}
    return {
        "LoRA r=8": lambda: LoraConfig(r=8, target_modules=targets),
        "LoRA r=16": lambda: LoraConfig(r=16, target_modules=targets),
        "VeRA r=256": lambda: VeraConfig(r=256, target_modules=targets, save_projection=False),
        "TinyLoRA r=2": lambda: TinyLoraConfig(r=2, target_modules=targets),
        "core": lambda: SubspaceConfig(**basis),
        "factor r=8": lambda: SubspaceConfig(coefficients="factor", r=8, **basis),
        "diagonal": lambda: SubspaceConfig(coefficients="diagonal", **basis),
        "directions": lambda: SubspaceConfig(coefficients="directions", **basis),
    }


def own_contenders(targets: Any, k: int) -> dict[str, Callable[[], PeftConfig]]:
    """Return the core alone and with directions of the task's own, beside LoRAs of few directions."""
    basis = {"basis": "random", "k": k, "target_modules": targets, "save_basis": True}
    loras = {f"LoRA r={r}": lambda r=r: LoraConfig(r=r, target_modules=targets) for r in (1, 2, 4, 8)}
    cores = {
        f"core + {count} own" if count else "core": lambda count=count: SubspaceConfig(extra_rank=count, **basis)
        for count in (0, 1, 2, 4)
    }
    return {**loras, **cores}


def frozen_copy(base: nn.Module) -> nn.Module:
    """Return a copy whose weights are the very ones of `base`, so that many contenders take the memory of one."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def measure(
    kind: str,
    rows: Mapping[str, Callable[[], PeftConfig]],
    rounds: int,
    batch: int,
    tokens: int,
    *,
    base: nn.Module | None = None,
) -> dict[str, dict[str, Any]]:
    """Time a step of every row beside the frozen base, and measure its memory.

    Args:
        kind: ``encoder`` or ``decoder``.
        rows: name → makes the adapter's configuration.
        rounds, batch, tokens: rounds of timing; sequences and their length.
        base: another base model than the small one of that kind, on the device and in the precision to measure in.
    """
    torch.manual_seed(0)
    base = {"encoder": encoder, "decoder": decoder}[kind]() if base is None else base
    base = base.requires_grad_(False).train()
    embeddings = torch.randn(batch, tokens, base.config.hidden_size, device=base.device, dtype=base.dtype)
    models: dict[str, nn.Module] = {"frozen base": base}
    for name, make in rows.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                models[name] = get_peft_model(frozen_copy(base), make()).train()
            except (TypeError, ValueError) as error:
                # VeRA wants its targets to be of few shapes
                print(f"{kind}, {name}: left out ({error})")

    def step(model: nn.Module) -> torch.Tensor:
        inputs = embeddings.clone().requires_grad_()
        loss = model(inputs_embeds=inputs).last_hidden_state.square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss

    seconds = paired({name: lambda model=model: step(model) for name, model in models.items()}, rounds=rounds)
    found = ratios(seconds, "frozen base")
    for name, model in models.items():
        found[name]["saved_bytes"] = saved_bytes(
            model, lambda model=model: model(inputs_embeds=embeddings.clone().requires_grad_())
        )
        found[name]["peak_bytes"] = peak_bytes(lambda model=model: step(model))
        found[name]["trained"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = []
    for title, found in results.items():
        floor = found["frozen base"]["saved_bytes"]
        lines += [
            f"## {title}",
            "",
            "| | CPU time over the frozen base (quartiles) | wall | saved beyond the base, MiB | trained |",
            "|---|---|---|---|---|",
        ]
        for name, row in found.items():
            lines.append(
                f"| {name} | {row['cpu_ratio']:.3f} ({row['cpu_low']:.3f}–{row['cpu_high']:.3f}) |"
                f" {row['wall_ratio']:.3f} | {(row['saved_bytes'] - floor) / 2**20:.1f} | {row['trained']:,.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=sorted(WHERE))
    parser.add_argument("--own", action="store_true", help="cores with own directions, and LoRAs of ranks 1 to 8")
    parser.add_argument("--out", type=Path, help="the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for kind, places in WHERE.items():
        for title, targets in places.items():
            if args.only in (None, kind):
                rows = (own_contenders if args.own else contenders)(targets, args.k)
                results[f"{kind}, {title}"] = measure(kind, rows, args.rounds, args.batch, args.tokens)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    out = args.out or Path(__file__).parent / "results" / ("train_step_own.json" if args.own else "train_step.json")
    write(out, {"settings": settings, "results": results}, table(results))


if __name__ == "__main__":
    main()
