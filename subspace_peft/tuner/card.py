"""What a saved task's README says beside PEFT's own words: how to load it, and in which basis it lives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._atomic import write_text_aside

if TYPE_CHECKING:
    from .config import SubspaceConfig

BEGIN, END = "<!-- subspace_peft: begin -->", "<!-- subspace_peft: end -->"


def write_section(folder: Path, config: SubspaceConfig) -> None:
    """Put or replace our section in `folder`'s README.md; whatever else is in there stays."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    before, found, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if found else ""
    separator = "" if not before or before.endswith("\n\n") else "\n" if before.endswith("\n") else "\n\n"
    write_text_aside(readme, f"{before}{separator}{section(config)}{after or chr(10)}")


def section(config: SubspaceConfig) -> str:
    """Markdown: the loading snippet, the remedy for PEFT's KeyError, the basis's id, revision and fingerprint."""
    if config.basis_modules is not None:
        basis = "The basis is in this task's own file."
    else:
        at = f" at revision `{config.basis_revision}`" if config.basis_revision else ""
        basis = f"The basis is `{config.to_dict()['basis']}`{at}; loading finds and verifies it."
    return f"""{BEGIN}
## Loading

```python
import subspace_peft  # registers the method; without it PEFT says KeyError: 'SUBSPACE'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or its Hub id")
```

`KeyError: 'SUBSPACE'` means that the process has not imported `subspace_peft` (`pip install subspace-peft`). A stock script runs
unchanged with `subspace-peft run script.py`.

Coefficients: `{config.coefficients}`, mean gain `{config.mean_gain}`. {basis}
Fingerprint: `{config.basis_fingerprint}`.
{END}"""
