"""Checks in fresh processes: the saved task, and its export in stock PEFT, give the logits of the model that
trained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from subspace_peft.errors import SubspaceError

# `model.py` is loaded by its path, so that the second process really has no subspace_peft
PROGRAM = """
import importlib.util, sys
import numpy as np, torch
task, encoder, labels, seed, inputs, out, plugin = sys.argv[1:]
if plugin == "yes":
    import subspace_peft
from peft import PeftModel
spec = importlib.util.spec_from_file_location("mean_pooled", {model!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = PeftModel.from_pretrained(module.load_encoder(encoder, int(labels), int(seed)), task).eval()
given = np.load(inputs)
with torch.no_grad():
    logits = model(torch.from_numpy(given["input_ids"]), torch.from_numpy(given["attention_mask"])).logits
np.save(out, logits.numpy())
assert ("subspace_peft" in sys.modules) == (plugin == "yes")
"""


def logits_elsewhere(
    task: Path, encoder: Path, labels: int, seed: int, inputs: Mapping[str, np.ndarray], scratch: Path, *, plugin: bool
) -> np.ndarray:
    """Logits (rows, labels) that a fresh process computes after loading `task` on the encoder.

    Args:
        plugin: whether that process imports subspace_peft.

    Raises:
        SubspaceError: the process failed; carries its last words.
    """
    given, out = scratch / "inputs.npz", scratch / "logits.npy"
    np.savez(given, **inputs)
    program = PROGRAM.format(model=str(Path(__file__).with_name("model.py")))
    arguments = [str(task), str(encoder), str(labels), str(seed), str(given), str(out), "yes" if plugin else "no"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SubspaceError(f"{task}: a fresh process could not load it:\n{done.stderr.strip()[-1500:]}")
    logits = np.load(out)
    given.unlink()
    out.unlink()
    return logits
