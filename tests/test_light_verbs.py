"""Verbs that need neither torch nor PEFT load neither: they answer at once, and say what torch would have found."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.basis.arrays import StoredReader, array_of, check_raw
from subspace_peft.basis.opened import open_to_look
from subspace_peft.errors import BadFileError
from subspace_peft.report import inspect_path, validate_basis

from .models import bert
from .uneven import saved, states

PROGRAM = """
import sys
from subspace_peft.cli import main
for words in sys.argv[1].split(";"):
    try:
        assert main(words.split()) == 0, words
    except SystemExit as ended:
        assert ended.code == 0, words
    heavy = {"torch", "peft", "transformers", "accelerate", "bitsandbytes", "diffusers", "matplotlib", "jinja2"}
    print("loaded:", words, sorted(heavy & set(sys.modules)))
"""


def loaded(*lines: str) -> dict[str, str]:
    """Return which heavy modules are loaded after each of some commands, run in one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ";".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^loaded: (.*) (\[.*\])$", done.stdout, re.MULTILINE))


def test_looking_needs_no_torch(fleets, tmp_path):
    from subspace_peft import compress_fleet

    basis, bundle = tmp_path / "basis", tmp_path / "bundle"
    made = build_basis(fleets[bert], k=6, progress=False)
    made.save_pretrained(basis)
    made.to_precision("bfloat16").save_pretrained(tmp_path / "rounded")
    compress_fleet(fleets[bert][:2], basis, bundle, min_energy=0, progress=False)
    lines = [
        "--help",
        "build --help",
        f"inspect {basis}",
        f"validate {basis}",
        f"validate {tmp_path / 'rounded'}",
        f"bundle ls {bundle}",
        f"bundle ls {bundle} --verify --json",
        "cache ls",
        "cache verify",
        "env --no-devices",
        "cp",
    ]
    assert set(loaded(*lines).values()) == {"[]"}


def test_building_and_measuring_load_no_trainer(tmp_path):
    loras, basis = saved(tmp_path / "loras", states(3)), str(tmp_path / "basis")
    lines = [
        f"build {' '.join(loras)} -k 3 --out {basis} -q",
        f"analyze {' '.join(loras)} --basis {basis}",
        f"project {loras[0]} --basis {basis}",
    ]
    for found in loaded(*lines).values():
        assert not set(re.findall(r"\w+", found)) & {"peft", "transformers", "bitsandbytes", "diffusers", "matplotlib"}


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16", "int8"])
def stored(request, fleets, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build_basis(fleets[bert], k=6, directions=2, progress=False).to_precision(request.param).save_pretrained(folder)
    return folder


def test_numpy_reads_what_torch_reads(stored):
    basis, reader = SubspaceBasis.from_pretrained(stored), StoredReader(open_to_look(stored))
    for name in basis:
        raw = reader.raw(name)
        assert raw.keys() == basis.stored(name).keys()
        for key, value in basis.stored(name).items():
            assert np.array_equal(array_of(raw[key]), value.float().numpy() if value.is_floating_point() else value)


def test_both_find_the_same(stored):
    basis = SubspaceBasis.from_pretrained(stored)
    from_file, in_memory = validate_basis(stored), validate_basis(basis)
    assert from_file == in_memory and from_file["problems"] == []
    facts = inspect_path(stored)
    assert (facts["fingerprint"], facts["shapes"], facts["k"]) == (
        basis.fingerprint,
        basis.shapes(),
        basis.describe_k(),
    )


def test_values_that_no_basis_has_are_found_in_bytes(stored):
    opened = open_to_look(stored)
    name = next(iter(opened.entries))
    raw = StoredReader(opened).raw(name)
    kind, shape, data = raw["M"]
    worse = {**raw, "M": (kind, shape, b"\xff" * len(data))}
    with pytest.raises(Exception, match="M holds NaN or infinite values"):
        check_raw(name, worse, opened.precision)
    kind, shape, data = raw["U"]
    worse = {**raw, "U": (kind, shape, b"\x01" * len(data))}
    if opened.precision is not None:
        with pytest.raises(BadFileError, match="U is not orthonormal"):
            check_raw(name, worse, opened.precision)
    with pytest.raises(Exception, match=r"U has dtype|U and V ask for|has shape"):
        check_raw(name, {**raw, "U": ("I64", shape, data), "M": (raw["M"][0], (1, 1), b"")}, opened.precision)


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xFF80])
def test_bfloat16_that_is_not_finite_is_seen(bits):
    value = torch.tensor([bits], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    raw = ("BF16", (1,), value.view(torch.uint8).numpy().tobytes())
    assert not np.isfinite(array_of(raw)).any() and not torch.isfinite(value).any()
