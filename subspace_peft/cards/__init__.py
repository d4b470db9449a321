"""Model cards: facts → Markdown with Hub front matter, and where it goes in a README that others write in too.

Facts are gathered by those who have them (`basis/card.py`, `tuner/card.py`); rendering is pure.
"""

from .facts import (
    BaseFacts,
    BasisFacts,
    BasisReferenceFacts,
    BundledTaskFacts,
    BundleFacts,
    Place,
    SourceFacts,
    TaskFacts,
)
from .readme import Card, add_tags, put_card
from .render import basis_card, bundle_card, task_card

__all__ = [
    "BaseFacts",
    "BasisFacts",
    "BasisReferenceFacts",
    "BundleFacts",
    "BundledTaskFacts",
    "Card",
    "Place",
    "SourceFacts",
    "TaskFacts",
    "add_tags",
    "basis_card",
    "bundle_card",
    "put_card",
    "task_card",
]
