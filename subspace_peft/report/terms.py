"""The words that a report's page explains where they stand."""

from __future__ import annotations

from ..energy import FAITHFUL, LITTLE, MUCH, PARTIAL, RARE, percent

# classes that are no words by themselves
WORDS = {"mostly": "mostly within it", "part": "partly within it", "little": "hardly within it"}
TERMS = {
    "energy": (
        "The squared Frobenius norm of an adapter's update, ‖ΔW‖²: the sum of the squares of all entries by which it"
        " changes the weights. Of an adapter it is summed over its modules, kept over whole; of a module and of a"
        " basis it is the mean over adapters."
    ),
    "noise of the same strength": (
        "Updates with the singular values of these adapters' updates, in random directions. Whatever a basis keeps of"
        " them is owed to their strength and count, not to what the adapters have in common."
    ),
    "random directions": (
        "A basis of as many directions drawn at random. It keeps k²/(out·in) of any update, on average: the control"
        " that a basis is held against."
    ),
    "left out": (
        "What a basis of all the other adapters keeps of this one. Only this tells of new tasks: a basis keeps much of"
        " the adapters it was built from, related or not."
    ),
    "seed group": (
        "Adapters that began from one random A, which alone makes their input directions common: they share one"
        " weight, and are left out together."
    ),
    "break-even": (
        "The number of adapters from which on all is smaller: the basis with a core for each takes fewer bytes than"
        " the adapters as LoRAs."
    ),
    "k": (
        "Directions per side of a module: a task then has k × k parameters there. Where the adapters span fewer, the"
        " basis has fewer."
    ),
    "core": "What a task has of its own in a module: k × k parameters between the basis's directions.",
    "mean only": "What the best multiple of the other adapters' mean update keeps: no basis is needed for that part.",
    "own directions": (
        "How many directions of its own an adapter needs in every module, beside the basis's, to be faithful; 0"
        " where it is by the basis alone, a dash where 64 are too few."
    ),
    "above noise": "Output and input directions that hold more energy than the strongest one of the noise does.",
    "fingerprint": "The sha256 of the basis's tensors. Tasks name it, and are loaded into no other basis.",
    "faithful": f"At least {percent(FAITHFUL)} is kept: in our measurements 99 % of the answers were the LoRA's.",
    "partial": (
        f"{percent(PARTIAL)} to {percent(FAITHFUL)} is kept: in our measurements 93 % of the answers were the LoRA's."
    ),
    "poor": f"Less than {percent(PARTIAL)} is kept: what is left of the LoRA cannot be told from the share.",
    "unrelated": f"Less than {RARE:g} times what random directions keep: chance explains it.",
    "little": f"More than chance, less than {percent(LITTLE)}.",
    "part": f"{percent(LITTLE)} to {percent(MUCH)}.",
    "mostly": f"{percent(MUCH)} or more.",
    "unknown": "It was not measured, or cannot be from these adapters.",
}
