"""Words that the command line does not take: verbs and options that are near, other tools' words, other folders."""

from __future__ import annotations

import pytest

from subspace_peft.cli import main
from subspace_peft.cli.language import verbs_of
from subspace_peft.cli.main import _parsed
from subspace_peft.cli.parsers import MEANT
from subspace_peft.cli.verbs import parser


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["biuld"], "Did you mean build"),
        (["exprt-lora"], "Did you mean export-lora"),
        (["xyzzy"], "`subspace-peft --help` lists them all"),
        (["bundle", "list"], "Did you mean ls"),
        (["cache", "remove"], "`subspace-peft cache --help`"),
        (["list"], "Did you mean bundle ls or cache ls?"),
        (["info"], "Did you mean inspect or env?"),
        (["bundle_create", "x"], "Did you mean bundle create?"),
        (["bundle-rm", "x"], "Did you mean bundle?"),
        (["help", "biuld"], "Did you mean build"),
    ],
)
def test_unknown_verbs_are_answered_with_near_ones(words, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("build loras --output b", "there is no option --output. Did you mean --out? `subspace-peft build --help`"),
        ("build loras --K 4", "Did you mean -k or --k"),
        ("build loras -o b", "Did you mean --out?"),
        ("build loras --skipbad", "Did you mean --skip-bad?"),
        ("-V", "Did you mean -v or --version"),
        # of required options, how they are spelt
        ("project lora --baseis b", "there is no option --baseis. Did you mean --basis?"),
        ("bundle create task --outt b", "subspace-peft bundle create: error: there is no option --outt."),
        ("project lora", "the following arguments are required: --basis"),
        ("build a --out b c d", "2 arguments too many: c d. Name all of them in one place"),
        ("env foo", "subspace-peft env: error: 1 argument too many: foo.\n"),
    ],
)
def test_what_a_verb_does_not_take_is_answered_by_the_verb(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_other_tools_words_lead_to_verbs_that_there_are():
    known = {*verbs_of(parser()), "--version"}
    for meant in MEANT.values():
        assert set(meant) <= known
    assert not MEANT.keys() & known


@pytest.mark.parametrize("words", [["build"], ["bundle", "ls"], []])
def test_help_as_a_verb(words, capsys):
    for given in (["help", *words], [*words, "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(given)
        assert stopped.value.code == 0
    assert len(set(capsys.readouterr().out.split("usage: ")[1:])) == 1


def test_errors_name_the_verb_as_it_was_typed(tmp_path, capsys):
    assert main(["bundle", "ls", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("subspace-peft bundle ls: ") and "[Errno" not in said
    assert main(["cache", "rm"]) == 1
    assert capsys.readouterr().err.startswith("subspace-peft cache rm: give the beginning")
    assert main(["compress", "x", "--basis", "b", "--out", "o", "--min-energy", "50%"]) == 1
    assert "--min-energy '50%' is no number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": '{"peft_type": "LORA", "r": 4}'}, "peft_type is LORA, not SUBSPACE. It holds a LoRA"),
        ({"clusters.json": "{}", "cluster-0/basis_config.json": "{}"}, "name one of them: {folder}/cluster-0."),
        ({"bundle.safetensors": "damaged"}, "is in there.\n"),
        ({"notes.txt": "x"}, "is in there.\n"),
    ],
)
def test_inspect_says_what_else_a_folder_holds(files, said, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main(["inspect", str(tmp_path)]) == 1
    assert said.format(folder=tmp_path) in capsys.readouterr().err


def test_underscores_of_python_are_understood():
    found = _parsed(["export_lora", "task", "--out", "lora", "--pad_to=vllm", "--no-modules_to_save"])
    assert (found.verb, found.pad_to, found.modules_to_save) == ("export-lora", "vllm", False)
    with pytest.raises(SystemExit):
        _parsed(["inspect", "basis", "--no_such_flag"])


def test_a_refused_adapter_is_said_in_the_words_of_flags(capsys):
    from types import SimpleNamespace

    from subspace_peft.cli.compressing import _say_summary

    reason = "the basis keeps 73.2 % of its energy, less than min_energy=0.9: allow a residual"
    refused = SimpleNamespace(total=None, refused=reason, location="loras/x")
    _say_summary(SimpleNamespace(adapters=[refused], folder="b", min_energy=0.9), {})
    assert "less than --min-energy 0.9: allow" in capsys.readouterr().out
