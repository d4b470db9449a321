"""``subspace-peft VERB``: argument parsing only, so that ``--help`` needs no heavy import."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence

from .._version import __version__
from . import building, bundles, verbs
from .bundles import DTYPES, add_bundle
from .versions import add_complete, add_migrate, add_update


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="subspace-peft",
        description="Many LoRA adapters, one frozen basis, kilobyte tasks, in stock PEFT.",
    )
    top.add_argument("--version", action="version", version=f"subspace-peft {__version__}")
    add = top.add_subparsers(dest="verb", metavar="VERB", required=True).add_parser

    build = add(
        "build",
        help="build a basis from LoRA adapters",
        description=(
            "Build a basis from LoRA adapters. Interrupted, the same command goes on from the modules kept in"
            " FOLDER.partial. Started by `accelerate launch -m subspace_peft build …`, processes and machines divide"
            " the work."
        ),
    )
    build.add_argument(
        "sources",
        nargs="*",
        metavar="ADAPTER",
        help=(
            "LoRA folder or file, org/name[@revision][:folder], collection:owner/slug, a pattern, or a .txt with one a"
            " line"
        ),
    )
    build.add_argument("--out", metavar="FOLDER", help="where to write the basis")
    build.add_argument(
        "--dry-run", action="store_true", help="read and check the sources, say what building takes, build nothing"
    )
    build.add_argument(
        "--from-config",
        metavar="BASIS",
        help="build a basis again: its own sources, held against their hashes, and its arguments",
    )
    build.add_argument("-k", "--k", help="directions per side, or a share of energy to keep (0.9); default: 32")
    build.add_argument(
        "--budget",
        type=int,
        metavar="NUMBERS",
        help="instead of -k, what a task may train in all: spread to where the fleet holds most above chance",
    )
    build.add_argument("--k-in", type=int, help="directions on the input side, where they differ")
    build.add_argument(
        "--builder",
        default="adapters",
        choices=["adapters", "eigenlora", "random", "base-weights"],
        help="where the basis comes from (default: %(default)s)",
    )
    build.add_argument(
        "--weights",
        default="equal",
        metavar="HOW",
        help="how sources count: equal (default), norm, or a JSON file of numbers by source",
    )
    build.add_argument("--alternations", type=int, default=10, help="most rounds after the HOSVD")
    build.add_argument("--directions", type=int, default=0, metavar="M", help="direction tensors to keep")
    build.add_argument(
        "--leave-one-out",
        action=argparse.BooleanOptionalAction,
        help="measure what a basis built without a source keeps of it (default: for 2 to 8 sources)",
    )
    build.add_argument(
        "--complete",
        choices=["random", "base-weights"],
        help="fill up to k where the fleet spans fewer directions (default: leave it at those)",
    )
    build.add_argument("--like", metavar="BASIS", help="a basis whose modules and sizes `random` takes over")
    build.add_argument(
        "--base-model",
        help=(
            "model id or folder: for `random` and `base-weights`, --complete base-weights, and to convert adapters"
            " that are no LoRA"
        ),
    )
    build.add_argument("--target-modules", nargs="+", metavar="NAME", help="its modules")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument(
        "--clusters",
        metavar="N",
        help=(
            "several bases, FOLDER/cluster-0 …, of the parts of the fleet that they keep most of: a number, or 'auto'"
            " for as many as pay"
        ),
    )
    build.add_argument(
        "--precision",
        choices=["float32", "bfloat16", "float16", "int8"],
        help="what U and V are stored as (default: float32); the basis says what of the energy that loses",
    )
    build.add_argument("--skip-bad", action="store_true", help="leave bad sources out, each with its reason")
    build.add_argument("--allow-bin", action="store_true", help="read pickled adapter_model.bin too, weights_only")
    build.add_argument("--partial", action="store_true", help="allow modules that only some sources adapt")
    build.add_argument(
        "--max-memory",
        default="2GB",
        metavar="SIZE",
        help=(
            "what building may take beside the interpreter (default: %(default)s); the basis is the same whatever"
            " it is"
        ),
    )
    build.set_defaults(run=building.build)

    update, migrate, complete = add_update(add), add_migrate(add), add_complete(add)

    look = add(
        "inspect", help="say what a basis or a task is", description="Say what a basis or a task is; verify it."
    )
    look.add_argument("path", help="folder or Hub id")
    look.add_argument("--no-verify", action="store_true", help="do not read and hash every tensor")
    look.set_defaults(run=verbs.inspect)

    check = add(
        "validate",
        help="check a basis file",
        description=(
            "Check a basis: hashes, fingerprint, shapes, finite values, orthonormal directions. Exit status 1 if"
            " anything is wrong."
        ),
    )
    check.add_argument("basis", help="folder or Hub id")
    check.set_defaults(run=verbs.validate)

    analyze = add(
        "analyze",
        help="compare adapters with one another, and with a basis",
        description=(
            "Pairwise similarity of the adapters' updates, near-duplicates, shared seeds, outliers, and what a basis"
            " keeps of each."
        ),
    )
    analyze.add_argument("sources", nargs="+", metavar="ADAPTER", help="as for build")
    analyze.add_argument("--basis", help="folder or Hub id of a basis")
    analyze.add_argument("--base-model", help="model id or folder, to convert adapters that are no LoRA")
    analyze.add_argument("--allow-bin", action="store_true", help="read pickled adapter_model.bin too, weights_only")
    analyze.set_defaults(run=verbs.analyze)

    report = add(
        "report",
        help="say what a basis is worth for a fleet",
        description=(
            "Hold a basis against a fleet, from weights alone: spectra beside noise of the same strength, what it"
            " keeps of adapters it has seen and has not, a k, and a verdict. Writes report.html, report.json and the"
            " figures."
        ),
    )
    report.add_argument("basis", help="folder or Hub id")
    report.add_argument(
        "--fleet",
        nargs="+",
        metavar="ADAPTER",
        help="as for build; default: the basis's own sources, where they still are",
    )
    report.add_argument("--out", default="basis-report", metavar="FOLDER", help="default: %(default)s")
    report.add_argument(
        "--sample", type=int, default=64, metavar="N", help="measure at most so many adapters (default: %(default)s)"
    )
    report.add_argument(
        "--modules", type=int, metavar="N", help="measure so many modules (default: all, 16 where ranks are many)"
    )
    report.add_argument("--seed", type=int, default=0, help="of the sample, the folds and the noise")
    report.add_argument("--base-model", help="model id or folder, to convert adapters that are no LoRA")
    report.add_argument("--allow-bin", action="store_true", help="read pickled adapter_model.bin too, weights_only")
    report.set_defaults(run=verbs.report)

    project = add(
        "project",
        help="turn a LoRA into coefficients",
        description="Project a LoRA on a basis and say how much of it the basis keeps.",
    )
    project.add_argument("lora", help="LoRA folder, or Hub id with @revision")
    project.add_argument("--basis", required=True, help="folder or Hub id of the basis")
    project.add_argument("--out", metavar="FOLDER", help="write the coefficients as a task")
    project.add_argument("--no-base-check", action="store_true", help="accept another base model's name")
    project.set_defaults(run=verbs.project)

    export = add(
        "export-lora",
        help="turn a task into a stock PEFT LoRA",
        description="Write a task as a stock PEFT LoRA folder: exact, no SVD unless --rank asks for one.",
    )
    export.add_argument("task", help="folder or Hub id of a task")
    export.add_argument("--out", required=True, metavar="FOLDER")
    export.add_argument("--basis", help="where the basis is, if not where the task says")
    export.add_argument("--rank", type=int, help="truncate to this rank")
    export.add_argument("--pad-to", help="fill up to this rank with zeros, or 'vllm'")
    export.add_argument("--no-modules-to-save", action="store_true", help="leave classifiers and the like out")
    export.set_defaults(run=verbs.export_lora)

    add_bundle(add)

    compress = add(
        "compress",
        help="turn a fleet of LoRAs into a bundle",
        description="Project LoRAs on a basis and pack them into one bundle; say what is kept, lost and saved.",
    )
    compress.add_argument("loras", nargs="+", metavar="LORA", help="LoRA folder, or Hub id with @revision")
    compress.add_argument("--basis", required=True, help="folder or Hub id of the basis")
    compress.add_argument("--out", required=True, metavar="FOLDER", help="the bundle's folder")
    compress.add_argument(
        "--min-energy",
        default="0.5",
        metavar="SHARE",
        help="refuse an adapter of which less than this is kept, residual and all (default: %(default)s)",
    )
    compress.add_argument(
        "--residual",
        type=int,
        default=0,
        metavar="RANK",
        help="below the threshold, keep a residual of up to this rank (1 to 4 are usual)",
    )
    compress.add_argument("--skip-bad", action="store_true", help="leave refused adapters out, each with its reason")
    compress.add_argument("--no-base-check", action="store_true", help="accept another base model's name")
    compress.add_argument("--dtype", default="float32", choices=DTYPES, help="of stored numbers")
    compress.set_defaults(run=bundles.compress)

    push = add(
        "push",
        help="upload a basis, a task or a bundle",
        description=(
            "Upload a basis, a saved task or a bundle to the Hub in one commit; a task's basis is pinned to a commit"
            " first."
        ),
    )
    push.add_argument("folder", help="of the basis, the task or the bundle")
    push.add_argument("repo_id", help="org/name; made where there is none")
    push.add_argument(
        "--push-basis-to", metavar="REPO", help="push a task's or bundle's basis as well, where it is local only"
    )
    push.add_argument("--force", action="store_true", help="push although its basis is local only")
    push.add_argument("--private", action="store_true", help="make new repositories private")
    push.add_argument("--branch", help="other than main; made where there is none")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.set_defaults(run=verbs.push)

    cache = add(
        "cache",
        help="list, verify or remove fetched bases",
        description="List, verify or remove the bases this machine has fetched.",
    )
    cache.add_argument("what", choices=["ls", "verify", "rm"], help="what to do")
    cache.add_argument(
        "fingerprint", nargs="*", help="their beginnings suffice; all by default, which rm wants said by --all"
    )
    cache.add_argument("--all", action="store_true", help="remove every one")
    cache.set_defaults(run=verbs.cache)

    demo = add(
        "demo",
        help="the whole path on real data, in minutes",
        description=(
            "Train a fleet on real text tasks, build its basis, train held-out tasks in it beside their controls."
        ),
    )
    demo.add_argument("--out", default="demo-output", metavar="FOLDER")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="a minute's version, whose scores mean nothing")
    demo.set_defaults(run=verbs.demo)

    copy = add(
        "cp",
        help="copy a recipe out to edit",
        description="Copy a recipe out to edit; without a name, list them.",
    )
    copy.add_argument("recipe", nargs="?", help="glue, image_classification, mistral …")
    copy.add_argument("--out", default=".", metavar="PLACE", help="a folder, or a file's name ending in .py")
    copy.add_argument("--force", action="store_true", help="overwrite a file that is there")
    copy.set_defaults(run=verbs.copy)

    run = add(
        "run",
        help="run a stock script with the plugin imported",
        description="Import subspace_peft, then run a script (or -m module) unchanged.",
    )
    run.add_argument(
        "script", nargs=argparse.REMAINDER, metavar="SCRIPT …", help="script.py or -m module, and arguments"
    )
    run.set_defaults(run=verbs.run)

    every = (
        build,
        update,
        migrate,
        complete,
        look,
        check,
        analyze,
        report,
        project,
        export,
        compress,
        push,
        cache,
        demo,
        copy,
    )
    for verb in every:
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
    for verb in (build, update, migrate, complete, analyze, report, project, export, compress, demo):
        verb.add_argument("--quiet", action="store_true", help="no progress bars")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error on the way, 2 for wrong arguments."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):
        # whatever follows belongs to the script, `-m` and other options too, which argparse would claim
        arguments = argparse.Namespace(verb="run", run=verbs.run, script=argv[1:])
    else:
        arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        again = "; the same command goes on from the finished modules" if arguments.verb in ("build", "update") else ""
        print(f"interrupted; nothing half-written is left behind{again}", file=sys.stderr)
        return 130
    except Exception as error:
        from ..errors import ProcessError, SubspaceError

        if not isinstance(error, (SubspaceError, OSError)):
            raise
        # of several processes that a launcher started, the one that failed speaks for itself, and the first of the
        # others for the rest
        rank = int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else None
        if not (rank and isinstance(error, ProcessError)):
            who = "" if rank is None else f", process {rank} of {os.environ['WORLD_SIZE']} on {platform.node()}"
            print(f"subspace-peft {arguments.verb}{who}: {error}", file=sys.stderr)
        return 1
