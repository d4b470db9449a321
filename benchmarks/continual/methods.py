"""The rows of the comparison, by name."""

from __future__ import annotations

from functools import partial

from .in_basis import FrozenBasis, RandomBasis
from .learner import HeadOnly, LoraEach, Osf, SequentialLora
from .setting import K
from .shared_factors import Share, ShareKeep
from .streams import Method


def methods() -> dict[str, Method]:
    """Return every method, in the order of the tables."""
    listed = [
        Method("head only", HeadOnly, HeadOnly),
        Method("sequential LoRA r=8", SequentialLora, SequentialLora),
        Method("OSF", Osf, Osf),
        Method("LoRA r=8 each", LoraEach, LoraEach),
        Method("frozen first basis", FrozenBasis, FrozenBasis),
        Method("Share, update dropped", Share, Share, swept="Share, update kept"),
        Method("Share, update kept", ShareKeep, ShareKeep),
    ]
    return {each.name: each for each in listed}


def random_basis(k: int = K) -> Method:
    """Return the control of forward transfer in k random directions, at the rate of 16."""
    return Method(f"random basis k={k}", partial(RandomBasis, k=k), RandomBasis, swept=f"random basis k={K}")
