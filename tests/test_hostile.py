"""Files from strangers: what is wrong with them is said, nothing is unpickled, and nothing large is made of a small claim."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import subspace_peft
from subspace_peft import SubspaceBasis, SubspaceConfig, build_basis, export_lora
from subspace_peft._untrusted import pattern_problem
from subspace_peft.basis.cache import cache_home
from subspace_peft.basis.resolve import read_notes, resolve_basis
from subspace_peft.build import open_source
from subspace_peft.errors import BadFileError, BasisMismatchError, BasisNotFoundError, SourceError, SubspaceError
from subspace_peft.tuner import TaskBank
from subspace_peft.tuner.bank_file import read_index, read_rows
from subspace_peft.tuner.saved import read_task

from .hostile import (
    BASIS,
    BASIS_CONFIG,
    CONFIG,
    WEIGHTS,
    Small,
    edit_header,
    edit_json,
    edit_tensors,
    little_memory,
    make_files,
)

HUGE = 10**400
DEEP = "[" * 100_000 + "]" * 100_000
SLOW_PATTERN = "(a+)+b"


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("valid"))


@pytest.fixture
def files(valid, tmp_path):
    root = next(iter(valid.values())).parent
    shutil.copytree(root, tmp_path / "files")
    return {name: tmp_path / "files" / path.name for name, path in valid.items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # a Hub id in a hostile file must not make the tests wait for a network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


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
    """An absolute place or one that climbs out is allowed: a user's own tasks say so. What is read there are two files of a
    basis's names, and nothing but numbers of the recorded fingerprint comes of it."""
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
    ["/etc/passwd", "/dev/zero", "../../../../../../etc", "/proc/self", "~nobody-of-that-name/x", "x" * 5000 + "/y", "https://x/y",
     "file:///etc", "a/b/c/d", "org/name@../../x", "."],
)  # fmt: skip
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


BAD_NOTES = ["5", "[5]", "{}", "[null]", DEEP, "", "\0", '[{"location": 5}]', '[{"location": "a\\u0000b"}]',
             '[{"location": "x/y", "revision": {"a": 1}}]', '[{"location": "x/y", "revision": "../../x"}]',
             json.dumps([{"location": "x" * 100_000}]), '[{"location": "~nobody-of-that-name/x", "revision": null}]',
             '[{"location": "/dev/zero", "revision": null}]', '[{"location": "/etc/passwd"}]']  # fmt: skip


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
    "backwards": lambda header, key: header[next(name for name in header if name.endswith(key))].update(
        data_offsets=[64, 0]
    ),
    "renamed": lambda header, key: [
        header.update({f"x\0y.{name}": header.pop(name)}) for name in list(header) if name.endswith(key)
    ],
}


@pytest.mark.parametrize("how", BAD_HEADERS)
@pytest.mark.parametrize(
    ("what", "key"),
    [("task", "coef.weight"), ("own", "coef.weight"), ("own", "subspace_U"), ("own", "subspace_G"), ("own", "coef.gain"),
     ("basis", ".U"), ("basis", ".V"), ("basis", ".M"), ("basis", ".G"), ("basis", ".cores"), ("bank", "cores"), ("lora", "lora_A.weight"),
     ("lora", "lora_B.weight")],
)  # fmt: skip
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


# -- a basis's config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(modules=5), "no modules"),
        (lambda c: c.update(modules={}), "no modules"),
        (lambda c: c.update(modules={"first": 5}), "no sha256"),
        (lambda c: c["modules"]["first"].update(sha256="0" * 63), "no sha256"),
        (lambda c: c["modules"]["first"].update(shape=[1, 2]), "no shape"),
        (lambda c: c["modules"]["first"]["shape"].update(out=HUGE), "no layer's size"),
        (lambda c: c["modules"]["first"]["shape"].update(out=True), "no layer's size"),
        (lambda c: c["modules"]["first"]["shape"].update(k_out=11), "dimensions"),
        (lambda c: c["modules"]["first"]["shape"].update(k_in=0), "dimensions"),
        (lambda c: c["modules"]["first"]["shape"].update(directions=10**9), "directions="),
        (lambda c: c["modules"]["first"]["shape"].update(directions=3), "do not belong together"),
        (lambda c: c["modules"]["first"]["shape"].update(k_out=2), "do not belong together"),
        (lambda c: c["modules"].update({"a\nb": c["modules"]["first"]}), "no module's name"),
        (lambda c: c.update(sources=5), "sources"),
        (lambda c: c.update(sources=[5]), "sources"),
        (lambda c: c.update(measured=[]), "measured"),
        (lambda c: c.update(base_model_name_or_path={}), "base_model_name_or_path"),
        (lambda c: c.update(format_version="1"), "format version"),
        (lambda c: c.update(format_version={"a": HUGE}), "format version"),
        (lambda c: c.update(fingerprint=None), "do not add up"),
    ],
)  # fmt: skip
def test_a_hostile_config_of_a_basis(files, change, said):
    edit_json(files["basis"] / BASIS_CONFIG, change)
    with little_memory(), pytest.raises(BadFileError, match=said):
        SubspaceBasis.from_pretrained(files["basis"])


def test_two_modules_cannot_pose_as_one_of_a_long_name(files):
    """The fingerprint is a hash over names and hashes in a row: a name that holds a hash would give two bases the same one."""
    content = json.loads((files["basis"] / BASIS_CONFIG).read_text())
    first, last = content["modules"]["first"], content["modules"]["last"]
    content["modules"] = {f"first\0{first['sha256']}\nlast": last}
    (files["basis"] / BASIS_CONFIG).write_text(json.dumps(content))
    with pytest.raises(BadFileError, match="no module's name"):
        SubspaceBasis.from_pretrained(files["basis"])


# -- a bank's file ----------------------------------------------------------------------------------------------------

BAD_INDEXES = [
    {"tasks": 5}, {"tasks": "ab"}, {"tasks": ["one"]}, {"tasks": ["one", "one"]}, {"tasks": ["one", "__base__"]}, {"tasks": ["one", 5]},
    {"tasks": ["one", "a\0b"]}, {"modules": []}, {"modules": {}}, {"modules": {"first": 5}}, {"modules": {"first": [HUGE, 1]}},
    {"modules": {"first": [3, -3]}}, {"modules": {"first": [1 << 20, 1 << 20]}}, {"format_version": 99}, {"basis_fingerprint": 5},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_INDEXES, ids=range(len(BAD_INDEXES)))
def test_a_hostile_index_of_a_bank(files, change):
    def lie(header):
        header["__metadata__"]["bank"] = json.dumps({**json.loads(header["__metadata__"]["bank"]), **change})

    edit_header(files["bank.safetensors"], lie)
    bank = TaskBank(PeftModel.from_pretrained(Small(), files["task"]))
    with little_memory(), pytest.raises(BadFileError, match="no bank that can be read"):
        bank.load(files["bank.safetensors"])
    assert len(bank) == 0


@pytest.mark.parametrize("text", ["", "5", "[]", DEEP, "{"])
def test_a_banks_index_that_is_no_json_object(files, text):
    edit_header(files["bank.safetensors"], lambda header: header["__metadata__"].update(bank=text))
    with pytest.raises(BadFileError, match="no bank that can be read"):
        read_index(files["bank.safetensors"])


def test_one_task_out_of_a_bank_is_what_the_bank_holds(files):
    bank = TaskBank(PeftModel.from_pretrained(Small(), files["task"]))
    bank.load(files["bank.safetensors"])
    for name in ("one", "two"):
        cores = read_rows(files["bank.safetensors"], name)
        assert all(torch.equal(cores[module], bank[name][module]) for module in bank[name])
    with pytest.raises(SubspaceError, match="no task 'three'"):
        read_rows(files["bank.safetensors"], "three")


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *[{"r": value} for value in (None, "2", 0, HUGE, [], True)],
        *[{"lora_alpha": value} for value in (None, "x", [], HUGE, float("nan"), float("inf"), {})],
        *[
            {"rank_pattern": value}
            for value in (5, [1], "x", {SLOW_PATTERN: 2}, {"(": 2}, {"first": "2"}, {"first": HUGE})
        ],
        *[{"alpha_pattern": value} for value in (5, {"first": "2"}, {"(a|a)*b": 1}, {"first": None})],
        *[{"base_model_name_or_path": value} for value in (5, [], {"a": 1})],
        *[{"peft_type": value} for value in (5, None, [], "MAGIC")],
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_a_hostile_config_of_a_source(files, change):
    edit_json(files["lora0"] / CONFIG, **change)
    with little_memory(), pytest.raises(SourceError, match="lora0"):
        build_basis([str(files["lora0"])], k=2, progress=False)


def test_a_source_of_nothing(files):
    def nothing(tensors):
        for key, value in tensors.items():
            tensors[key] = value[:0] if "lora_A" in key else value[:, :0]

    edit_tensors(files["lora0"] / WEIGHTS, nothing)
    edit_json(files["lora0"] / CONFIG, r=0, rank_pattern={})
    with pytest.raises(SourceError, match="holds nothing"):
        build_basis([str(files["lora0"])], k=2, progress=False)


@pytest.mark.parametrize(
    ("pattern", "harmless"),
    [
        (r".*\.(q|v)_proj", True), (r"(.*\.)?layers\.\d+\.(mlp|attn)\..*", True), ("first", True), (r"model\.layers\.[0-9]+\.x", True),
        (r"(?:a|b)?c", True), ("[*+]{1}", True), (SLOW_PATTERN, False), ("(a|aa)*$", False), (".*" * 12 + "x", False),
        ("(a{1,9}){1,9}", False), (r"(.+)\1+", False), ("(", False), ("a" * 3000 + ".*", False), ("(" * 5000 + ")" * 5000, False),
    ],
)  # fmt: skip
def test_patterns_that_could_be_matched_for_ever_are_refused(pattern, harmless):
    began = time.perf_counter()
    assert (pattern_problem(pattern) is None) == harmless
    assert time.perf_counter() - began < 2


# -- nothing is unpickled ---------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_adapters_that_would_have_to_be_unpickled_are_refused(files, tmp_path):
    mark = tmp_path / "ran"
    for folder, read in ((files["lora0"], open_source), (files["task"], read_task)):
        (folder / WEIGHTS).unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(SubspaceError, match=r"adapter_model\.bin.*unpickled.*safetensors"):
            read(folder)
    # a pickle by the name of a safetensors file
    (files["lora0"] / WEIGHTS).write_bytes(pickle.dumps(Bomb(mark)))
    (files["task"] / WEIGHTS).write_bytes(pickle.dumps(Bomb(mark)))
    for read, folder in ((open_source, files["lora0"]), (read_task, files["task"])):
        with pytest.raises(SubspaceError, match="truncated"):
            read(folder)
    # PEFT's own door reads a .bin with torch's weights_only: it refuses what is no tensor, in its own words
    (files["task"] / WEIGHTS).unlink()
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        PeftModel.from_pretrained(Small(), files["task"])
    assert not mark.exists()


def test_no_code_here_can_unpickle_or_evaluate():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = []
    sources = sorted(Path(subspace_peft.__file__).parent.rglob("*.py"))
    assert len(sources) > 50
    for file in sources:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in forbidden(node, modules):
                found.append(f"{file.name}:{node.lineno}: {name}")
    assert found == []


def forbidden(node: ast.AST, modules: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] in modules]
    if isinstance(node, ast.ImportFrom):
        return [str(node.module)] if str(node.module).split(".")[0] in modules else []
    if not isinstance(node, ast.Call):
        return []
    name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    bad = name in (
        "eval",
        "exec",
        "compile",
        "__import__",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    )
    # torch's own reader of plain tensors, for those who ask for it with allow_bin
    bad = bad or (name == "torch.load" and keywords.get("weights_only") != "True")
    bad = bad or keywords.get("allow_pickle", "False") != "False" or keywords.get("weights_only", "True") != "True"
    bad = bad or keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False"
    return [name] if bad or name in ("os.system", "torch.hub.load", "read_pickle", "pd.read_pickle") else []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from dill import loads", "torch.load(f)", "np.load(f, allow_pickle=True)", "eval('1')", "yaml.load(f)",
     "AutoModel.from_pretrained(x, trust_remote_code=True)"],
)  # fmt: skip
def test_that_watch_sees_what_it_watches_for(code):
    assert any(forbidden(node, {"pickle", "dill"}) for node in ast.walk(ast.parse(code)))


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
