"""What does a share of energy kept mean for what an adapter does?

    python benchmarks/energy_and_function.py --sources DIR     # a quarter of an hour per seed on two cores

Trains the demo's eight stock LoRAs (MiniLM, query and value of its upper half, real texts), projects each on bases of
several sizes (of its fleet, of the fleet without it, and of random directions), and holds each projection against the
LoRA on 400 test examples: the share of equal answers, and how much of the accuracy that the LoRA adds to the model
without it (under the same head) is left. The words of `subspace_peft.energy` rest on the table. Writes JSON and a
Markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "benchmarks")]

import demo  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from offline.packages import fetch, fetch_all, find  # noqa: E402
from offline.texts import ENCODER, PACKAGES, source_tasks  # noqa: E402
from timing import write  # noqa: E402
from torch import nn  # noqa: E402

from subspace_peft import SubspaceBasis, build_basis, project_lora  # noqa: E402
from subspace_peft.sources import open_source  # noqa: E402

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)
EXAMPLES, BATCH, ADAPTED_FROM = 400, 50, 3
EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)


class Given(nn.Module):
    """Embeddings that are given: hidden states that the layers below the adapted ones have made."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        return inputs_embeds


class Examples:
    """A task's test examples as the adapted layers see them, and the model from there on."""

    def __init__(self, task: demo.TextTask, encoder: Path, seed: int) -> None:
        loaded = demo.load_task(task, encoder, demo.Sizes(test=EXAMPLES), seed)
        model = demo.make_model(encoder, len(task.labels), seed).eval()
        self.labels, self.batches = [], []
        rows = loaded.splits["test"]
        with torch.no_grad():
            for start in range(0, len(rows), BATCH):
                batch = loaded.collate([rows[i] for i in range(start, min(start + BATCH, len(rows)))])
                self.labels.append(batch.pop("labels"))
                hidden = model.bert(**batch, output_hidden_states=True).hidden_states[ADAPTED_FROM]
                self.batches.append((hidden, batch["attention_mask"]))
        self.labels = torch.cat(self.labels)
        model.bert.encoder.layer = model.bert.encoder.layer[ADAPTED_FROM:]
        model.bert.embeddings = Given()
        self.model = model

    @torch.no_grad()
    def logits(self, updates: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits (examples, classes) with these updates ΔW of the adapted modules, under this head."""
        model = copy.deepcopy(self.model)
        model.classifier.load_state_dict(head)
        for name, update in updates.items():
            layer, _, rest = name.removeprefix("bert.encoder.layer.").partition(".")
            module = model.bert.encoder.layer[int(layer) - ADAPTED_FROM].get_submodule(rest)
            module.weight += update
        return torch.cat([model(inputs_embeds=h, attention_mask=mask).logits for h, mask in self.batches])


def bases_of(folders: Sequence[str], left_out: str) -> Iterator[tuple[str, int, SubspaceBasis]]:
    """Yield bases that keep more and less of an adapter: the kind, k, the basis."""
    for k in SIZES:
        yield "fleet", k, build_basis(folders, k=k, progress=False)
    others = [each for each in folders if each != left_out]
    for k in (16, 56):
        yield "others", k, build_basis(others, k=k, progress=False)
    # k is that of the basis which it is like
    yield "random", 64, build_basis(like=build_basis(folders, k=64, progress=False), builder="random")


def measure(folder: str, task: demo.TextTask, encoder: Path, seed: int, bases: Any) -> Iterator[dict[str, Any]]:
    """Yield what is left of one adapter on each basis."""
    examples, source = Examples(task, encoder, seed), open_source(folder)
    head = {key.rpartition(".")[2]: source.read(key) for key in source.other_keys if "classifier" in key}
    updates = {name: (source.factors(name).B @ source.factors(name).A).float() for name in source.keys}
    whole, bare = examples.logits(updates, head), examples.logits({}, head)
    answer, without = whole.argmax(-1), bare.argmax(-1)
    right = lambda guesses: float((guesses == examples.labels).float().mean())  # noqa: E731
    for kind, k, basis in bases:
        projection = project_lora(source, basis)
        cores = {
            name: basis[str(basis.find(name))].reconstruct(projection.cores[str(basis.find(name))]).float()
            for name in updates
        }
        found = examples.logits(cores, head)
        yield {
            "seed": seed,
            "task": task.name,
            "basis": kind,
            "k": k,
            "kept": projection.energy_kept,
            "same_answers": float((found.argmax(-1) == answer).float().mean()),
            "same_answers_without": float((without == answer).float().mean()),
            "change": float((found - whole).norm() / (bare - whole).norm()),
            "accuracy": right(found.argmax(-1)),
            "accuracy_lora": right(answer),
            "accuracy_without": right(without),
        }


def bins(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what projections of like energy kept have in common."""
    found = []
    for low, high in itertools.pairwise(EDGES):
        some = [row for row in rows if low <= row["kept"] < high]
        if not some:
            continue
        lost = [100 * (row["accuracy_lora"] - row["accuracy"]) for row in some]
        gain = sum(row["accuracy_lora"] - row["accuracy_without"] for row in some)
        same = [row["same_answers"] for row in some]
        found.append(
            {
                "from": low,
                "to": min(high, 1.0),
                "projections": len(some),
                "same_answers": float(np.mean(same)),
                "same_answers_worst_tenth": float(np.quantile(same, 0.1)),
                "points_lost": float(np.mean(lost)),
                "points_lost_worst_tenth": float(np.quantile(lost, 0.9)),
                "gain_left": 1 - sum(lost) / 100 / gain if gain else None,
                "change": float(np.median([row["change"] for row in some])),
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    seeds, tasks = len({row["seed"] for row in rows}), len({row["task"] for row in rows})
    head = ("energy kept", "projections", "same answers", "worst tenth", "points lost", "worst tenth", "gain left")
    lines = [
        f"{tasks} LoRAs r=8 of MiniLM on real texts, seeds: {seeds}; {len(rows)} projections, {EXAMPLES} test examples"
        " each. Same answers: as the LoRA's. Points lost: of its accuracy. Worst tenth: a tenth of the projections"
        " fare worse. Gain left: of the accuracy that the LoRAs add to the model without them, under the same heads.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for each in found:
        cells = (
            f"{100 * each['from']:.0f}–{100 * each['to']:.0f} %",
            str(each["projections"]),
            f"{100 * each['same_answers']:.1f} %",
            f"{100 * each['same_answers_worst_tenth']:.1f} %",
            f"{each['points_lost']:.1f}",
            f"{each['points_lost_worst_tenth']:.1f}",
            f"{100 * each['gain_left']:.0f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder for the trained adapters")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "energy_and_function.json")
    given = parser.parse_args(arguments)
    demo.shared.quiet()
    fetch_all(PACKAGES, progress=False)
    encoder = find(fetch(ENCODER), "model/config.json").parent
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        folders = demo.train_sources(given.sources / str(seed), encoder, demo.Sizes(), seed, False)
        print(f"seed {seed}: trained", flush=True)
        for folder, task in zip(folders, source_tasks(), strict=True):
            rows += measure(folder, task, encoder, seed, bases_of(folders, folder))
            print(f"seed {seed}, {task.name}: {rows[-1]['accuracy_lora']:.3f}", flush=True)
        write(given.out, {"bins": bins(rows), "projections": rows}, table(bins(rows), rows))


if __name__ == "__main__":
    main()
