"""What the demo prints: one table and a few sentences, made from its results only."""

from __future__ import annotations

from typing import Any


def markdown_table(results: dict[str, Any]) -> str:
    """A Markdown table, one line per held-out task and method."""
    lines = [
        (
            "| held-out task | method | test accuracy | ± s.e. | trained (adapter) | trained (head) | adapter file,"
            " bytes | of which head | train s | learning rate |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in results["held_out"]:
        for row in task["rows"]:
            head = row["bytes"] - row["bytes_without_head"]
            lines.append(
                f"| {task['task']} (n={task['test']}) | {row['row']} | {row['accuracy']:.3f} |"
                f" {row['standard_error']:.3f} | {row['adapter_parameters']:,} | {row['head_parameters']:,} |"
                f" {row['bytes']:,} | {head:,} | {row['seconds']:.1f} | {row['learning_rate']:g} |"
            )
    return "\n".join(lines) + "\n"


def summary_lines(results: dict[str, Any]) -> list[str]:
    """Sizes, checks and a plain reading of the table."""
    basis = results["basis"]
    lines = [
        (
            f"Basis: {basis['bytes']:,} bytes for {basis['modules']} modules, k={basis['k']}, from"
            f" {len(basis['sources'])} adapters ({basis['seed_groups']} random starts); it keeps"
            f" {basis['energy_kept']:.3f} of their energy, a random one {basis['energy_random']:.4f}."
        ),
    ]
    for task, check in zip(results["held_out"], results["checks"], strict=True):
        scores = {row["row"]: row for row in task["rows"]}
        ours, lora, random = scores["this basis"], scores["LoRA r=8"], scores["random basis"]
        mean, head = scores["mean core only"], scores["head only"]
        noise = (ours["standard_error"] ** 2 + random["standard_error"] ** 2) ** 0.5
        gap = ours["accuracy"] - random["accuracy"]
        reading = "within the noise of" if abs(gap) < 2 * noise else ("above" if gap > 0 else "below")
        lines.append(
            f"{task['task']}: this basis {ours['accuracy']:.3f}, {reading} a random one ({random['accuracy']:.3f},"
            f" difference {gap:+.3f} ± {noise:.3f}); LoRA {lora['accuracy']:.3f}, the fleet's mean alone"
            f" {mean['accuracy']:.3f}, head only {head['accuracy']:.3f}. Without the head its file has"
            f" {ours['bytes_without_head']:,} bytes, LoRA's {lora['bytes_without_head']:,}."
        )
        lines.append(
            f"{task['task']}: reloaded in a fresh process its logits differ by at most"
            f" {check['reloaded_max_difference']:.1e}, exported to LoRA r={check['exported_rank']} in stock PEFT by"
            f" {check['exported_max_difference']:.1e} (logits up to {check['logits_scale']:.1f})."
        )
    lines.append(
        f"One seed, few examples: differences under about two standard errors mean nothing. {results['seconds']:.0f}"
        " seconds in all."
    )
    return lines
