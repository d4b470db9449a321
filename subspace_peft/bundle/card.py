"""What a bundle's README says: what is in it, and how to load from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..basis.push import GENERATED

if TYPE_CHECKING:
    from .bundle import Bundle

MOST_LISTED = 50


def bundle_card(bundle: Bundle) -> str:
    """Markdown, with the metadata that the Hub reads."""
    config = bundle.index["config"]
    at = f" at revision `{config['basis_revision']}`" if config.get("basis_revision") else ""
    names = list(bundle)
    front = ["---", "library_name: peft", "tags:", "- subspace-peft", "- bundle"]
    if bundle.base_model and "/" in bundle.base_model and not bundle.base_model.startswith(("/", ".", "~")):
        front.append(f"base_model: {bundle.base_model}")
    listed = "\n".join(f"- `{name}`" for name in names[:MOST_LISTED])
    rest = f"\n- and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return (
        "\n".join([*front, "---"])
        + f"""

# {len(names)} tasks in one shared basis

```python
from subspace_peft import load_task

model = load_task(base_model, "this folder or its Hub id", "{names[0]}")
```

One task is read without the rest. All of them: `TaskBank(model).load("bundle.safetensors")`; what is in here:
`subspace-peft bundle ls PLACE`.

The basis is `{config["basis"]}`{at}; loading finds and verifies it. Fingerprint: `{bundle.fingerprint}`.

{listed}{rest}

<!-- {GENERATED} -->
"""
    )
