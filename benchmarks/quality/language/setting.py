"""What every cell of the language benchmark has in common: the model's parts, lengths, budgets, rates."""

from __future__ import annotations

from ..training import Budget

LAYERS = 30  # of SmolLM2-135M
TOP = 4  # layers that are computed, and adapted, in every step; the 26 below are frozen, and their outputs kept
TEXT, ANSWER = 20, 10  # tokens of an input and of an answer at most
SIZES = {"train": 256, "validation": 64, "test": 128}
DECODED = 32  # test prompts whose answers are generated, on tasks whose answers are phrases
SEEDS = (1, 2, 3)
SWEEP_SEED = 0
BUDGET = Budget(examples=256, steps=40, batch=8, checks=())
SOURCE_BUDGET = Budget(examples=256, steps=96, batch=8, checks=())
SOURCE_RATE = 2e-3
K, WIDE = 16, 32

QV = ("q_proj", "v_proj")
ADAPTED = {
    "qv": QV,
    "linear": (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def spent(budget: Budget) -> dict[str, int]:
    """Return what of a budget decides a run here, where there is no head and no limit on gradients."""
    return {"examples": budget.examples, "steps": budget.steps, "batch": budget.batch}


# a factor of 4 between neighbours; a best one at the edge widens the sweep once
LORA_RATES = (1e-3, 4e-3, 1.6e-2)
CORE_RATES = (1.2e-3, 4.8e-3, 1.92e-2)
MEAN_RATES = (2.5e-2, 1e-1, 4e-1)
VERA_RATES = (5e-3, 2e-2, 8e-2)
