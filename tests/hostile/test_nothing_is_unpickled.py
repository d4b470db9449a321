"""Nothing is unpickled or evaluated: adapters that would have to be are refused, and no code here can."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
from peft import PeftModel

import subspace_peft
from subspace_peft.errors import SubspaceError
from subspace_peft.sources import open_source
from subspace_peft.tasks.read import read_task

from .make import (
    WEIGHTS,
    Small,
)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_adapters_that_would_have_to_be_unpickled_are_refused(files, tmp_path):
    mark = tmp_path / "ran"
    for folder, read in ((files["lora0"], open_source), (files["task"], read_task)):
        (folder / WEIGHTS).unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(SubspaceError, match=r"adapter_model\.bin.*unpickled.*safetensors"):
            read(folder)
    # a pickle by the name of a safetensors file
    (files["lora0"] / WEIGHTS).write_bytes(pickle.dumps(Bomb(mark)))
    (files["task"] / WEIGHTS).write_bytes(pickle.dumps(Bomb(mark)))
    for read, folder in ((open_source, files["lora0"]), (read_task, files["task"])):
        with pytest.raises(SubspaceError, match="truncated"):
            read(folder)
    # PEFT's own door reads a .bin with torch's weights_only: it refuses what is no tensor, in its own words
    (files["task"] / WEIGHTS).unlink()
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        PeftModel.from_pretrained(Small(), files["task"])
    assert not mark.exists()


def test_no_code_here_can_unpickle_or_evaluate():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = []
    sources = sorted(Path(subspace_peft.__file__).parent.rglob("*.py"))
    assert len(sources) > 50
    for file in sources:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in forbidden(node, modules):
                found.append(f"{file.name}:{node.lineno}: {name}")
    assert found == []


def forbidden(node: ast.AST, modules: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] in modules]
    if isinstance(node, ast.ImportFrom):
        return [str(node.module)] if str(node.module).split(".")[0] in modules else []
    if not isinstance(node, ast.Call):
        return []
    name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    bad = name in (
        "eval",
        "exec",
        "compile",
        "__import__",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    )
    # torch's own reader of plain tensors, for those who ask for it with allow_bin
    bad = bad or (name == "torch.load" and keywords.get("weights_only") != "True")
    bad = bad or keywords.get("allow_pickle", "False") != "False" or keywords.get("weights_only", "True") != "True"
    bad = bad or keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False"
    return [name] if bad or name in ("os.system", "torch.hub.load", "read_pickle", "pd.read_pickle") else []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval('1')",
        "yaml.load(f)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_that_watch_sees_what_it_watches_for(code):
    assert any(forbidden(node, {"pickle", "dill"}) for node in ast.walk(ast.parse(code)))
