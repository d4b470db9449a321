"""A task's files from strangers: what is wrong with them is said, and nothing large is made of a small claim."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis, export_lora
from subspace_peft.basis.cache import cache_home
from subspace_peft.basis.locations import read_notes
from subspace_peft.basis.resolve import resolve_basis
from subspace_peft.errors import BadFileError, BasisMismatchError, BasisNotFoundError, SourceError, SubspaceError
from subspace_peft.sources import open_source
from subspace_peft.tasks.bank_file import read_index, read_rows
from subspace_peft.tasks.read import read_task

from .conftest import DEEP, HUGE, SLOW_PATTERN
from .make import (
    BASIS,
    BASIS_CONFIG,
    CONFIG,
    WEIGHTS,
    Small,
    edit_header,
    edit_json,
    little_memory,
)

# -- a task's config --------------------------------------------------------------------------------------------------

CARRIED = {
    "first": {
        "shape": {"out": 10, "in": 12, "k_out": 3, "k_in": 3, "directions": 2},
        "sha256": {"U": "0" * 64, "V": "0" * 64},
    }
}
BAD_VALUES = [
    *[("k", value) for value in (10**18, HUGE, -1, 0, True, "16", 1.5, [1], {})],
    *[("r", value) for value in (None, 10**12, "8", 0, {"a": 1})],
    *[("alpha", value) for value in (None, HUGE, "256", float("nan"), float("inf"), -1, [], True)],
    *[("dropout", value) for value in (None, 2, -0.1, "0", float("nan"), HUGE)],
    *[("coefficients", value) for value in (None, 5, "magic", ["core"], {"core": 1})],
    *[("mean_gain", value) for value in (None, 5, {})],
    *[("bias", value) for value in (None, 1, [])],
    *[("start", value) for value in (None, 1, [], "")],
    *[("seed", value) for value in (None, HUGE, "0", 1.5)],
    *[
        ("rank_pattern", value)
        for value in (None, [], "first", {"first": 10**12}, {"first": "2"}, {SLOW_PATTERN: 2}, {"(": 2})
    ],
    *[
        ("target_modules", value)
        for value in (5, [5], [["first"]], {"first": 1}, SLOW_PATTERN, "(", ["a\0b"], ".*" * 40)
    ],
    *[("exclude_modules", value) for value in (5, [None], SLOW_PATTERN)],
    *[("modules_to_save", value) for value in ("first", 5, [5], [["x"]], {})],
    *[("trainable_token_indices", value) for value in (5, "x", [-1], ["a"], {"first": 5}, [10**30])],
    *[("layers_to_transform", value) for value in ("1", [None], -1, {"a": 1})],
    *[("layers_pattern", value) for value in (5, [5])],
    *[("basis", value) for value in (5, [], {}, True, "a\0b", "x" * 100_000)],
    *[("basis_revision", value) for value in (5, [], "../../etc", "a\nb")],
    *[("basis_fingerprint", value) for value in (5, [], {}, "", None)],
    *[("base_model_name_or_path", value) for value in (5, [], {"a": 1})],
    *[("revision", value) for value in (5, "../x")],
    *[("save_basis", value) for value in (5, "yes")],
    *[(key, value) for key in ("fan_in_fan_out", "init_weights", "check_base_model") for value in (None, "no", 1, [])],
    *[("base_probe", value) for value in (5, "x", [None], [HUGE], [float("nan")], [0.0] * 10_000)],
    *[("basis_modules", value) for value in (5, [], {}, {"first": 5}, {"first": {"shape": {}, "sha256": {}}})],
    ("basis_modules", {"first": {**CARRIED["first"], "shape": {**CARRIED["first"]["shape"], "k_out": 10**12}}}),
    ("basis_modules", {"first": {**CARRIED["first"], "shape": {**CARRIED["first"]["shape"], "out": -1}}}),
    ("basis_modules", {"first": {**CARRIED["first"], "sha256": {"U": "0" * 64, "V": 5}}}),
    ("basis_modules", {"first": {**CARRIED["first"], "sha256": {"U": "0" * 64, "V": "0" * 64, "X": "0" * 64}}}),
    *[
        ("weight_shapes", value)
        for value in (5, [], {"first": [1]}, {"first": [1, -1]}, {"first": ["a", "b"]}, {"first": [10**30, 1]})
    ],
    *[("auto_mapping", value) for value in (5, "x")],
    *[("subspace_version", value) for value in (5, [], {})],
    *[("inference_mode", value) for value in (None, "x")],
    *[("a_key_of_nobody", value) for value in (5, {})],
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=[f"{key}-{i}" for i, (key, _) in enumerate(BAD_VALUES)])
def test_a_hostile_value_in_a_tasks_config_is_named(files, key, value):
    edit_json(files["task"] / CONFIG, **{key: value})
    with little_memory(), pytest.raises(SubspaceError) as caught:
        read_task(files["task"])
    assert "task" in str(caught.value)
    assert key in str(caught.value) or (key, value) == ("basis", "x" * 100_000)
    assert len(str(caught.value)) < 2000
    # through PEFT's own door as well, before a module is replaced
    model = Small()
    if key != "subspace_version":
        with pytest.raises(SubspaceError):
            PeftModel.from_pretrained(model, files["task"])
        assert [type(module) for module in model.modules()] == [type(module) for module in Small().modules()]


@pytest.mark.parametrize("key", ["peft_type", "task_type"])
@pytest.mark.parametrize("value", [5, None, [], {}, "MAGIC"])
def test_values_that_peft_itself_reads(files, key, value):
    edit_json(files["task"] / CONFIG, **{key: value})
    if (key, value) == ("task_type", None):
        assert read_task(files["task"]).config.task_type is None
        return
    with pytest.raises(SubspaceError):
        read_task(files["task"])


@pytest.mark.parametrize(
    "text", ["", "{", "5", "null", "[]", '"x"', DEEP, '{"a": ' + DEEP + "}", "\ud800", "{}{}", "1" * 5000]
)
def test_a_config_that_is_no_json_object(files, text):
    (files["task"] / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadFileError, match=r"adapter_config\.json"):
        read_task(files["task"])
    (files["basis"] / BASIS_CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadFileError, match=r"basis_config\.json"):
        SubspaceBasis.from_pretrained(files["basis"])
    (files["lora0"] / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SourceError, match=r"adapter_config\.json"):
        open_source(files["lora0"])


def test_keys_of_newer_versions_are_passed_over_with_a_warning(files):
    expected = read_task(files["task"]).cores
    edit_json(files["task"] / CONFIG, peft_version="999.0", new_in_peft=True)
    with pytest.warns(UserWarning, match="new_in_peft"):
        cores = read_task(files["task"]).cores
    assert all(torch.equal(cores[name], expected[name]) for name in expected)


# -- where a task's basis is ------------------------------------------------------------------------------------------


def test_a_basis_outside_the_tasks_folder_gives_only_verified_numbers(files, tmp_path):
    """An absolute place or one that climbs out is allowed: a user's own tasks say so. What is read there are two files
    of a basis's names, and nothing but numbers of the recorded fingerprint comes of it."""
    expected = read_task(files["task"]).cores
    shutil.rmtree(cache_home(), ignore_errors=True)
    for place in ("../basis", str(files["basis"]), "../task/../basis"):
        edit_json(files["task"] / CONFIG, basis=place)
        cores = read_task(files["task"]).cores
        assert all(torch.equal(cores[name], expected[name]) for name in expected)
    other = tmp_path / "other"
    build_basis([str(files["lora0"])], k=1, progress=False).save_pretrained(other)
    edit_json(files["task"] / CONFIG, basis=str(other), basis_fingerprint="e" * 64)
    with pytest.raises(BasisMismatchError, match="e" * 64):
        read_task(files["task"])


@pytest.mark.parametrize(
    "place",
    [
        "/etc/passwd",
        "/dev/zero",
        "../../../../../../etc",
        "/proc/self",
        "~nobody-of-that-name/x",
        "x" * 5000 + "/y",
        "https://x/y",
        "file:///etc",
        "a/b/c/d",
        "org/name@../../x",
        ".",
    ],
)
def test_places_that_hold_no_basis(files, place):
    edit_json(files["task"] / CONFIG, basis=place, basis_fingerprint="e" * 64)
    with little_memory(), pytest.raises((BasisNotFoundError, BadFileError)):
        read_task(files["task"])


@pytest.mark.parametrize("place", [r"\\evil\share\basis", "//evil/share/basis"])
def test_a_task_cannot_send_us_to_another_machines_share(files, place, monkeypatch):
    edit_json(files["task"] / CONFIG, basis=place, basis_fingerprint="e" * 64)
    asked = []
    monkeypatch.setattr(SubspaceBasis, "from_pretrained", lambda *args, **_: asked.append(args))
    with pytest.raises(BasisNotFoundError, match="another machine's share"):
        read_task(files["task"])
    assert asked == []


def test_pipes_and_devices_are_not_waited_for(files):
    for file in (
        files["task"] / WEIGHTS,
        files["task"] / CONFIG,
        files["basis"] / BASIS,
        files["basis"] / BASIS_CONFIG,
    ):
        kept = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(SubspaceError):
            read_task(files["task"]) if "adapter" in file.name else SubspaceBasis.from_pretrained(files["basis"])
        file.unlink()
        file.write_bytes(kept)
    assert read_task(files["task"]).cores


BAD_NOTES = [
    "5",
    "[5]",
    "{}",
    "[null]",
    DEEP,
    "",
    "\0",
    '[{"location": 5}]',
    '[{"location": "a\\u0000b"}]',
    '[{"location": "x/y", "revision": {"a": 1}}]',
    '[{"location": "x/y", "revision": "../../x"}]',
    json.dumps([{"location": "x" * 100_000}]),
    '[{"location": "~nobody-of-that-name/x", "revision": null}]',
    '[{"location": "/dev/zero", "revision": null}]',
    '[{"location": "/etc/passwd"}]',
]


@pytest.mark.parametrize("text", BAD_NOTES, ids=range(len(BAD_NOTES)))
def test_a_hostile_note_of_where_a_basis_was_seen(text):
    note = cache_home() / "locations" / f"{'a' * 64}.json"
    note.parent.mkdir(parents=True)
    note.write_text(text)
    with little_memory(), pytest.raises(BasisNotFoundError, match="was not found"):
        resolve_basis(None, fingerprint="a" * 64)


def test_a_note_brings_in_no_other_and_no_damaged_basis(files, tmp_path):
    note = cache_home() / "locations" / f"{'a' * 64}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps([{"location": str(files["basis"])}]))
    with pytest.raises(BasisMismatchError, match="a" * 64):
        resolve_basis(None, fingerprint="a" * 64)
    (files["basis"] / BASIS_CONFIG).write_text("{")
    with pytest.raises(BasisNotFoundError, match="was not found"):
        resolve_basis(None, fingerprint="a" * 64)
    assert read_notes("../" * 20) == []


# -- tensors ----------------------------------------------------------------------------------------------------------

TERA = 1 << 40


def claim(header, key, shape, dtype="F32", size=None):
    """Say that `key` is of `shape`, and (where `size` is given) that its numbers take so many bytes."""
    found = next(name for name in header if name.endswith(key))
    start = header[found]["data_offsets"][0]
    header[found] = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [start, start + size] if size is not None else header[found]["data_offsets"],
    }


BAD_HEADERS = {
    "terabytes": lambda header, key: claim(header, key, [TERA, 1], size=4 * TERA),
    "terabytes in few bytes": lambda header, key: claim(header, key, [TERA, TERA]),
    "overflow": lambda header, key: claim(header, key, [1 << 63, 1 << 63]),
    "terabytes of nothing": lambda header, key: header.update(
        {next(n for n in header if n.endswith(key)): {"dtype": "F32", "shape": [TERA, 0], "data_offsets": [0, 0]}}
    ),
    "scalar": lambda header, key: claim(header, key, []),
    "negative": lambda header, key: claim(header, key, [-1, 3]),
    "another type": lambda header, key: claim(header, key, "wide"),
    "no such dtype": lambda header, key: claim(header, key, [3, 3], dtype="F1"),
    "eight bits": lambda header, key: claim(header, key, [6, 6], dtype="F8_E4M3"),
    "complex": lambda header, key: claim(header, key, [1, 1], dtype="C64"),
    "not there": lambda header, key: header.pop(next(name for name in header if name.endswith(key))),
    "backwards": (
        lambda header, key: header[next(name for name in header if name.endswith(key))].update(data_offsets=[64, 0])
    ),
    "renamed": lambda header, key: [
        header.update({f"x\0y.{name}": header.pop(name)}) for name in list(header) if name.endswith(key)
    ],
}


@pytest.mark.parametrize("how", BAD_HEADERS)
@pytest.mark.parametrize(
    ("what", "key"),
    [
        ("task", "coef.weight"),
        ("own", "coef.weight"),
        ("own", "subspace_U"),
        ("own", "subspace_G"),
        ("own", "coef.gain"),
        ("basis", ".U"),
        ("basis", ".V"),
        ("basis", ".M"),
        ("basis", ".G"),
        ("basis", ".cores"),
        ("bank", "cores"),
        ("lora", "lora_A.weight"),
        ("lora", "lora_B.weight"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(files, what, key, how):
    path = {"bank": files["bank.safetensors"], "lora": files["lora0"] / WEIGHTS, "basis": files["basis"] / BASIS}.get(
        what
    )
    path = path or files[what] / WEIGHTS
    edit_header(path, lambda header: BAD_HEADERS[how](header, key))
    assert path.stat().st_size < 20_000
    with little_memory(), pytest.raises(SubspaceError) as caught:
        read_all(what, files)
    assert "allocate" not in str(caught.value)


def read_all(what: str, files: dict[str, Path]) -> object:
    if what == "basis":
        return dict(SubspaceBasis.from_pretrained(files["basis"]).items())
    if what == "bank":
        return [read_rows(files["bank.safetensors"], name) for name in read_index(files["bank.safetensors"])["tasks"]]
    if what == "lora":
        source = open_source(files["lora0"])
        return [source.norm(module) for module in source.keys]
    return read_task(files[what])


def test_a_task_that_carries_a_basis_of_other_sizes_than_it_says(files):
    def grow(content):
        content["basis_modules"]["first"]["shape"] |= {"out": 1 << 30, "k_out": 1 << 20}

    edit_json(files["own"] / CONFIG, grow)
    with little_memory(), pytest.raises(BadFileError, match="do not belong together"):
        read_task(files["own"])
    with little_memory(), pytest.raises(BadFileError, match="do not belong together"):
        PeftModel.from_pretrained(Small(), files["own"])


def test_a_task_with_more_carried_tensors_than_hashes(files):
    edit_json(files["own"] / CONFIG, lambda content: content["basis_modules"]["first"]["sha256"].pop("M"))
    with pytest.raises(BadFileError, match="do not belong together"):
        read_task(files["own"])


def test_weight_shapes_that_do_not_fit_the_basis_are_refused_on_export(files, tmp_path):
    for shape in ([7, 7], [10, 12, 3, 3], [1 << 30, 1 << 30]):
        edit_json(files["task"] / CONFIG, weight_shapes={"first": shape})
        with little_memory(), pytest.raises(BadFileError, match="weight is"):
            export_lora(files["task"], tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_the_valid_files_are_valid(files):
    tensors = load_file(files["task"] / WEIGHTS)
    task = read_task(files["task"])
    for module, core in task.cores.items():
        weight = tensors[f"base_model.model.{module}.subspace_coef.weight"].double()
        assert torch.allclose(core, 256.0 / weight.numel() ** 0.5 * weight)
    assert read_task(files["own"]).cores
    assert isinstance(PeftModel.from_pretrained(Small(), files["own"]).peft_config["default"], SubspaceConfig)
    assert read_all("bank", files)
    assert read_all("basis", files)
    assert read_all("lora", files)
