"""What a family of tasks is, and how its examples are divided once, so that no text is on both sides of any split."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from subspace_peft.errors import SubspaceError

POOLS = {"train": 0.6, "validation": 0.12, "test": 0.28}
SIZES = {"train": 1000, "validation": 200, "test": 500}
SOURCE_SIZES = {"train": 1000, "validation": 100, "test": 300}  # of members that nothing but a source is made of
LEAST = {"train": 200, "validation": 30, "test": 80}
MOST = 36  # members: four held out, and thirty-two sources
RICH = 800  # training examples, without which a member is nothing but a source


@dataclass(frozen=True)
class Member:
    """A task of two classes, one half of its examples each.

    Attributes:
        yes: classes of the family's items that are its first class.
        no: classes of which the other half is drawn, from each as many.
    """

    yes: tuple[str, ...]
    no: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """Items of known classes, and the tasks made of them.

    Attributes:
        name, about: short name, and what its members tell apart.
        kind: ``text`` or ``image``, which decides the encoder.
        items: texts, or images (28, 28) uint8.
        classes: one per item.
        documents: one per item; items of one document are in one pool.
        members: name → task.
        held_out: how many members are held out, the first of `order`.
        tuning: how many of the next are those on which learning rates are chosen.
    """

    name: str
    about: str
    kind: str
    items: Sequence[Any]
    classes: Sequence[str]
    documents: Sequence[str]
    members: Mapping[str, Member]
    held_out: int = 4
    tuning: int = 2

    @cached_property
    def pools(self) -> dict[str, dict[str, list[int]]]:
        """Return pool → class → places of its items, in an order that the family's name decides."""
        found: dict[str, dict[str, list[int]]] = {pool: {} for pool in POOLS}
        order = list(range(len(self.items)))
        random.Random(f"items of {self.name}").shuffle(order)
        for place in order:
            pool = pool_of(f"{self.name}/{self.documents[place]}")
            found[pool].setdefault(self.classes[place], []).append(place)
        return found

    @cached_property
    def order(self) -> list[str]:
        """Return the members, shuffled by the family's name: nothing measured decides which are held out.

        Those with too few examples are left out, those with not many (`RICH`) come last: they are sources only. Of
        more than `MOST` the others are left out, too.
        """
        names = sorted(
            name for name in self.members if all(self._available(name, pool) >= least for pool, least in LEAST.items())
        )
        random.Random(f"members of {self.name}").shuffle(names)
        rich = [name for name in names if self._available(name, "train") >= RICH]
        return [*rich, *(name for name in names if name not in set(rich))][:MOST]

    def held(self) -> list[str]:
        """Return the held-out members."""
        return self.order[: self.held_out]

    def tuned(self) -> list[str]:
        """Return the members on which learning rates are chosen; they are sources, too."""
        return self.order[self.held_out : self.held_out + self.tuning]

    def sources(self, seed: int) -> list[str]:
        """Return the members that are not held out, in an order drawn by `seed`: the first N of it are N sources."""
        names = sorted(self.order[self.held_out :])
        random.Random(f"sources of {self.name}, {seed}").shuffle(names)
        return names

    def _available(self, name: str, pool: str) -> int:
        member, found = self.members[name], self.pools[pool]
        return 2 * min(sum(len(found.get(each, ())) for each in side) for side in (member.yes, member.no))

    def draw(self, name: str) -> dict[str, list[tuple[int, int]]]:
        """Return split → (place, label) of a member's examples, half of them of label 1, in an order of its own.

        Raises:
            SubspaceError: there is no such member, or it has too few examples.
        """
        if name not in self.order:
            raise SubspaceError(f"Family {self.name!r} has no member {name!r}; it has {', '.join(self.order)}.")
        sizes = SIZES if name in self.order[: self.held_out + self.tuning] else SOURCE_SIZES
        parts = {}
        for pool, size in sizes.items():
            size = min(size, self._available(name, pool))
            rng = random.Random(f"{self.name}/{name}/{pool}")
            member = self.members[name]
            chosen = [(place, 1) for place in self._balanced(member.yes, pool, size // 2, rng)]
            chosen += [(place, 0) for place in self._balanced(member.no, pool, size // 2, rng)]
            rng.shuffle(chosen)
            parts[pool] = chosen
        return parts

    def _balanced(self, classes: Sequence[str], pool: str, count: int, rng: random.Random) -> list[int]:
        """Return places of `count` items, from every class as many as the smaller ones allow."""
        left = {each: rng.sample(found, len(found)) for each in classes if (found := self.pools[pool].get(each))}
        chosen: list[int] = []
        while len(chosen) < count and left:
            for each in rng.sample(sorted(left), len(left)):
                if len(chosen) < count:
                    chosen.append(left[each].pop())
                if not left[each]:
                    del left[each]
        return chosen

    @cached_property
    def digest(self) -> str:
        """Return a hash of everything that decides the members' examples."""
        made = hashlib.sha256(f"{self.name} {self.kind} {POOLS} {SIZES} {SOURCE_SIZES}".encode())
        for name in self.order:
            for pool, chosen in self.draw(name).items():
                made.update(f"\n{name} {pool}".encode())
                for place, label in chosen:
                    item = self.items[place]
                    made.update(item.encode() if isinstance(item, str) else item.tobytes())
                    made.update(bytes([label]))
        return made.hexdigest()


def pool_of(document: str) -> str:
    """Return the pool of a document, which its name alone decides."""
    place = int(hashlib.sha256(document.encode()).hexdigest()[:12], 16) / 16**12
    for pool, share in POOLS.items():
        place -= share
        if place < 0:
            return pool
    return list(POOLS)[-1]


def without_copies(texts: Iterable[str], run: int) -> list[int]:
    """Return the places of those texts that share no run of `run` words with an earlier one that is kept.

    A text of fewer words is compared as a whole.
    """
    seen: set[tuple[str, ...]] = set()
    kept = []
    for place, text in enumerate(texts):
        words = text.lower().split()
        runs = {tuple(words[i : i + run]) for i in range(max(1, len(words) - run + 1))}
        if seen.isdisjoint(runs):
            seen |= runs
            kept.append(place)
    return kept
