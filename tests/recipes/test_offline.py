"""The offline presets: other registries' clients, and models and tasks written as folders that `from_pretrained`
reads."""

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
from offline import clients
from offline import prepare as prepare_module
from offline.clients import PackageError
from offline.instructions import Synset
from offline.models import put
from offline.more_texts import meanings, read_mail
from offline.packages import Package, fetch, find
from offline.prepare import prepare, tasks
from offline.texts import ENCODER, Row, TextTask
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from subspace_peft.errors import BadFileError, SubspaceError

from .conftest import REAL_CACHE


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
    assert list((tmp_path / "cache").iterdir()) == [folder]


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


@pytest.mark.parametrize("same", [True, False])
def test_another_version_of_a_debian_package_is_taken_only_if_it_is_the_same_archive(tmp_path, monkeypatch, same):
    content = tarred({"usr/share/data.txt": "words"})
    sha256 = hashlib.sha256(content).hexdigest() if same else "0" * 64
    monkeypatch.setattr(clients, "open_debian", lambda archive, folder: archive)
    writes, calls = client_that_writes("thing_3_all.deb", content, tmp_path), []

    def command(package: Package, exact: bool = True) -> list[str]:
        calls.append(exact)
        return [sys.executable, "-c", "raise SystemExit('E: not found')"] if exact else writes()

    monkeypatch.setattr(clients, "apt_command", command)
    package = Package("thing", "2", sha256, registry="debian")
    if same:
        assert find(fetch(package, cache=tmp_path / "cache"), "data.txt").read_text() == "words"
    else:
        with pytest.raises(BadFileError, match=r"another version than 2: run `apt-get update`"):
            fetch(package, cache=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []
    assert calls == [True, False]


def test_clients_are_asked_for_the_exact_version_and_may_say_why_they_fail(tmp_path):
    package = Package("thing", "1.2", "0" * 64)
    assert "thing@1.2" in clients.npm_command(package, tmp_path)
    assert not {"--silent", "-s", "--quiet"} & set(clients.npm_command(package, tmp_path))
    assert "--ignore-scripts" in clients.npm_command(package, tmp_path)
    assert clients.apt_command(package)[-1] == "thing=1.2"
    assert clients.apt_command(package, False)[-1] == "thing"


@pytest.mark.parametrize(("registry", "remedy"), [("npm", "npm config list"), ("debian", "apt-get update")])
def test_a_client_that_is_missing_or_fails_names_the_remedy(tmp_path, monkeypatch, registry, remedy):
    name = {"npm": "npm_command", "debian": "apt_command"}[registry]
    for command in (["no-such-program-here"], [sys.executable, "-c", "raise SystemExit('E: gone')"]):
        monkeypatch.setattr(clients, name, lambda *_, command=command: command)
        with pytest.raises(PackageError, match=remedy):
            fetch(Package("thing", "1", "0" * 64, registry=registry), cache=tmp_path / "cache")


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_once(real_cache):
    """The smoke variant's texts, read out of their packages once for all calls of `prepare`."""
    units = prepare_module._few(prepare_module._texts(prepare_module.SMOKE_SIZES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_texts", lambda sizes: iter(units))
        yield


def test_the_text_preset_is_written_once_and_goes_on_where_it_stopped(read_once, tmp_path, monkeypatch):
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
    first = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert prepare("text", folder, smoke=True, progress=False) == folder
    assert {file: file.stat().st_mtime_ns for file in first} == first
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
    # a task that a user removed is written again, as it was
    kept = (folder / "data" / "movies" / "train.jsonl").read_bytes()
    shutil.rmtree(folder / "data" / "movies")
    prepare("text", folder, smoke=True, progress=False)
    assert (folder / "data" / "movies" / "train.jsonl").read_bytes() == kept
    for other, smoke in (("text", False), ("images", True)):
        with pytest.raises(SubspaceError, match=r"holds the preset 'text' \(smoke\)"):
            prepare(other, folder, smoke=smoke, progress=False)


def test_the_slower_process_keeps_the_faster_ones_folder(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    put(tmp_path / "mine", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "file").read_text() == "theirs"
    with pytest.raises(OSError, match="missing"):
        put(tmp_path / "missing", tmp_path / "new")


def test_pairs_and_ratings_are_written_in_glue_s_columns(tmp_path):
    from offline.more_texts import RatingTask

    known = [Synset([f"w{i}"], i % 3, None, f"meaning number {i}", [f"an example with w{i}"]) for i in range(60)]
    known += [Synset(["x"], 0, None, "meaning number 1", ["an example of the same meaning"])]
    known += [Synset(["y"], 0, None, "without an example", []), Synset(["z"], 0, None, "too short", ["so short"])]
    pairs = meanings(known)
    texts = [row.text.split("\n") for row in pairs.rows]
    assert len(texts) == len({first for first, _ in texts}) == len({second for _, second in texts}) == 60
    own = {f"an example with w{i}": (f"meaning number {i}", i % 3) for i in range(60)}
    kinds = dict(own.values())
    for row, (first, second) in zip(pairs.rows, texts, strict=True):
        assert (own[first][0] == second) == (row.label == "fits")
        assert own[first][1] == kinds[second]
    ratings = RatingTask("ratings", "", [Row(f"text {i}", f"{i / 10 - 2}") for i in range(40)])
    sizes = {"train": 20, "validation": 10, "test": 10}
    for task, facts in ((pairs, ["sentence1", "sentence2"]), (ratings, ["sentence"])):
        name, said, write = prepare_module._text(task, sizes, held_out=False)
        assert said["keys"] == facts
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "train.jsonl").open()]
        assert [row["idx"] for row in rows] == list(range(20))
        assert set(rows[0]) == {*facts, "label", "idx"}
        if said["labels"] is None:
            assert said["metric"] == "pearson_spearman"
            assert all(row["label"] == int(row["sentence"].split()[1]) / 10 - 2 for row in rows)
        else:
            assert {said["labels"][row["label"]] for row in rows} == {"fits", "other"}


@pytest.mark.parametrize(
    ("content", "subject", "body"),
    {
        "plain": (b"Subject: Re: a\n b\n\none\n  two\n", "Re: a b", "one two"),
        "html": (b"Content-Type: text/html\n\n<title>t</title><b>one</b>&amp;<!-- x --> two", "", "one & two"),
        "unknown charset": (b"Content-Type: text/plain; charset=DEFAULT\n\n\xe9t\xe9", "", "été"),
        "bad subject": (b"Subject: =?nonsense?B?x?= y\n\nz", "=?nonsense?B?x?= y", "z"),
        "nothing": (b"", "", ""),
        "no parts": (b"Content-Type: multipart/mixed; boundary=q\n\nx", "", ""),
    }.values(),
)
def test_mails_are_read_however_malformed(content, subject, body):
    assert read_mail(content) == (subject, body)


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
    from offline.models import roberta_encoder

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
        pair = tokenizer("one text", "another", return_tensors="pt")
        assert list(pair) == ["input_ids", "attention_mask"]
        assert torch.isfinite(ours(**pair)[0]).all()


@pytest.mark.slow
def test_the_plain_vit_computes_what_the_backbone_does(real_cache, tmp_path):
    from offline.models import dinov2_backbone, vit_encoder

    folder = vit_encoder(tmp_path / "vit", 56)
    ours, backbone = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), dinov2_backbone()
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels)[0], backbone(pixels)[0], atol=1e-4, rtol=0)
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": 56, "width": 56}


@pytest.mark.slow
def test_the_mistral_computes_what_the_llama_does(real_cache, tmp_path):
    from offline.models import llama_lm, mistral_lm

    folder = mistral_lm(tmp_path / "mistral")
    ours, (llama, tokenizer) = AutoModelForCausalLM.from_pretrained(folder).eval(), llama_lm()
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, llama(**batch).logits, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["more-texts", "images", "instructions"])
def test_the_other_presets_are_written_small(real_cache, tmp_path, capfd, preset):
    folder = prepare(preset, tmp_path / preset, smoke=True, progress=False)
    known = tasks(folder)
    assert sorted(facts["held_out"] for facts in known.values()) == [False, False, False, True]
    assert json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"] == 2
    for name in known:
        for split, size in prepare_module.SMOKE_SIZES.items():
            place = folder / "data" / name
            found = place.joinpath(split).rglob("*.png") if preset == "images" else (place / f"{split}.jsonl").open()
            assert len(list(found)) == size
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_no_text_of_a_held_out_task_is_in_a_source(real_cache, tmp_path):
    folder = prepare("more-texts", tmp_path / "texts", progress=False)
    known = tasks(folder)
    assert [name for name, facts in known.items() if facts["held_out"]] == [
        "editorials",
        "editorials-rating",
        "news-sci",
    ]
    assert len(known) == 8 + 5 + 3
    texts: dict[bool, list[Row]] = {False: [], True: []}
    for name, facts in known.items():
        for file in (folder / "data" / name).glob("*.jsonl"):
            rows = [json.loads(line) for line in file.open()]
            texts[facts["held_out"]] += [Row(row[key], "") for row in rows for key in facts["keys"]]
    sources, held = TextTask("sources", "", texts[False]), TextTask("held", "", texts[True])
    assert len(held.without([sources]).rows) == len(held.rows) > 4000


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
            # before the colon stands the word whose definition may be another task's input
            else [json.loads(line)["input"].split(": ")[-1].encode() for file in files for line in file.open()]
        )
        assert len(content) > 500
        clashes = {seen[item] for item in content if item in seen}
        assert clashes <= {name} if preset == "images" else not clashes
        seen |= dict.fromkeys(content, name)
