"""The demo's packages: fetched without trusting, unpacked without climbing out."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from offline import clients
from offline.archives import unpack
from offline.clients import PackageError
from offline.packages import Package, fetch, fetch_all, find

from subspace_peft.errors import BadFileError


def zipped(file: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file


def tarred(file: Path, members: dict[str, str], link: str | None = None) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
        if link is not None:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return file


def package_of(archive: Path, **changes: object) -> Package:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Package(**{"name": "thing", "version": "1", "sha256": digest, **changes})


# -- archives and packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [zipped, tarred])
def test_only_the_wanted_members_are_unpacked(make, tmp_path):
    archive = make(tmp_path / "a", {"x/data.txt": "1", "x/code.py": "2"})
    assert unpack(archive, tmp_path / "out", ("*.txt",)) == 1
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["data.txt"]


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize("name", ["../out.txt", "/abs.txt", "a/../../b.txt", "C:/x.txt"])
def test_members_that_climb_out_are_refused(make, name, tmp_path):
    with pytest.raises(BadFileError, match="outside the folder"):
        unpack(make(tmp_path / "a", {name: "1"}), tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("*.txt"))


def test_links_are_left_out(tmp_path):
    unpack(tarred(tmp_path / "a", {"x.txt": "1"}, link="/etc/passwd"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.txt"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x1f\x8b torn", b"nothing of the kind"])
def test_damaged_archives_are_refused(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BadFileError, match="cannot be unpacked"):
        unpack(tmp_path / "a", tmp_path / "out")


def test_a_package_is_fetched_once_and_verified(tmp_path):
    archive = zipped(tmp_path / "a.whl", {"thing/data.txt": "1"})
    calls = []
    package = package_of(archive)

    def download(wanted: Package, folder: Path) -> Path:
        calls.append(wanted.name)
        return Path(archive)

    for _ in range(2):
        folder = fetch(package, cache=tmp_path / "cache", download=download)
    assert calls == ["thing"]
    assert find(folder, "thing/data.txt").read_text() == "1"
    with pytest.raises(BadFileError, match="no file ends with"):
        find(folder, "other.txt")


def test_another_archive_than_recorded_is_refused_and_leaves_nothing(tmp_path):
    archive = zipped(tmp_path / "a.whl", {"thing/data.txt": "1"})
    package = package_of(archive, sha256="0" * 64)
    with pytest.raises(BadFileError, match="0" * 64):
        fetch(package, cache=tmp_path / "cache", download=lambda *_: archive)
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_that_fails_says_so(tmp_path, monkeypatch):
    program = "import sys; print('ERROR: no such thing', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(clients, "pip_command", lambda *_: [sys.executable, "-c", program])
    with pytest.raises(PackageError, match="no such thing"):
        fetch(Package("thing", "1", "0" * 64), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_all_reports_every_folder(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "a.whl", {"thing/data.txt": "1"})
    monkeypatch.setattr(clients, "download", lambda package, folder, waiting=None: archive)
    folders = fetch_all([package_of(archive)], progress=False, cache=tmp_path / "cache")
    assert (folders["thing"] / "thing" / "data.txt").is_file()
