"""Verbs that need neither PEFT nor what trains models load neither: they answer at once."""

from __future__ import annotations

import subprocess
import sys

from .test_one_number import saved, states

PROGRAM = """
import sys
from subspace_peft.cli import main
assert main(sys.argv[1:]) == 0
print("loaded:", sorted({"peft", "transformers", "bitsandbytes", "diffusers"} & set(sys.modules)))
"""


def test_building_and_looking_at_a_basis_loads_no_trainer(tmp_path):
    loras, basis = saved(tmp_path / "loras", states(3)), str(tmp_path / "basis")
    for words in (["build", *loras, "-k", "3", "--out", basis], ["inspect", basis], ["validate", basis]):
        done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "loaded: []"
