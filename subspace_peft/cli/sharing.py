"""``subspace-peft push`` and `cache`: bases, tasks and bundles on the Hub. Imports happen inside."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..errors import SubspaceError
from ..hub import noted_uploads
from .common import Add, add_json, print_json, refuse_idle
from .parsers import HUB, SOURCES, adder, grouped


def add_push(add: Add) -> None:
    """Add the verb ``push``."""
    verb = add(
        "push",
        help="upload a basis, a task or a bundle",
        description=(
            "Upload a basis, a saved task or a bundle to the Hub in one commit, and print its address. A task's or"
            " bundle's basis is pinned to a commit first."
        ),
    )
    verb.add_argument("folder", metavar="PATH", help="folder of the basis, the task or the bundle")
    verb.add_argument("repo_id", metavar="REPO", help="org/name; made where there is none")
    hub = grouped(verb, HUB)
    hub.add_argument(
        "--push-basis-to", metavar="REPO", help="push a task's or bundle's basis as well, where it is local only"
    )
    hub.add_argument("--force", action="store_true", help="push although its basis is local only")
    hub.add_argument("--private", action="store_true", help="make new repositories private")
    hub.add_argument("--branch", help="other than main; made where there is none")
    hub.add_argument("--message", help="of the commit")
    hub.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    add_json(verb)
    verb.set_defaults(run=push)


def add_cache(add: Add) -> None:
    """Add the verb ``cache`` with its own verbs."""
    top = add(
        "cache",
        help="list, verify or remove fetched bases",
        description=(
            "List, verify or remove the bases that this machine has fetched from the Hub. They lie in the folder that"
            " SUBSPACE_PEFT_CACHE names, or in ~/.cache/subspace_peft."
        ),
    )
    _, verb = adder(top, "what", "VERB")
    said = {
        "ls": (
            "list fetched bases",
            "List the bases that this machine has fetched. Nothing of them is read but their configs.",
        ),
        "verify": (
            "read fetched bases and check their hashes",
            "Read fetched bases and hold every tensor against its hash. The exit status is 1 if any is damaged.",
        ),
        "rm": (
            "remove fetched bases",
            "Remove fetched bases from this machine. Tasks whose record names a place on the Hub fetch theirs again.",
        ),
    }
    for name, (line, text) in said.items():
        each = verb(name, help=line, description=text)
        each.add_argument(
            "fingerprint",
            nargs="*",
            metavar="FINGERPRINT",
            help="of the bases; their beginnings suffice" + ("" if name == "rm" else "; all by default"),
        )
        if name == "rm":
            grouped(each, SOURCES).add_argument("--all", action="store_true", help="every one")
        add_json(each)
        each.set_defaults(run=cache)


def push(args: Namespace) -> int:
    """Upload a basis, a task or a bundle."""
    folder = Path(args.folder).expanduser()
    with noted_uploads() as uploads, _bars_of_the_hub(not args.quiet):
        kind = _push(folder, args)
    # a basis that goes along is uploaded before
    last = uploads[-1]
    if args.json:
        facts = {"kind": kind, "repo_id": args.repo_id, "revision": last.revision, "url": last.url}
        return print_json({**facts, "uploads": [asdict(each) for each in uploads]})
    print(f"{args.repo_id}@{last.revision} ({kind})")
    for each in uploads:
        print(each.url)
    return 0


@contextmanager
def _bars_of_the_hub(shown: bool) -> Iterator[None]:
    """Hide huggingface_hub's bars of uploads within, unless they are wanted."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _push(folder: Path, args: Namespace) -> str:
    """Upload what lies in a folder; returns its kind."""
    common = {"private": args.private or None, "commit_message": args.message, "create_pr": args.create_pr}
    dependent = {**common, "push_basis_to": args.push_basis_to, "force": args.force, "revision": args.branch}
    from ..basis.stored import CONFIG_FILE
    from ..bundle.format import BUNDLE_FILE

    if (folder / CONFIG_FILE).is_file():
        from ..basis import SubspaceBasis

        for flag in ("--push-basis-to", "--force"):
            refuse_idle(args, flag, f"on a basis, which {folder} is")
        SubspaceBasis.from_pretrained(folder).push_to_hub(args.repo_id, branch=args.branch, **common)
        return "basis"
    if (folder / BUNDLE_FILE).is_file():
        from ..bundle import push_bundle

        push_bundle(folder, args.repo_id, **dependent)
        return "bundle"
    if (folder / "adapter_config.json").is_file():
        from ..tasks.push import push_saved_task

        push_saved_task(folder, args.repo_id, **dependent)
        return "task"
    from ..tasks.pipeline_task import check_one_task

    check_one_task(folder)
    raise SubspaceError(f"{folder}: neither a basis, a task nor a bundle is in there.")


def cache(args: Namespace) -> int:
    """List, verify or remove fetched bases."""
    from ..basis import cache as kept
    from ..basis.dependents import dependents_of, named_dependents

    if args.what == "rm" and not args.fingerprint and not args.all:
        raise SubspaceError("give the beginning of a fingerprint, or --all. `subspace-peft cache ls` lists them.")
    if args.what == "rm" and args.fingerprint:
        refuse_idle(args, "--all", f"beside a fingerprint: only {', '.join(args.fingerprint)} would be removed")
    chosen = [kept.find_entry(start) for start in args.fingerprint] or list(kept.entries())
    facts = []
    for entry in chosen:
        fact = {
            "fingerprint": entry.fingerprint,
            "location": entry.location,
            "revision": entry.revision,
            "bytes": entry.bytes,
            "modules": entry.modules,
            "base_model": entry.base_model,
        }
        if args.what == "verify":
            fact["problem"] = kept.verify(entry)
        if args.what == "rm":
            fact["dependents"] = dependents_of(entry.fingerprint)
            kept.remove(entry)
        facts.append(fact)
    if args.json:
        print_json(facts)
    elif not facts:
        print("The cache is empty.")
    else:
        for fact in facts:
            done = {"rm": "removed: ", "verify": f"{fact.get('problem') or 'intact'}: ", "ls": ""}[args.what]
            print(
                f"{done}{fact['fingerprint'][:12]}  {fact['bytes']:,} bytes, {fact['modules']} modules of"
                f" {fact['base_model']}, from {fact['location']}@{(fact['revision'] or '')[:12]}"
            )
            if args.what == "rm" and (words := named_dependents(fact["fingerprint"], ("folder", "hub"))):
                print(f"  {words}; it is fetched again where they record its place on the Hub")
    return 1 if any(fact.get("problem") for fact in facts) else 0
