"""The SUBSPACE method in PEFT's registry, in this process and in fresh ones."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import subspace_peft
from subspace_peft import SubspaceConfig, SubspaceModel
from subspace_peft._peft_hooks import register

from .fresh import Server
from .models import bert

#: Runs a program in a process that has imported torch and transformers, but not PEFT.
fresh = Server("torch", "transformers.modeling_utils").run


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that has imported nothing."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_it_is_a_real_member():
    member = PeftType.SUBSPACE
    assert PeftType("SUBSPACE") is PeftType["SUBSPACE"] is member
    assert member in list(PeftType)
    assert isinstance(member, PeftType)
    assert (str(member), member.name, member.value) == ("PeftType.SUBSPACE", "SUBSPACE", "SUBSPACE")
    assert member == "SUBSPACE"
    assert hash(member) == hash("SUBSPACE")
    assert copy.deepcopy(member) is member
    assert json.dumps(member) == '"SUBSPACE"'
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    with pytest.raises(ValueError, match="NOPE"):
        PeftType("NOPE")


def test_registering_is_idempotent_and_its_mappings_are_right():
    count = len(PeftType)
    register()
    register()
    assert len(PeftType) == count
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SUBSPACE"] is SubspaceConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SUBSPACE] is SubspaceModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SUBSPACE] == "subspace_"


def test_configs_pickle_copy_and_become_json(bases):
    config = SubspaceConfig(basis=bases[bert], r=3)
    get_peft_model(bert(), config)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()
        get_peft_model(bert(), other)
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "SUBSPACE"


ORDERS = [
    "import subspace_peft, peft",
    "import peft, subspace_peft",
    "import subspace_peft, importlib.util; importlib.util.find_spec('peft'); import peft",
    pytest.param("import subspace_peft; from transformers import AutoModel; import peft", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("order", ORDERS)
def test_either_import_order_registers(order):
    program = f"{order}\nfrom peft import PeftType\nassert PeftType.SUBSPACE in peft.PEFT_TYPE_TO_CONFIG_MAPPING"
    assert bare("-c", program).returncode == 0 if "transformers" in order else fresh("-c", program, check=True)


def test_it_registers_when_peft_is_in_the_middle_of_its_own_import():
    program = textwrap.dedent("""
        import importlib.abc, sys

        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "peft.utils":
                    import subspace_peft
                    assert sys.modules["peft"].__spec__._initializing

        sys.meta_path.insert(0, Finder())
        import peft
        assert "subspace_peft" in sys.modules
        assert peft.PeftType.SUBSPACE in peft.PEFT_TYPE_TO_CONFIG_MAPPING
        """)
    done = fresh("-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["tuner.config", "tasks.bank"])
def test_whichever_module_is_imported_first_registers(module):
    program = (
        f"import subspace_peft.{module}\nfrom peft import PEFT_TYPE_TO_CONFIG_MAPPING as known; known['SUBSPACE']"
    )
    done = fresh("-c", program)
    assert done.returncode == 0, done.stderr


def test_the_old_name_still_registers():
    from subspace_peft import tuner

    with pytest.warns(FutureWarning, match="_peft_hooks"):
        assert tuner.register is register


def test_a_bare_member_pickled_here_loads_in_a_process_that_imports_nothing(tmp_path):
    (tmp_path / "member.pkl").write_bytes(pickle.dumps(PeftType.SUBSPACE))
    program = f"import pickle; print(pickle.load(open({str(tmp_path / 'member.pkl')!r}, 'rb')))"
    assert fresh("-c", program).stdout.strip() == "PeftType.SUBSPACE"


def test_the_import_is_light():
    program = "import sys, subspace_peft; print({'torch', 'peft', 'transformers'} & set(sys.modules))"
    assert bare("-c", program).stdout.strip() == "set()"


@pytest.fixture
def script(bases, tmp_path) -> Path:
    """A stock script that has never heard of the plugin, and a task for it."""
    model = get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location))
    model.save_pretrained(tmp_path / "task")
    file = tmp_path / "stock.py"
    file.write_text(
        textwrap.dedent("""
            import sys
            from peft import PeftConfig
            print(PeftConfig.from_pretrained(sys.argv[1]).peft_type, __name__, sys.argv[1:])
            """)
    )
    return file


def test_without_the_plugin_peft_says_keyerror_and_the_runner_is_the_remedy(script, tmp_path):
    task = str(tmp_path / "task")
    stock = fresh(str(script), task)
    assert stock.returncode == 1
    assert "KeyError: 'SUBSPACE'" in stock.stderr
    done = fresh("-m", "subspace_peft", "run", str(script), task)
    assert done.stdout.split()[:2] == ["PeftType.SUBSPACE", "__main__"], done.stderr
    as_module = fresh("-m", "subspace_peft.run", "-m", "stock", task, "--flag", cwd=script.parent)
    assert as_module.stdout.split()[:2] == ["PeftType.SUBSPACE", "__main__"], as_module.stderr
    assert "--flag" in as_module.stdout


@pytest.mark.parametrize("arguments", [[], ["-m"], ["/no/such/script.py"]])
def test_the_runner_refuses_nothing_to_run(arguments):
    done = fresh("-m", "subspace_peft.run", *arguments)
    assert done.returncode == 2
    assert "subspace_peft.run:" in done.stderr


def test_public_names_exist():
    for name in subspace_peft.__all__:
        assert getattr(subspace_peft, name) is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = subspace_peft.nothing_here
