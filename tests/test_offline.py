"""The offline presets: other registries' clients, and models and tasks written as folders that `from_pretrained` reads."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from subspace_peft.errors import BadFileError, SubspaceError
from subspace_peft.offline import clients
from subspace_peft.offline import prepare as prepare_module
from subspace_peft.offline.clients import PackageError
from subspace_peft.offline.packages import Package, fetch, find
from subspace_peft.offline.prepare import prepare, tasks
from subspace_peft.offline.texts import ENCODER

REAL_CACHE = Path(__file__).parent.parent / ".cache" / "subspace_peft"


@pytest.fixture
def real_cache(monkeypatch):
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(REAL_CACHE))


def tarred(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


# -- clients ----------------------------------------------------------------------------------------------------------


def client_that_writes(name: str, content: bytes, tmp_path: Path):
    (tmp_path / "content").write_bytes(content)
    program = f"import shutil; shutil.copy({str(tmp_path / 'content')!r}, {name!r})"
    return lambda *_: [sys.executable, "-c", program]


def test_npm_packages_are_fetched_verified_and_unpacked(tmp_path, monkeypatch):
    content = tarred({"package/data.json": "[1]", "package/code.js": "x"})
    monkeypatch.setattr(clients, "npm_command", client_that_writes("thing-1.tgz", content, tmp_path))
    sha256 = hashlib.sha256(content).hexdigest()
    package = Package("@scope/thing", "1", sha256, members=("*.json",), registry="npm")
    folder = fetch(package, cache=tmp_path / "cache")
    assert find(folder, "data.json").read_text() == "[1]"
    assert len(list(folder.rglob("*.*"))) == 1
    other = Package("thing", "2", "0" * 64, registry="npm")
    with pytest.raises(BadFileError, match="0" * 64):
        fetch(other, cache=tmp_path / "cache")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb on this system")
def test_debian_packages_are_fetched_verified_and_unpacked(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/share").mkdir(parents=True)
    (tree / "usr/share/data.txt").write_text("words")
    (tree / "DEBIAN/control").write_text(
        "Package: thing\nVersion: 1:2\nArchitecture: all\nMaintainer: x <x@y>\nDescription: d\n"
    )
    subprocess.run(["dpkg-deb", "--build", str(tree), str(tmp_path / "thing.deb")], check=True, capture_output=True)
    content = (tmp_path / "thing.deb").read_bytes()
    monkeypatch.setattr(clients, "apt_command", client_that_writes("thing_2_all.deb", content, tmp_path))
    sha256 = hashlib.sha256(content).hexdigest()
    package = Package("thing", "1:2", sha256, members=("*/data.txt",), registry="debian")
    folder = fetch(package, cache=tmp_path / "cache")
    assert find(folder, "share/data.txt").read_text() == "words"
    torn = Package("thing", "1:3", hashlib.sha256(content[:500]).hexdigest(), registry="debian")
    monkeypatch.setattr(clients, "apt_command", client_that_writes("thing.deb", content[:500], tmp_path))
    with pytest.raises(PackageError, match="could not be unpacked"):
        fetch(torn, cache=tmp_path / "cache")


@pytest.mark.parametrize(("registry", "remedy"), [("npm", "npm config list"), ("debian", "apt-get update")])
def test_a_client_that_is_missing_or_fails_names_the_remedy(tmp_path, monkeypatch, registry, remedy):
    name = {"npm": "npm_command", "debian": "apt_command"}[registry]
    for command in (["no-such-program-here"], [sys.executable, "-c", "raise SystemExit('E: gone')"]):
        monkeypatch.setattr(clients, name, lambda *_, command=command: command)
        with pytest.raises(PackageError, match=remedy):
            fetch(Package("thing", "1", "0" * 64, registry=registry), cache=tmp_path / "cache")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_text_preset_is_written_once_and_goes_on_where_it_stopped(real_cache, tmp_path, monkeypatch):
    folder = tmp_path / "text"
    writes = []
    whole = prepare_module._write_aside

    def torn(place, facts, write):
        writes.append(place.name)
        if len(writes) == 3:
            raise KeyboardInterrupt
        whole(place, facts, write)

    monkeypatch.setattr(prepare_module, "_write_aside", torn)
    with pytest.raises(KeyboardInterrupt):
        prepare("text", folder, smoke=True, progress=False)
    assert len(list((folder / "data").iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(REAL_CACHE))
    assert prepare("text", folder, smoke=True, progress=False) == folder
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    prepare("text", folder, smoke=True, progress=False)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before
    known = tasks(folder)
    assert sum(facts["held_out"] for facts in known.values()) == 1
    assert len(known) == 4
    for name, facts in known.items():
        seen: set[str] = set()
        for split, size in prepare_module.SMOKE_SIZES.items():
            rows = [json.loads(line) for line in (folder / "data" / name / f"{split}.jsonl").open()]
            assert len(rows) == size
            assert all(0 <= row["label"] < len(facts["labels"]) for row in rows)
            assert not seen & {row["sentence"] for row in rows}
            seen |= {row["sentence"] for row in rows}


def test_unknown_presets_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(SubspaceError, match="choose one of text"):
        prepare("sounds", tmp_path)
    with pytest.raises(SubspaceError, match=r"task\.json"):
        tasks(tmp_path)
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "task.json").write_text("{torn")
    with pytest.raises(BadFileError, match="cannot be read"):
        tasks(tmp_path)


def test_the_transplanted_roberta_computes_what_the_bert_does(real_cache, tmp_path):
    from subspace_peft.offline.models import roberta_encoder

    folder = roberta_encoder(tmp_path / "roberta")
    ours, tokenizer = (
        AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    bert = AutoModel.from_pretrained(str(find(fetch(ENCODER), "model/config.json").parent)).eval()
    batch = tokenizer(["short one", "and a somewhat longer sentence, with a comma"], padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(ours(**batch)[0][real], bert(**batch)[0][real])


@pytest.mark.slow
def test_the_plain_vit_computes_what_the_backbone_does(real_cache, tmp_path):
    from subspace_peft.offline.models import dinov2_backbone, vit_encoder

    folder = vit_encoder(tmp_path / "vit", 56)
    ours, backbone = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), dinov2_backbone()
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels)[0], backbone(pixels)[0], atol=1e-4, rtol=0)
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": 56, "width": 56}


@pytest.mark.slow
def test_the_mistral_computes_what_the_llama_does(real_cache, tmp_path):
    from subspace_peft.offline.models import llama_lm, mistral_lm

    folder = mistral_lm(tmp_path / "mistral")
    ours, (llama, tokenizer) = AutoModelForCausalLM.from_pretrained(folder).eval(), llama_lm()
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, llama(**batch).logits, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["images", "instructions"])
def test_the_other_presets_share_nothing_between_tasks(real_cache, tmp_path, preset):
    folder = prepare(preset, tmp_path / preset, progress=False)
    known = tasks(folder)
    assert sum(not facts["held_out"] for facts in known.values()) >= 6
    seen: dict[bytes, str] = {}
    for name in known:
        files = (folder / "data" / name).rglob("*.png" if preset == "images" else "*.jsonl")
        content = (
            [file.read_bytes() for file in files]
            if preset == "images"
            else [json.loads(line)["input"].encode() for file in files for line in file.open()]
        )
        assert len(content) > 500
        clashes = {seen[item] for item in content if item in seen}
        assert clashes <= {name} if preset == "images" else not clashes
        seen |= dict.fromkeys(content, name)
