"""The whole command line: its verbs in groups. Parsing needs no heavy import, so that ``--help`` is quick."""

from __future__ import annotations

from argparse import ArgumentParser

from .._version import __version__
from .building import add_build
from .bundles import add_bundle
from .completion import add_completion
from .compressing import add_compress
from .continual import add_continual
from .converting import add_export_lora, add_project
from .environment import add_env
from .inspecting import add_inspect, add_validate
from .judging import add_analyze, add_report
from .language import flags_of_verb, verbs_of
from .migrating import add_migrate
from .parsers import Parser, adder, shorten_usage
from .recipes import add_copy, add_demo, add_run
from .sharing import add_cache, add_push
from .verbosity import add_verbosity
from .versions import add_complete, add_record_base, add_update

VERBS = {
    "build and grow": (add_build, add_update, add_complete, add_migrate, add_continual, add_record_base),
    "inspect and judge": (add_inspect, add_validate, add_analyze, add_report),
    "convert": (add_project, add_export_lora),
    "share": (add_push, add_cache),
    "serve": (add_bundle, add_compress),
    "learn": (add_demo, add_copy, add_run),
    "this installation": (add_env, add_completion),
}
SILENT = ("run",)  # all that follows belongs to the script


def parser() -> ArgumentParser:
    """Return the whole command line."""
    top = Parser(
        prog="subspace-peft",
        description=(
            "Many LoRA adapters on one base model become one frozen shared basis, in which each task takes kilobytes."
            " Tasks are trained, saved, merged and served by stock PEFT."
        ),
        epilog=(
            "`subspace-peft VERB --help` shows a verb's options with examples. SUBSPACE_PEFT_VERBOSITY (debug, info,"
            " warning, error, critical) sets how much is said, as -v and -q do."
        ),
    )
    top.add_argument("--version", action="version", version=f"subspace-peft {__version__}", help="print the version")
    add_verbosity(top, first=True)
    verbs, add = adder(top, "verb", "VERB")
    groups: dict[str, list[str]] = {}
    for title, adders in VERBS.items():
        for add_verb in adders:
            before = set(verbs.choices)
            add_verb(add)
            groups.setdefault(title, []).extend(name for name in verbs.choices if name not in before)
    verbs.groups = groups
    for name, verb in verbs_of(top).items():
        if name not in SILENT:
            add_verbosity(verb)
        verb.set_defaults(flags=flags_of_verb(verb), parsed_by=verb)
        shorten_usage(verb)
    for name in ("bundle", "cache", "continual"):
        shorten_usage(verbs.choices[name])
    verbs.choices["completion"].set_defaults(top=top)
    shorten_usage(top)
    return top
