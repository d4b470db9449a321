"""Ten thousand mutations of valid files: each is read to the same numbers, or refused by one of this package's
errors."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from subspace_peft import SubspaceBasis
from subspace_peft.basis.locations import read_notes
from subspace_peft.basis.resolve import resolve_basis
from subspace_peft.errors import SubspaceError
from subspace_peft.sources import open_source
from subspace_peft.tasks.bank_file import read_index, read_own, read_rows
from subspace_peft.tasks.read import read_task

from .make import BASIS, BASIS_CONFIG, CONFIG, WEIGHTS, Small, join, little_memory, make_files, split

CASES = {"task": 2500, "own": 2000, "basis": 2500, "bank": 1300, "lora": 1300, "note": 400}
MODEL_CASES = 300
SLOWEST = 60.0  # seconds for a file of kilobytes: a hang, not a speed limit

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**63, -(2**64), 10**30, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "../../etc", "/dev/zero", "~nobody-there/x", r"\\host\x", "a\0b", "x" * 5000, "(a+)+b"]),
    st.lists(st.integers(-2, 4), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(-2, 4), max_size=2),
    st.sampled_from(["DEEP300", "DEEP100000"]),
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON document."""
    children = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    return [path, *(place for key, value in children for place in places(value, (*path, key)))]


@st.composite
def json_change(draw, content: Any) -> Any:
    """`content` with one to three of its values replaced, taken out, renamed or added."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(content, (dict, list)):
            break
        where = draw(st.sampled_from(places(content)))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
        if not where:
            if how == "add" and isinstance(content, dict):
                content[draw(st.text(max_size=6))] = draw(ODD)
            elif draw(st.integers(0, 9)) == 0:
                content = draw(ODD)
            continue
        holder = content
        for key in where[:-1]:
            holder = holder[key]
        if how == "remove":
            del holder[where[-1]]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "x", "a\0b", "first", "last", "U"]))] = holder.pop(where[-1])
        else:
            holder[where[-1]] = draw(ODD)
    return content


@st.composite
def bytes_change(draw, data: bytes) -> bytes:
    """`data` with bytes flipped, cut off, doubled or added."""
    how = draw(st.sampled_from(["flip", "flip", "flip", "cut", "double", "add"]))
    at = draw(st.integers(0, len(data) - 1))
    if how == "flip":
        changed = bytearray(data)
        for place in [at, *draw(st.lists(st.integers(0, min(len(data) - 1, 400)), max_size=3))]:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if how == "cut":
        return data[:at]
    return (
        data[:at] + (data[at : at + 40] if how == "double" else draw(st.binary(min_size=1, max_size=40))) + data[at:]
    )


@st.composite
def tensors_change(draw, data: bytes) -> bytes:
    """A safetensors file with its bytes or its header changed."""
    if draw(st.booleans()):
        return draw(bytes_change(data))
    header, numbers = split(data)
    if draw(st.integers(0, 3)) == 0 and "bank" in header.get("__metadata__", {}):
        index = draw(json_change(json.loads(header["__metadata__"]["bank"])))
        header["__metadata__"]["bank"] = dumps(index).decode()
    else:
        header = draw(json_change(header))
    return join(dumps(header), numbers)


def dumps(content: Any) -> bytes:
    # deeper than Python's own writer goes
    text = re.sub(r'"DEEP(\d+)"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(content))
    return text.encode("utf-8", "surrogatepass")


class Files:
    """Valid files in memory, and a folder in which one or two of them are changed."""

    def __init__(self, valid: dict[str, Path], root: Path) -> None:
        self.root, self.valid = root, valid
        self.data = {
            "task": self._pair("task", CONFIG, WEIGHTS),
            "own": self._pair("own", CONFIG, WEIGHTS),
            "basis": self._pair("basis", BASIS_CONFIG, BASIS),
            "lora": self._pair("lora0", CONFIG, WEIGHTS),
            "bank": {"bank.safetensors": valid["bank.safetensors"].read_bytes()},
        }
        location = json.dumps([{"location": str(valid["basis"]), "revision": None}]).encode()
        self.data["note"] = {"note.json": location}

    def _pair(self, name: str, *files: str) -> dict[str, bytes]:
        return {file: (self.valid[name] / file).read_bytes() for file in files}

    @contextlib.contextmanager
    def changed(self, what: str, name: str, data: bytes):
        folder = Path(tempfile.mkdtemp(dir=self.root))
        try:
            for file, content in self.data[what].items():
                (folder / file).write_bytes(data if file == name else content)
            yield folder
        finally:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    return Files(make_files(root), root)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def read(what: str, folder: Path) -> Any:
    if what in ("task", "own"):
        return read_task(folder)
    if what == "basis":
        basis = SubspaceBasis.from_pretrained(folder)
        return {f"{name}.{key}": value for name, module in basis.items() for key, value in module.tensors().items()}
    if what == "bank":
        file = folder / "bank.safetensors"
        return {name: (read_rows(file, name), read_own(file, name)) for name in read_index(file)["tasks"]}
    source = open_source(str(folder))
    return {module: source.factors(module) for module in source.keys}


def same_own(file: Path, found: dict[str, Any]) -> None:
    """The own directions that were read of a bank's file are those that lie there."""
    with safe_open(file, framework="pt") as tensors:
        index = json.loads(tensors.metadata()["bank"])
    own = index.get("own", {"tasks": [], "modules": {}})
    for name, row in zip(own["tasks"], load_file(file).get("own", ()), strict=True):
        for module, (rank, out, size) in own["modules"].items():
            A, B, row = (
                row[: rank * size].view(rank, size),
                row[rank * size :][: rank * out],
                row[rank * (size + out) :],
            )
            given = found[name].get(module, (torch.zeros(out, 0), torch.zeros(0, size)))
            assert torch.equal(given[0] @ given[1], (B.view(rank, out).T @ A).float())
    assert all(not found[name] for name in found.keys() - set(own["tasks"]))


def same(what: str, folder: Path, found: Any, files: Files) -> None:
    """What was read of a changed file must be what the file, read by nothing of this package, says."""
    if what == "basis":
        # its numbers are hashed: those that are read at all are the valid ones
        valid = load_file(files.valid["basis"] / BASIS)
        assert all(torch.equal(found[key], valid[key]) for key in found)
        assert {key for key in valid if key not in found} == set()
    elif what == "bank":
        rows = load_file(folder / "bank.safetensors")["cores"]
        for row, (cores, _) in zip(rows, found.values(), strict=True):
            given = torch.cat([core.T.reshape(-1) for core in cores.values()])
            assert torch.isfinite(row).all()
            assert torch.equal(given, row.float())
        same_own(folder / "bank.safetensors", {name: own for name, (_, own) in found.items()})
    elif what == "lora":
        tensors = load_file(folder / WEIGHTS)
        config = json.loads((folder / CONFIG).read_text())
        for module, factors in found.items():
            B, A = (next(v for k, v in tensors.items() if f"{module}.lora_{side}" in k).double() for side in "BA")
            s = (factors.B * B).sum() / B.square().sum()
            assert torch.isfinite(factors.B).all()
            assert torch.allclose(factors.B, s * B)
            assert torch.equal(factors.A, A)
            patterns = (
                config.get("alpha_pattern"),
                config.get("rank_pattern"),
                config.get("use_rslora"),
                config.get("lora_alpha"),
            )
            if patterns == ({}, {"last": 1}, False, 8):
                assert math.isclose(s, 8 / A.shape[0], rel_tol=1e-9)
    else:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        for module, core in found.cores.items():
            assert torch.isfinite(core).all()
            kind, gain = config.get("coefficients", "core"), config.get("mean_gain", "none")
            if (kind, gain) == ("core", "none"):
                theta = next(
                    value for key, value in tensors.items() if key.endswith(f"{module}.subspace_coef.weight")
                ).double()
                assert torch.allclose(core, config.get("alpha", 256.0) / theta.numel() ** 0.5 * theta)


@pytest.mark.slow
@pytest.mark.parametrize("what", [kind for kind in CASES if kind != "note"])
def test_every_mutation_is_read_rightly_or_refused(files, what):
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=CASES[what],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(st.data())
    def one(data):
        name = data.draw(st.sampled_from(sorted(files.data[what])))
        valid = files.data[what][name]
        if name.endswith(".json"):
            mutations = json_change(json.loads(valid)).map(dumps) | bytes_change(valid)
        else:
            mutations = tensors_change(valid)
        with files.changed(what, name, data.draw(mutations)) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.perf_counter()
            try:
                with little_memory():
                    found = read(what, folder)
            except SubspaceError as error:
                assert "allocate" not in str(error)
                assert len(str(error)) < 20_000
                outcomes[type(error).__name__] += 1
            else:
                same(what, folder, found, files)
                outcomes["read"] += 1
            assert time.perf_counter() - began < SLOWEST

    one()
    print(f"\n{what}: {sum(outcomes.values())} cases, {dict(outcomes)}")
    assert sum(outcomes.values()) >= CASES[what] * 0.9
    assert outcomes["read"] > 0, "no mutation was harmless: the valid file is not read at all"
    assert len(outcomes) > 1, "no mutation was refused"


@pytest.mark.slow
def test_every_mutation_of_a_note_leads_to_the_basis_or_nowhere(files, own_cache):
    basis = SubspaceBasis.from_pretrained(files.valid["basis"])
    fingerprint = basis.fingerprint
    del basis
    note = own_cache / "locations" / f"{fingerprint}.json"
    valid = files.data["note"]["note.json"]
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=CASES["note"],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(json_change(json.loads(valid)).map(dumps) | bytes_change(valid))
    def one(data):
        note.write_bytes(data)
        with little_memory():
            read_notes(fingerprint)
            try:
                found = resolve_basis(None, fingerprint=fingerprint)
            except SubspaceError as error:
                outcomes[type(error).__name__] += 1
            else:
                assert found.fingerprint == fingerprint
                outcomes["found"] += 1

    one()
    print(f"\nnote: {dict(outcomes)}")
    assert len(outcomes) > 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["task", "own"])
def test_no_mutation_gets_half_a_task_into_a_model(files, what):
    """Through PEFT's own door. What PEFT reads before it asks us fails in its own or Python's words: a config that is
    no JSON object, of no known peft_type, or nested too deeply. And a task_type that PEFT does not know is its own
    ValueError."""
    outcomes: Counter[str] = Counter()
    before = [type(module) for module in Small().modules()]
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))

    @settings(
        max_examples=MODEL_CASES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(st.data())
    def one(data):
        name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
        valid = files.data[what][name]
        changes = json_change(json.loads(valid)).map(dumps) if name == CONFIG else tensors_change(valid)
        changed = data.draw(changes)
        model = Small()
        with files.changed(what, name, changed) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with little_memory():
                    loaded = PeftModel.from_pretrained(model, folder)
            except SubspaceError as error:
                assert [type(module) for module in model.modules()] == before
                outcomes[type(error).__name__] += 1
            except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
                assert peft_reads_it_first(changed) or "Invalid task type" in str(error), (
                    f"{type(error).__name__}: {error}"
                )
                outcomes[f"PEFT's {type(error).__name__}"] += 1
            else:
                # a flipped bit may make a number so large, yet finite, that no product of it is
                largest = max(p.abs().max() for n, p in loaded.named_parameters() if "subspace_coef" in n)
                with torch.no_grad():
                    assert largest > 1e30 or torch.isfinite(loaded(x)).all()
                outcomes["loaded"] += 1

    one()
    print(f"\n{what} into a model: {dict(outcomes)}")
    assert outcomes["loaded"] > 0
    assert len(outcomes) > 1


def peft_reads_it_first(config: bytes) -> bool:
    try:
        content = json.loads(config)
    except (ValueError, RecursionError):
        return True
    return not isinstance(content, dict) or content.get("peft_type") != "SUBSPACE"
