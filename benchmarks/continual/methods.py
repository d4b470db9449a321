"""The rows of the comparison, by name."""

from __future__ import annotations

from functools import partial

from .growing import Append, Refit
from .in_basis import FrozenBasis, RandomBasis
from .learner import HeadOnly, LoraEach, Osf, SequentialLora
from .setting import K
from .shared_factors import Share, ShareKeep
from .streams import Method


def methods() -> dict[str, Method]:
    """Return every method, in the order of the tables."""
    listed = [
        Method("head only", HeadOnly, HeadOnly, usual="head only"),
        Method("sequential LoRA r=8", SequentialLora, SequentialLora),
        Method("OSF", Osf, Osf),
        Method("LoRA r=8 each", LoraEach, LoraEach, usual="LoRA r=8"),
        Method("frozen first basis", FrozenBasis, FrozenBasis, usual="fleet"),
        Method("Share, update dropped", Share, Share, swept="Share, update kept"),
        Method("Share, update kept", ShareKeep, ShareKeep),
        Method("re-fitted to k = 16", partial(Refit, given=True), Refit, swept="append 2"),
        Method("re-fitted, tasks alone", Refit, Refit, swept="append 2"),
        *(Method(f"append {extra}", partial(Append, extra=extra), Append, swept="append 2") for extra in (1, 2, 4)),
        Method("append 2 if needed", partial(Append, probe=True), Append, swept="append 2"),
    ]
    return {each.name: each for each in listed}


def random_basis(k: int = K) -> Method:
    """Return the control of forward transfer in k random directions."""
    return Method(f"random basis k={k}", partial(RandomBasis, k=k), RandomBasis, usual="random")
