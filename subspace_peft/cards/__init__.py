"""Model cards: facts → Markdown with the Hub's front matter, merged into a README that others write in too.

Facts are gathered where they are known (`basis/card.py`, `tuner/card.py`, `bundle/card.py`). Rendering is a function
of the facts alone: the text is in `templates/`, and `markdown.py` escapes values.
"""

from typing import TYPE_CHECKING, Any

from .._moved import moved_name
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
from .markdown import arguments
from .readme import Card, add_tags, put_card
from .recorded import recorded
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
    "arguments",
    "basis_card",
    "bundle_card",
    "put_card",
    "recorded",
    "task_card",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return moved_name(__name__, name)
