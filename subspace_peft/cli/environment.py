"""``subspace-peft env``: what a report of a bug has to say of the machine, without a secret. Imports happen inside."""

from __future__ import annotations

import os
import platform
import re
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .._version import __version__
from .common import Add, add_json, print_json
from .parsers import RUNS, grouped

PACKAGES = (
    "torch",
    "peft",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "tqdm",
    "bitsandbytes",
    "diffusers",
    "trl",
    "vllm",
    "matplotlib",
    "gguf",
    "shtab",
)
VARIABLES = (
    "SUBSPACE_PEFT_CACHE",
    "SUBSPACE_PEFT_HUB_WAIT",
    "SUBSPACE_PEFT_VERBOSITY",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "RANK",
    "WORLD_SIZE",
)
# said to be set, never what they are
SECRET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# what stands in tables as it is, underscores and all
NAMES = frozenset(("subspace_peft", *PACKAGES, *VARIABLES, *SECRET))


def add_env(add: Add) -> None:
    """Add the verb ``env``."""
    verb = add(
        "env",
        help="versions, folders and devices, for bug reports",
        description=(
            "Print versions, cache folders, devices and settings as Markdown, to be pasted into a bug report. No token"
            " is printed, and the home folder stands as ~."
        ),
    )
    grouped(verb, RUNS).add_argument(
        "--no-devices", action="store_true", help="do not ask torch for devices, which takes a second"
    )
    add_json(verb)
    verb.set_defaults(run=env)


def env(args: Namespace) -> int:
    """Print what is installed and set."""
    facts = environment(devices=not args.no_devices)
    if args.json:
        return print_json(facts)
    for title, key in (("Versions", "versions"), ("Cache", "cache"), ("Hub", "hub"), ("Devices", "devices")):
        if facts[key] is not None:
            print(f"### {title}\n\n{_table(facts[key])}\n")
    print(
        f"### Environment variables\n\n{_table(facts['variables']) if facts['variables'] else 'None of ours is set.'}"
    )
    return 0


def environment(devices: bool = True) -> dict[str, Any]:
    """Return what is installed and set, as JSON values.

    Args:
        devices: ask torch for them, which is imported for it.
    """
    return {
        "versions": {
            "subspace_peft": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
        },
        "cache": _cache(),
        "hub": _hub(),
        "devices": _devices() if devices else None,
        "variables": {
            **{name: _said(os.environ[name]) for name in VARIABLES if name in os.environ},
            **{name: "set" for name in SECRET if os.environ.get(name)},
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cache() -> dict[str, Any]:
    from ..basis import cache

    home = cache.cache_home()
    notes = [each for each in ("locations", "dependents") if (home / each).is_dir()]
    try:
        bases = list(cache.entries())
    except OSError as error:
        return {"folder": _said(str(home)), "problem": _said(str(error))}
    return {
        "folder": _said(str(home)),
        "bases": len(bases),
        "bytes_of_bases": sum(each.bytes for each in bases),
        "notes": sum(1 for each in notes for _ in (home / each).iterdir()),
    }


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    # a user and a password may stand before an @
    endpoint = place._replace(netloc=place.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return {
        "endpoint": endpoint,
        "offline": bool(constants.is_offline_mode()),
        "cache_folder": _said(constants.HF_HUB_CACHE),
        "token": bool(os.environ.get("HF_TOKEN")) or Path(constants.HF_TOKEN_PATH).is_file(),
    }


def _devices() -> dict[str, Any]:
    try:
        return _devices_of_torch()
    except Exception as error:  # a torch that cannot be imported, or a broken driver, is what the report is about
        return {"cpu_cores": os.cpu_count(), "problem": _said(f"{type(error).__name__}: {error}")}


def _devices_of_torch() -> dict[str, Any]:
    import torch

    cuda = []
    if torch.cuda.is_available():
        for place in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(place)
            cuda.append({"name": known.name, "bytes": known.total_memory})
    return {
        "cpu_cores": os.cpu_count(),
        "cpu_cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads_of_torch": torch.get_num_threads(),
        "bytes_of_memory": _memory(),
        "cuda": cuda,
        "cuda_of_torch": torch.version.cuda,
        "mps": bool(torch.backends.mps.is_available()),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # not on Windows


def _said(text: str) -> str:
    """Return a text with the home folder as ~ and without what signs of a token."""
    try:
        home = str(Path.home())
    except RuntimeError:
        home = ""
    text = text.replace(home, "~") if len(home) > 1 else text
    text = re.sub(r"\bhf_\w{8,}", "hf_…", text)
    return re.sub(r"(?<=://)[^/\s@]+@", "", text)


def _table(facts: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for key, value in facts.items():
        shown = "not installed" if value is None else value
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, int) and "bytes" in key:
            shown = f"{value:,}"
        elif isinstance(value, list):
            shown = ", ".join(f"{each['name']} ({each['bytes']:,} bytes)" for each in value) or "none"
        lines.append(f"| {key if key in NAMES else key.replace('_', ' ')} | {shown} |")
    return "\n".join(lines)
