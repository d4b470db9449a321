"""The clients that fetch a package's archive: pip, npm, apt-get, with the user's own mirrors and proxies."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from subspace_peft.errors import SubspaceError

from .package import Package

REMEDIES = {
    "pypi": (
        "This needs pip (`python -m ensurepip`, or install subspace-peft[recipes]) and the package index or a mirror"
        " of it: check the network and pip's own settings (`pip config list`)"
    ),
    "npm": (
        "This needs npm (Debian: `apt-get install npm`) and its registry or a mirror: check the network and `npm"
        " config list`"
    ),
    "debian": (
        "This needs apt-get on a Debian or Ubuntu system whose package lists are there: run `apt-get update` once"
    ),
}


class PackageError(SubspaceError):
    """A package could not be fetched."""


def pip_command(package: Package, folder: Path, requirements: Path) -> list[str]:
    """Return the pip call that puts the archive of `package` into `folder`."""
    kind = ["--only-binary", ":all:"] if package.wheel else ["--no-binary", package.name]
    return [
        *(sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"),
        *("download", "--quiet", "--progress-bar", "off", "--no-deps", "--ignore-requires-python"),
        *("--require-hashes", "--requirement", str(requirements), *kind, "--dest", str(folder)),
    ]


def npm_command(package: Package, folder: Path) -> list[str]:
    """Return the npm call that puts the archive of `package` into `folder`; scripts of the package never run."""
    # not --silent: with that npm fails without a word about why
    where = ["--pack-destination", str(folder), "--ignore-scripts", "--loglevel=error"]
    return ["npm", "pack", f"{package.name}@{package.version}", *where]


def apt_command(package: Package, exact: bool = True) -> list[str]:
    """Return the apt-get call that puts the archive of `package` into the working directory, installing nothing.

    `exact`: of its very version; else of the one that the system's release has.
    """
    return ["apt-get", "download", "--quiet", f"{package.name}={package.version}" if exact else package.name]


def download(package: Package, folder: Path, waiting: Callable[[], object] | None = None) -> Path:
    """Put the archive of `package` into `folder` with its registry's own client and return its path.

    Args:
        package: what to fetch.
        folder: an existing folder.
        waiting: called every half second while the client works.

    Raises:
        PackageError: the client is missing or failed; carries the last lines of what it said.
    """
    target = folder / "download"
    target.mkdir()
    if package.registry == "npm":
        commands = [npm_command(package, target)]
    elif package.registry == "debian":
        # a mirror may call the very same archive by another version; `fetch` refuses any other one by its digest
        commands = [apt_command(package), apt_command(package, False)]
    else:
        # pip runs a source distribution's build script to read its metadata: it has to know the digest before that
        requirements = folder / "requirements.txt"
        requirements.write_text(
            f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8"
        )
        commands = [pip_command(package, target, requirements)]
    failures = []
    for command in commands:
        try:
            code, lines = _run(command, target, waiting)
        except FileNotFoundError:
            failures.append(f"there is no program {command[0]!r}")
            break
        found = sorted(target.iterdir())
        if code == 0 and len(found) == 1:
            return found[0]
        errors = [line for line in lines if not line.startswith(("WARNING", "W: "))] or lines
        said = "\n  ".join(errors[-6:] or ["nothing"])
        failures.append(f"{Path(command[0]).name} ended with code {code} and said:\n  {said}")
    raise PackageError(
        f"{package} could not be fetched: {failures[0]}\n"
        f"{REMEDIES[package.registry]}; then run it again; what was fetched so far is kept."
    )


def _run(command: list[str], folder: Path, waiting: Callable[[], object] | None) -> tuple[int, list[str]]:
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as said:
        with subprocess.Popen(command, stdout=said, stderr=said, cwd=folder) as client:
            while True:
                try:
                    code = client.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    if waiting is not None:
                        waiting()
                except BaseException:
                    client.terminate()
                    raise
        said.seek(0)
        return code, [line.strip() for line in said.read().splitlines() if line.strip()]


def open_debian(archive: Path, folder: Path) -> Path:
    """Write the tar file inside a Debian package into `folder` and return it.

    Raises:
        PackageError: dpkg-deb is missing, or the archive is none of its packages.
    """
    target = folder / "content.tar"
    try:
        with open(target, "wb") as file:
            subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=file, stderr=subprocess.PIPE, check=True
            )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        raise PackageError(
            f"{archive.name} could not be unpacked: {said.decode(errors='replace').strip()}. This needs dpkg-deb"
            " (Debian: `apt-get install dpkg`) and an undamaged package: fetch it again."
        ) from error
    return target
