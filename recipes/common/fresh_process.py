"""The logits of a saved task in a fresh process, which knows subspace_peft or stock PEFT alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from subspace_peft import modeling
from subspace_peft.errors import SubspaceError

from .task import Task

EXAMPLES = 32

# The module of the model is loaded by its path: the process with stock PEFT must not know subspace_peft.
PROGRAM = """
import importlib.util, sys
import numpy as np, torch
task, encoder, classes, inputs, out, modeling, plugin = sys.argv[1:]
if plugin == "yes":
    import subspace_peft
from peft import PeftModel
from transformers import AutoModel
spec = importlib.util.spec_from_file_location("modeling", modeling)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
encoder = AutoModel.from_pretrained(encoder, num_labels=int(classes), add_pooling_layer=False, dtype=torch.float32)
model = PeftModel.from_pretrained(module.MeanPooledClassifier(encoder), task).eval()
given = {key: torch.from_numpy(value) for key, value in np.load(inputs).items() if key != "logits"}
with torch.no_grad():
    np.save(out, model(**given).logits.numpy())
assert ("subspace_peft" in sys.modules) == (plugin == "yes")
"""


def logits_elsewhere(task: Path, encoder: Path, classes: int, kept: Path, *, plugin: bool) -> np.ndarray:
    """Return the logits (rows, classes) that a fresh process computes after loading `task` on the encoder.

    Args:
        task: folder of the saved adapter.
        encoder, classes: of the base model.
        kept: the file of inputs that `keep_logits` wrote.
        plugin: whether that process imports subspace_peft.

    Raises:
        SubspaceError: the process failed; carries its last words.
    """
    out = kept.with_name("elsewhere.npy")
    given = [task, encoder, classes, kept, out, modeling.__file__, "yes" if plugin else "no"]
    command = [sys.executable, "-c", PROGRAM, *map(str, given)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise SubspaceError(f"{task}: a fresh process could not load it:\n{done.stderr.strip()[-1500:]}")
    logits = np.load(out)
    out.unlink()
    return logits


@torch.no_grad()
def keep_logits(model: torch.nn.Module, task: Task, file: Path) -> None:
    """Write the model's inputs and logits of some test examples, for `logits_elsewhere` to be held against."""
    rows = task.splits["test"]
    batch = task.collate([dict(row) for row in rows.select(range(min(EXAMPLES, len(rows))))]).to(model.device)
    del batch["labels"]
    logits = model.eval()(**batch).logits
    np.savez(file, **{key: value.cpu().numpy() for key, value in {**batch, "logits": logits}.items()})
