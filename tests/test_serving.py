"""Exports that other programs read: stock PEFT in a process without this package, and vLLM through its resolver
plugin."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from subspace_peft import SubspaceConfig, TaskBank, export_lora
from subspace_peft.basis.cache import cache_home
from subspace_peft.convert.factored import VLLM_RANKS
from subspace_peft.errors import BasisMismatchError, SubspaceError
from subspace_peft.serve import TaskExports
from subspace_peft.serve.vllm_resolver import make_resolver, register

from . import fresh
from .models import bert, inputs, randomise


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(inputs()).logits


@pytest.fixture
def model(bases):
    return randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)))


@pytest.fixture
def folder(model, bases, tmp_path) -> Path:
    """Two saved tasks."""
    model.save_pretrained(tmp_path / "tasks" / "spam")
    randomise(model, seed=7).save_pretrained(tmp_path / "tasks" / "billing")
    return tmp_path / "tasks"


@pytest.fixture
def bank(model, folder, tmp_path) -> Path:
    made = TaskBank(model)
    for task in sorted(folder.iterdir()):
        made.add(task.name, task)
    made.add("a/b: ü", folder / "spam")
    return made.save(tmp_path / "bank.safetensors")


def stock(folder: Path) -> torch.Tensor:
    loaded = PeftModel.from_pretrained(bert(), folder)
    assert type(loaded.peft_config["default"]) is LoraConfig
    return logits(loaded)


# -- folders that peers take ------------------------------------------------------------------------------------------


def test_an_export_for_vllm_holds_what_it_serves_and_nothing_else(bases, tmp_path):
    config = SubspaceConfig(basis=bases[bert].location, modules_to_save=["classifier"], rank_pattern={"query": 3})
    randomise(get_peft_model(bert(), config)).save_pretrained(tmp_path / "task")
    with pytest.warns(UserWarning, match=r"classifier.* stays behind.*modules_to_save=True"):
        result = export_lora(tmp_path / "task", tmp_path / "lora", pad_to="vllm")
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert result.rank == written["r"] == written["lora_alpha"]
    assert result.rank in VLLM_RANKS
    assert not (
        written["rank_pattern"] or written["alpha_pattern"] or written["modules_to_save"] or written["use_rslora"]
    )
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {key.rsplit(".", 2)[-2] for key in tensors} == {"lora_A", "lora_B"}
    assert {min(value.shape) for value in tensors.values()} == {result.rank}
    asked = export_lora(tmp_path / "task", tmp_path / "asked", pad_to="vllm", modules_to_save=True)
    assert asked.modules_to_save == ["classifier"]


def test_stock_peft_loads_an_export_where_this_package_is_not(folder, model, tmp_path):
    export_lora(folder / "spam", tmp_path / "lora", pad_to="vllm")
    bert().save_pretrained(tmp_path / "base")
    program = """
        import sys
        sys.modules["subspace_peft"] = None  # importing it fails
        import torch
        from peft import PeftModel
        from transformers import BertForSequenceClassification
        base, lora, out = sys.argv[1:]
        model = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), lora).eval()
        x = torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.save(model(x).logits, out)
    """
    fresh.run("-c", program, *(str(tmp_path / name) for name in ("base", "lora", "logits.pt")), check=True)
    expected = logits(PeftModel.from_pretrained(bert(), folder / "spam"))
    given = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)


# -- exports on demand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "bank"])
def test_a_task_is_exported_when_asked_for_and_once(kind, request, folder):
    exports = TaskExports(request.getfixturevalue(kind))
    assert {"spam", "billing"} <= set(exports.names())
    for name in ("spam", "billing"):
        lora = exports.find(name)
        torch.testing.assert_close(
            stock(lora), logits(PeftModel.from_pretrained(bert(), folder / name)), atol=1e-5, rtol=1e-4
        )
        assert json.loads((lora / "adapter_config.json").read_text())["r"] == 8
    assert lora.parent == cache_home() / "exports"
    written = (lora / "adapter_model.safetensors").stat().st_mtime_ns
    assert exports.find("billing") == lora
    assert (lora / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert len(list(lora.parent.iterdir())) == 2


def test_another_content_is_another_folder_and_the_earlier_one_stays(folder, model, tmp_path):
    exports = TaskExports(folder, cache=tmp_path / "cache")
    before = exports.find("spam")
    kept = stock(before)
    randomise(model, seed=11).save_pretrained(folder / "spam")
    after = exports.find("spam")
    assert after != before
    assert torch.equal(stock(before), kept)
    assert not torch.allclose(stock(after), kept)
    assert TaskExports(folder, cache=tmp_path / "cache", rank=2).find("spam") not in (before, after)


NAMES_OF_NOBODY = [
    "",
    ".",
    "..",
    "../tasks/spam",
    "spam/",
    "/etc/passwd",
    "a\\b",
    "c:spam",
    "a\0b",
    "x" * 10_000,
    "spam\n",
    "nobody",
]


@pytest.mark.parametrize("kind", ["folder", "bank"])
@pytest.mark.parametrize("name", NAMES_OF_NOBODY, ids=range(len(NAMES_OF_NOBODY)))
def test_names_that_requests_may_bring_lead_nowhere(kind, name, request, tmp_path):
    exports = TaskExports(request.getfixturevalue(kind), cache=tmp_path / "cache")
    assert exports.find(name) is None
    assert not (tmp_path / "cache").exists()


def test_an_odd_name_of_a_real_task_stays_inside_the_cache(bank, folder, tmp_path):
    exports = TaskExports(bank, cache=tmp_path / "cache")
    lora = exports.find("a/b: ü")
    assert lora.parent == tmp_path / "cache"
    assert torch.equal(stock(lora), stock(exports.find("spam")))


def test_what_cannot_be_served_is_said(folder, bank, bases, tmp_path):
    with pytest.raises(SubspaceError, match=r"does not exist.*TaskBank\.save"):
        TaskExports(tmp_path / "no")
    file = folder / "spam" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "org/one"}))
    exports = TaskExports(folder)
    with pytest.raises(BasisMismatchError, match=r"org/one.*org/two"):
        exports.find("spam", "org/two")
    assert exports.find("spam", "org/one")
    assert exports.find("spam", str(tmp_path))
    config = SubspaceConfig(basis=bases[bert].location, modules_to_save=["classifier"])
    get_peft_model(bert(), config).save_pretrained(folder / "head")
    with pytest.raises(SubspaceError, match="classifier"):
        exports.find("head")
    other = bases[bert].truncate(2)
    with pytest.raises(BasisMismatchError, match=other.fingerprint):
        TaskExports(bank, basis=other).find("spam")
    assert not list((cache_home() / "exports").glob(".part-*"))


# -- vLLM's interface -------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins for what the plugin uses of vLLM 0.32: the registry, the abstract resolver, the request."""

    class LoRAResolver(abc.ABC):
        @abc.abstractmethod
        async def resolve_lora(self, base_model_name: str, lora_name: str): ...

    class Registry:
        def __init__(self) -> None:
            self.resolvers = {}

        def get_supported_resolvers(self):
            return self.resolvers.keys()

        def register_resolver(self, name, resolver) -> None:
            assert name not in self.resolvers
            assert isinstance(resolver, LoRAResolver)
            self.resolvers[name] = resolver

    @dataclasses.dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str = ""

    parts = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": Registry()},
    }
    for name, values in parts.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("TASKS", "BASIS", "EXPORTS", "RANK"):
        monkeypatch.delenv(f"SUBSPACE_PEFT_{name}", raising=False)
    return sys.modules["vllm.lora.resolver"]


def test_the_plugin_offers_tasks_where_it_is_told_and_is_silent_else(vllm, bank, folder, tmp_path, monkeypatch):
    register()
    assert not vllm.LoRAResolverRegistry.resolvers
    monkeypatch.setenv("SUBSPACE_PEFT_TASKS", str(bank))
    monkeypatch.setenv("SUBSPACE_PEFT_EXPORTS", str(tmp_path / "exports"))
    register()
    register()
    resolver = vllm.LoRAResolverRegistry.resolvers["subspace_peft"]
    asked = [asyncio.run(resolver.resolve_lora("/some/model", name)) for name in ("spam", "billing", "nobody", "../x")]
    assert asked[2:] == [None, None]
    assert [request.lora_name for request in asked[:2]] == ["spam", "billing"]
    assert len({request.lora_int_id for request in asked[:2]}) == 2
    assert all(0 < request.lora_int_id < 2**63 for request in asked[:2])
    for request in asked[:2]:
        assert Path(request.lora_path).parent == tmp_path / "exports"
        expected = logits(PeftModel.from_pretrained(bert(), folder / request.lora_name))
        torch.testing.assert_close(stock(request.lora_path), expected, atol=1e-5, rtol=1e-4)


def test_a_damaged_task_is_logged_and_not_found(vllm, folder, caplog):
    (folder / "spam" / "adapter_model.safetensors").write_bytes(b"no tensors")
    resolver = make_resolver(TaskExports(folder))
    assert asyncio.run(resolver.resolve_lora("m", "spam")) is None
    assert "truncated or no safetensors file" in caplog.text
    assert asyncio.run(resolver.resolve_lora("m", "billing")) is not None
    shutil.rmtree(folder)
    assert asyncio.run(resolver.resolve_lora("m", "billing")) is None


def test_wrong_settings_are_said_when_the_server_starts(vllm, folder, monkeypatch):
    monkeypatch.setenv("SUBSPACE_PEFT_TASKS", str(folder))
    monkeypatch.setenv("SUBSPACE_PEFT_RANK", "many")
    with pytest.raises(SubspaceError, match="SUBSPACE_PEFT_RANK='many'"):
        register()
    monkeypatch.setenv("SUBSPACE_PEFT_TASKS", "/no/such/tasks")
    monkeypatch.delenv("SUBSPACE_PEFT_RANK")
    with pytest.raises(SubspaceError, match="/no/such/tasks"):
        register()


def test_the_entry_point_is_the_plugin_and_costs_nothing_where_it_is_not_used():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        '[project.entry-points."vllm.general_plugins"]\nsubspace_peft = "subspace_peft.serve.vllm_resolver:register"'
        in text
    )
    program = (
        "import os, sys; os.environ.pop('SUBSPACE_PEFT_TASKS', None)\n"
        "from subspace_peft.serve.vllm_resolver import register; register()\n"
        "assert not {'torch', 'peft', 'vllm'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
