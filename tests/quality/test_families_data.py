"""The real families' splits: nothing leaks. Reads packages; needs a minute for the texts."""

from __future__ import annotations

import pytest
from offline.texts import plain

from benchmarks.quality.families import registry
from benchmarks.quality.families.pools import LEAST, SIZES
from benchmarks.quality.families.texts import COPY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=list(registry.MAKERS))
def family(request):
    return registry.family(request.param)


def key(item) -> object:
    """Return what makes two items the same one."""
    return plain(item) if isinstance(item, str) else item.tobytes()


def test_no_item_is_on_two_sides_of_any_split_of_any_member(family):
    sides: dict[object, set[str]] = {}
    documents: dict[str, set[str]] = {}
    for name in family.order:
        for pool, chosen in family.draw(name).items():
            for place, _ in chosen:
                sides.setdefault(key(family.items[place]), set()).add(pool)
                documents.setdefault(family.documents[place], set()).add(pool)
    assert all(len(each) == 1 for each in (*sides.values(), *documents.values()))


def test_a_family_has_enough_members_of_enough_examples(family):
    assert len(family.order) >= 12 and len(family.held()) == 4
    for name in family.order:
        parts = family.draw(name)
        assert all(len(parts[pool]) >= least for pool, least in LEAST.items())
        assert all(2 * sum(label for _, label in chosen) == len(chosen) for chosen in parts.values())
    for name in family.held():
        assert len(family.draw(name)["train"]) >= 800 and len(family.draw(name)["test"]) >= SIZES["test"] / 2


def test_labels_are_those_of_the_classes(family):
    for name in family.order[:3]:
        member = family.members[name]
        for chosen in family.draw(name).values():
            assert all((family.classes[place] in member.yes) == bool(label) for place, label in chosen)


def test_members_names_are_of_one_family_only():
    # a basis of other families' adapters is checked by name as well
    names = [name for each in registry.MAKERS for name in registry.family(each).order]
    assert len(set(names)) == len(names)


def test_quotations_share_no_run_of_words():
    family = registry.family("writers")
    seen: dict[tuple[str, ...], int] = {}
    for place, text in enumerate(family.items):
        words = plain(text).split()
        for i in range(len(words) - COPY + 1):
            assert seen.setdefault(tuple(words[i : i + COPY]), place) == place


def test_a_missing_word_is_nowhere_else_in_its_piece():
    family = registry.family("blanks")
    for text, word in zip(family.items, family.classes, strict=True):
        assert text.split().count("[MASK]") == 1 and word not in text.split()
