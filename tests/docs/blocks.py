"""A page's code blocks, found by Sybil and evaluated in order, in one namespace and one folder.

    python                 executed; behind `<!-- given: names -->` with what `given.py` makes of these names (or
                           files); behind `<!-- no-run: reason; given names -->` compiled, and its names resolved but
                           for those given
    text behind a block    compared with what the block printed; behind `<!-- varies: reason -->` all but the numbers
    bash                   our commands parsed and, where all that they read is there, run; others: make targets,
                           extras, scripts and their flags
    yaml, json, toml       parsed
    text, or no language   not code

What Python prints has to be shown behind it. `subspace-peft …` and `make …` between backticks in a sentence are parsed
too, as far as they go.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from subspace_peft.cli.language import verbs_of

from . import commands, names
from .given import MAKERS
from .stand_ins import Folder

DATA: dict[str, Callable[[str], object]] = {
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    "json": json.loads,
    "toml": commands.tomllib.loads,
}
PROSE = ("text", "")
MARKS = ("no-run", "varies", "given")
FENCE = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))
# code that no fence holds, so that no region is made of it
UNFENCED = re.compile(r"\n\n((?: {4}|\t)(?:>>> |\$ |import |from \w+ import|subspace-peft |pip |print\()[^\n]*)")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
MARK = re.compile(r"<!-- ([\w-]+): ([^\n]+) -->\s*$")
# what a page says about itself, without saying what to type: `subspace-peft build`, `bundle create|add`
INLINE = re.compile(r"(?<!`)`((?:subspace-peft|make) [^`\n]+)`(?!`)")
# what needs the method to be known, which importing the package makes it; the tests' own process knows it already
LOADS = re.compile(r"(?:^|\.)(?:(?:Auto)?Peft\w+\.from_pretrained|load_adapter)$")


class Page:
    """A Markdown file, evaluated in the working folder.

    Args:
        file: The page.
        folder: The working folder's stand-ins.
    """

    def __init__(self, file: Path, folder: Folder | None = None) -> None:
        self.folder, self.counts = folder, Counter[str]()
        self.printed: tuple[int, str] | None = None  # where the block ended that printed last, and what
        self.given = False  # whether what the page leaves to its reader has been made
        self.imported = False  # whether a block that stands before has imported the package
        self.unseen: tuple[int, str] | None = None  # where the block before ended whose output is not known, and why
        self.document = Document.parse(str(file), self.regions)

    def regions(self, document: Document) -> Iterable[Region]:
        """Sybil's parser: a region per fenced block, with its evaluator."""
        for region in FENCE(document):
            region.parsed = region.lexemes["source"]
            region.evaluator = self.evaluate
            yield region

    def evaluate(self, example: Example) -> str | None:
        """Sybil's evaluator: what is wrong with a block, or None."""
        language, source = example.region.lexemes["language"].strip(), str(example.parsed)
        mark = MARK.search(self.document.text, 0, example.start)
        kind, reason = mark.groups() if mark else (None, None)
        if kind not in (None, *MARKS):
            return f"no such mark as {kind!r}, only {', '.join(MARKS)}"
        before, self.printed = self.printed, None
        unseen, self.unseen = self.unseen, None
        if language == "python":
            return self.python(example, source, kind, reason)
        if language == "bash":
            return self.shell(example, source, ran=kind != "no-run")
        if language in DATA:
            DATA[language](source)
            self.counts["data parsed"] += 1
            return None
        if language not in PROSE:
            return f"a block of {language!r} is not checked; known are python, bash, yaml, json, toml, text"
        if before is not None and self.follows(before[0], example.start):
            return self.output(before[1], source, varies=kind == "varies")
        if unseen is not None and self.follows(unseen[0], example.start):
            return f"nothing can be compared with this output: {unseen[1]}"
        return f"it is no output: no block that printed stands before it ({reason})" if kind == "varies" else None

    def python(self, example: Example, source: str, kind: str | None, reason: str | None) -> str | None:
        """Execute a block, or resolve its names."""
        faults = self.loads_before_import(source)
        if kind == "no-run":
            given = re.findall(r"\w+", str(reason).partition("; given ")[2])
            self.counts["Python resolved"] += 1
            self.unseen = example.region.end, "the block is not run"
            return "; ".join(faults + names.resolve(source, example.namespace, given)) or None
        if kind == "given":
            faults += self.give(example.namespace, re.split(r",\s*", str(reason)))
        said = io.StringIO()
        with self.prepared(source), contextlib.redirect_stdout(said):
            PythonEvaluator()(example)
        self.counts["Python executed"] += 1
        self.printed = example.region.end, said.getvalue()
        return "; ".join(faults + self.output_that_is_not_shown(example, said.getvalue())) or None

    def give(self, namespace: dict[str, object], wanted: list[str]) -> list[str]:
        """Put what a page leaves to its reader into `namespace`, once for all of its blocks."""
        page = Path(self.document.path).stem
        if page not in MAKERS or self.folder is None:
            return [f"nothing is made for {page}: see given.py"]
        if not self.given:
            self.given = True
            namespace.update(MAKERS[page](self.folder.root))
            self.folder.own.clear()  # of another basis, perhaps; what is made is what there is
        return [f"no {name} is made" for name in wanted if name not in namespace and not Path(name).exists()]

    def loads_before_import(self, source: str) -> list[str]:
        """Return what a fresh process would refuse: a task that is loaded where the method is not known yet."""
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.imported |= any(name.name.split(".")[0] == "subspace_peft" for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                self.imported |= str(node.module).split(".")[0] == "subspace_peft"
        called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        return [
            f"{name} before subspace_peft is imported" for name in called if LOADS.search(name) and not self.imported
        ]

    def output_that_is_not_shown(self, example: Example, said: str) -> list[str]:
        """Return a fault where a block prints and the page does not show it; a Trainer's own lines need not be."""
        own = [line for line in said.splitlines() if line.strip() and not re.match(r"\{'(?:train_|eval_|loss)", line)]
        following = re.sub(r"^\s*(?:<!--[^\n]*-->\s*)?", "", self.document.text[example.region.end :])
        return (
            ["the page does not show what it prints: " + own[0]] if own and not following.startswith("```text") else []
        )

    def shell(self, example: Example, source: str, ran: bool) -> str | None:
        """Check the commands of a block, and run those that can be."""
        faults, said, complete = [], [], ran
        for words in commands.commands(source):
            ours = commands.after_program(words)
            found = commands.check_other(words) if ours is None else None
            if ours is None:
                faults += found or []
                self.counts["other commands checked" if found is not None else "other programs"] += 1
                complete = False
                continue
            given, wrong = commands.parse(ours)
            faults += [f"`subspace-peft {' '.join(ours)}`: {each}" for each in wrong]
            if wrong or given is None or not ran or not commands.can_run(ours, given):
                self.counts["commands parsed"] += 1
                complete = False
                continue
            with self.prepared(" ".join(words)):
                status, printed, errors = commands.run(ours)
            self.counts["commands run"] += 1
            said.append(printed)
            if status:
                faults.append(f"`subspace-peft {' '.join(ours)}` ends with {status}: {errors.strip()}")
        if complete:
            self.printed = example.region.end, "".join(said)
        else:
            self.unseen = example.region.end, "not all of the commands before it are run"
        return "\n".join(faults) or None

    @contextlib.contextmanager
    def prepared(self, source: str) -> Iterable[None]:
        """Make way for what `source` writes, and have the stand-ins follow it."""
        if self.folder is not None:
            self.folder.make_way(source)
        yield
        if self.folder is not None:
            self.folder.follow()

    def follows(self, end: int, start: int) -> bool:
        """Return whether nothing but blanks and a mark is between two places."""
        return not re.sub(r"<!--.*?-->", "", self.document.text[end:start]).strip("`~ \n")

    def output(self, printed: str, shown: str, varies: bool) -> str | None:
        """Compare what was printed with what the page shows."""
        self.counts["outputs compared"] += 1
        if varies:
            printed, shown = (NUMBER.sub("N", text) for text in (printed, shown))
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if doctest.OutputChecker().check_output(shown, printed, flags):
            return None
        return f"the page shows\n{shown}\nbut the block printed\n{printed}"

    def inline(self) -> list[str]:
        """Return what is wrong with the commands that stand in sentences and tables."""
        blocks = [(region.start, region.end) for _, region in self.document.regions]
        faults = [
            f"code without a fence is not checked: {found[1].strip()}"
            for found in UNFENCED.finditer(self.document.text)
        ]
        for found in INLINE.finditer(self.document.text):
            if not any(start <= found.start() < end for start, end in blocks):
                self.counts["commands in sentences"] += 1
                faults += [f"`{found[1]}`: {fault}" for fault in check_mention(found[1])]
        return faults


def check_mention(command: str) -> list[str]:
    """Return what is wrong with a command in a sentence: its verb, its flags and, where it is whole, its arguments."""
    if command.startswith("make "):
        return commands.check_other(command.split()) or []
    words = command.replace("\\|", "|").split()[1:]
    known = verbs_of(commands.our_parser())
    if words[0].startswith("-"):
        return commands.parse(words)[1]
    tops = {name.split()[0] for name in known}
    faults = [f"no verb {verb}" for verb in words[0].split("|") if verb not in tops]
    if faults:
        return faults
    two = [name for name in known if len(words) > 1 and name in {f"{words[0]} {part}" for part in words[1].split("|")}]
    chosen = two or [name for name in known if name.split()[0] in words[0].split("|")]
    options = {option for name in chosen for action in known[name]._actions for option in action.option_strings}
    flags = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    faults = [f"no {flag}" for flag in flags if flag not in options]
    whole = not re.search(r"[…|\[]|\.\.\.", command) and len(words) > 1 + bool(two)
    # with flags only it may be half a command: `subspace-peft build --json`
    if not faults and whole and not words[1 + bool(two)].startswith("-"):
        faults = commands.parse(words)[1]
    return faults
