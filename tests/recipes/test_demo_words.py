"""The words that the demo's result opens with."""

from __future__ import annotations

import pytest
from demo_parts.results import headline


def made_results(ours: float, lora: float, random: float, head: float, *, quick: bool = False, tasks: int = 2):
    """Results of so many tasks with these accuracies; the noise of a difference is 0.02 with one task."""
    scores = {
        "head only": (head, 0),
        "LoRA r=8": (lora, 9000),
        "random basis": (random, 500),
        "this basis": (ours, 500),
    }
    rows = [
        {"row": name, "accuracy": score, "standard_error": 0.02 / 2**0.5, "bytes_without_head": size}
        for name, (score, size) in scores.items()
    ]
    return {"quick": quick, "basis": {"sources": ["a", "b", "c"]}, "held_out": [{"task": "t", "rows": rows}] * tasks}


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (0.90, "right more often than the LoRA (+10.0 points of accuracy)."),
        (0.82, "right about as often as the LoRA (+2.0 points of accuracy, within the noise)."),
        (0.7999, "right about as often as the LoRA (+0.0 points of accuracy, within the noise)."),
        (0.79, "right about as often as the LoRA (-1.0 points of accuracy, within the noise)."),
        (0.70, "right less often than the LoRA (-10.0 points of accuracy)."),
    ],
)
def test_the_first_sentence_compares_with_the_lora(ours, words):
    first, _ = headline(made_results(ours, lora=0.80, random=0.8, head=0.8))
    assert first.startswith(
        "In one sentence: trained in the basis that 3 LoRA adapters share, each of 2 new tasks took"
    )
    assert "500 bytes beside its last layer, in place of a LoRA's 9,000" in first
    assert first.endswith(words)
    assert first.count(". ") == 0


HELPED, UNTOLD, DID_NOT = "share helped these tasks", "cannot be told from so few", "share did not help these tasks"


@pytest.mark.parametrize(
    ("random", "head", "words"),
    [
        (0.7, 0.7, HELPED),
        (0.7, 0.8, UNTOLD),
        (0.8, 0.7, UNTOLD),
        (0.8, 0.8, UNTOLD),
        (0.9, 0.8, DID_NOT),
        (0.8, 0.9, DID_NOT),
        (0.9, 0.9, DID_NOT),
        (0.7, 0.9, DID_NOT),
        (0.9, 0.7, DID_NOT),
    ],
)
def test_what_it_means_depends_on_both_controls(random, head, words):
    _, means = headline(made_results(0.8, lora=0.8, random=random, head=head))
    assert means.startswith("For you: ")
    assert words in means
    assert f"({80 - 100 * random:+.1f} points beside a basis of random directions, {80 - 100 * head:+.1f}" in means


def test_more_tasks_make_the_same_difference_certain():
    assert "about as often" in headline(made_results(0.83, lora=0.8, random=0.8, head=0.8, tasks=1))[0]
    assert "a new task took" in headline(made_results(0.83, lora=0.8, random=0.8, head=0.8, tasks=1))[0]
    assert "more often" in headline(made_results(0.83, lora=0.8, random=0.8, head=0.8, tasks=2))[0]


def test_a_quick_demo_claims_nothing():
    first, second = headline(made_results(0.9, 0.8, 0.7, 0.7, quick=True))
    assert second.endswith("scores mean nothing.")
    assert "right" not in first and "points" not in first
