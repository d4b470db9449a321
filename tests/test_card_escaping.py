"""Cards of things with hostile names: whatever a name holds, it stays within its sentence, cell or line of code."""

from __future__ import annotations

import ast
import dataclasses
import html
import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from subspace_peft.cards import BaseFacts, basis_card, bundle_card, recorded, task_card
from subspace_peft.cards.markdown import arguments, code, literal, one_line, text
from subspace_peft.cards.readme import BEGIN, END, Card, merge

from .test_cards import BARE_TASK, BASIS, BUNDLE, TASK

HOSTILE = (
    "`rm -rf`",
    "``` `` end\n```\nprint('out')",
    "a|b\\|c",
    "one\ntwo\r\n\n# heading\n- item\n---\nlicense: mit",
    "---",
    "{{ facts.place }}{% raw %}{# gone #}",
    "<script>alert(1)</script><!-- x --></details>",
    f"{END}\n{BEGIN}\n<!-- front matter: license=00000000 -->",
    "[click](javascript:alert(1)) ![image](http://x) *bold* _it_ __b__ &lt; &amp;",
    '"); import os; os.system("x") #\'',
    "\\",
    "line\u2028separator\x00\x07\x1b[31m",
    "1. item",
    "    # indented",
    "first_task_2",
    "ΔW “é” 🤗",
    "x" * 300,
    "~~gone~~ ~a~",
    "costs $5$ or $$x_1$$",
    "a | b || `c` <b>d</b> <!-- e",
    "|",
    "`",
)
# what Python or a Hub identifier is made of, and not free text
KEPT = ("auto_class", "task_type", "code", "imports", "loading", "skipped")
CARDS = {
    "basis": (basis_card, BASIS),
    "task": (task_card, TASK),
    "bare task": (task_card, BARE_TASK),
    "bundle": (bundle_card, BUNDLE),
}

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def hostile(value: Any, word: str) -> Any:
    """The same facts with `word` for every text in them."""
    if isinstance(value, str):
        return word
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {key: hostile(each, word) for key, each in fields.items() if key not in KEPT}
        return dataclasses.replace(value, **changed)
    if isinstance(value, Mapping):
        return {key: hostile(each, word) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(hostile(each, word) for each in value)
    return value


def parsed(markdown: str) -> list[tuple[str, str]]:
    """Kinds and tags of the blocks of a text, without those within lines."""
    return [(token.type, token.tag) for token in MARKDOWN.parse(markdown)]


def shown(markdown: str) -> str:
    """The text that a reader sees of a paragraph."""
    return html.unescape(re.sub("<[^>]*>", "", MARKDOWN.render(markdown)))


@pytest.mark.parametrize("word", HOSTILE)
@pytest.mark.parametrize("kind", CARDS)
def test_a_hostile_word_changes_no_structure(kind, word):
    render, facts = CARDS[kind]
    benign, card = render(hostile(facts, "word")), render(hostile(facts, word))
    assert parsed(card.body) == parsed(benign.body)
    assert statements(card) == statements(benign)
    whole = card.text()
    front, rest = whole.removeprefix("---\n").split("\n---\n", 1)
    assert rest.count(BEGIN) == rest.count(END) == 1
    front = yaml.safe_load(front)
    # a word that is no Hub id is no base model
    assert {*front, "base_model", "base_model_relation"} >= {*benign.front}
    assert front["library_name"] == "peft" and "license" not in front
    assert merge(whole, card) == whole
    assert re.findall("</?[a-z]+>", shown_html(card)) == re.findall("</?[a-z]+>", shown_html(benign))


def statements(card: Card) -> list[list[type]]:
    """Kinds of the statements in each of a card's blocks of code."""
    blocks = re.findall(r"^(`{3,})python\n(.*?)^\1$", card.body, re.DOTALL | re.MULTILINE)
    return [[type(each) for each in ast.parse(lines).body] for _, lines in blocks]


def shown_html(card: Card) -> str:
    """The HTML of a card without its code, where anything may stand."""
    made = MARKDOWN.render(f"# {card.title}\n\n{card.body}")
    return re.sub("<code[^>]*>.*?</code>", "", made, flags=re.DOTALL)


@pytest.mark.parametrize("word", HOSTILE)
def test_a_word_reads_as_it_was_given(word):
    wanted = " ".join(one_line(word).split())
    assert " ".join(shown(str(text(word))).split()) == wanted
    assert " ".join(shown(str(code(word))).split()) == wanted
    row = f"| a | b |\n| --- | --- |\n| {text(word)} | {code(word, cell=True)} |\n"
    assert len(re.findall("<td>", MARKDOWN.render(row))) == 2
    # formulas are the Hub's own Markdown
    assert not re.search(r"(?<!\\)\$", str(text(word)))
    assert eval(literal(word)) == word
    assert "\n" not in arguments(word, key=word)


def test_plain_names_stay_as_they_are():
    for name in ("first_task-2.0", "org/name", "apache-2.0", "k=8…16", "-0.5", "1.5e-3", "C:D", "a & b", "2.", "x #1"):
        assert str(text(name)) == name.replace("2.", "2\\.") if name == "2." else str(text(name)) == name


def test_what_is_no_python_name_is_no_class_to_import():
    base = dataclasses.replace(TASK.base, auto_class="os\nimport os #", class_name="A\nB")
    body = task_card(dataclasses.replace(TASK, base=base)).body
    assert "import os" not in body and "# base_model: the base model, a A B, as you load it" in body


ROW = {"method": "m", "test": 0.5, "seeds": 1, "trained_adapter": 1, "trained_head": 0, "bytes": 2}


def test_facts_of_a_file_are_well_formed_or_left_out():
    good = {
        "base": {"auto_class": "AutoModel", "num_labels": 2, "labels": ["a", "b"], "injected": False},
        "training": {"steps": 3, "optimizer": "adamw"},
        "metrics": {"test": {"accuracy": 0.5}},
        "controls": {"title": "t", "score": "s", "rows": [ROW]},
        "datasets": ["org/data"],
    }
    found = recorded(good)
    assert found["base"] == {**good["base"], "labels": ("a", "b")}
    assert found["controls"]["rows"] == [{**ROW, "test_sd": None, "diverged": 0, "rate": None}]
    assert {key: found[key] for key in ("training", "metrics")} == {key: good[key] for key in ("training", "metrics")}
    assert found["datasets"] == ("org/data",)


@pytest.mark.parametrize("odd", [None, 5, "x", [], [5], {"x": {}}, {"rows": 5}, {"rows": [5]}, {5: {5: 5}}])
@pytest.mark.parametrize("key", ["base", "training", "metrics", "controls", "datasets"])
def test_odd_facts_of_a_file_make_a_card(key, odd):
    for said in (odd, {key: odd}, {key: dict.fromkeys(("auto_class", "labels", "rows", "test", "steps"), odd)}):
        facts = recorded(said)
        base = BaseFacts(reference="org/base", **facts.pop("base", {}))
        bare = dataclasses.replace(TASK, base=base, training={}, metrics={}, controls=None, datasets=())
        assert "## Loading" in task_card(dataclasses.replace(bare, **facts)).body
