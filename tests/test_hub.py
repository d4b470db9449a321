"""Sources, bases and tasks by Hub id and revision, over real HTTP on loopback, in a process of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from peft import get_peft_model

from subspace_peft import SubspaceConfig, build_basis

from . import fresh
from .hub import Hub, commit_of
from .models import bert, randomise


def client(hub: Hub, home: Path, program: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "SUBSPACE_PEFT_CACHE": str(home / "subspace"),
        **env,
    }
    return fresh.run("-c", program, env={**os.environ, **settings})


@pytest.fixture
def repos(bases, fleets, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(bases[bert].location, old)
    build_basis(fleets[bert][:3], k=3, progress=False).save_pretrained(new)
    return {
        "org/basis": {"main": new, "v1": old},
        "org/lora": {"main": Path(fleets[bert][0]), "v1": Path(fleets[bert][1])},
    }


def test_bases_and_sources_by_id_and_revision(repos, bases, tmp_path):
    program = """
        from subspace_peft import SubspaceBasis, build_basis
        for given in ({"revision": "v1"}, {}):
            basis = SubspaceBasis.from_pretrained("org/basis" if given else "org/basis@v1", **given)
            print(basis.fingerprint, basis.location, basis.revision)
        built = build_basis(["org/lora", "org/lora@v1"], k=3, progress=False)
        print([(s["name"], s["location"], s["revision"]) for s in built.info["sources"]])
    """
    with Hub(repos) as hub:
        done = client(hub, tmp_path / "home", program)
    assert done.returncode == 0, done.stderr
    commit = commit_of(repos["org/basis"]["v1"])
    first, second, sources = done.stdout.splitlines()
    assert first == second == f"{bases[bert].fingerprint} org/basis {commit}"
    loras = [commit_of(folder) for folder in repos["org/lora"].values()]
    assert sources == str([("lora", "org/lora", loras[0]), ("lora-2", "org/lora", loras[1])])


def test_a_task_pins_the_commit_of_its_basis_and_loads_after_the_tag_has_moved(repos, tmp_path):
    train = f"""
        from peft import get_peft_model
        from subspace_peft import SubspaceConfig
        from tests.models import bert, inputs, randomise
        model = randomise(get_peft_model(bert(), SubspaceConfig(basis="org/basis", basis_revision="v1"))).eval()
        model.save_pretrained({str(tmp_path / "task")!r})
        print(model(inputs()).logits.double().sum().item())
    """
    load = """
        import subspace_peft
        from peft import PeftConfig, PeftModel
        from tests.models import bert, inputs
        model = PeftModel.from_pretrained(bert(), "me/task").eval()
        config = model.peft_config["default"]
        print(model(inputs()).logits.double().sum().item(), config.basis, config.basis_revision)
    """
    commit = commit_of(repos["org/basis"]["v1"])
    with Hub(repos) as hub:
        trained = client(hub, tmp_path / "home1", train)
        assert trained.returncode == 0, trained.stderr
        repos["me/task"] = {"main": tmp_path / "task"}
        # the tag now names another basis, and the old commit is still there under its sha
        repos["org/basis"] = {"v1": repos["org/basis"]["main"], commit: repos["org/basis"]["v1"]}
        loaded = client(hub, tmp_path / "home2", load)
        assert loaded.returncode == 0, loaded.stderr
        again = client(hub, tmp_path / "home2", load, HF_HUB_OFFLINE="1")
    assert loaded.stdout.split() == [trained.stdout.strip(), "org/basis", commit]
    assert again.stdout == loaded.stdout, again.stderr


def test_what_the_hub_does_not_have_is_named(repos, tmp_path):
    for reference, error in (
        ('SubspaceBasis.from_pretrained("org/nothing")', "BasisNotFoundError"),
        ('SubspaceBasis.from_pretrained("org/basis@v9")', "BasisNotFoundError"),
        ('SubspaceBasis.from_pretrained("org/lora")', "BasisNotFoundError"),
        ('build_basis(["org/nothing@v2"], progress=False)', "SourceError"),
    ):
        with Hub(repos) as hub:
            done = client(hub, tmp_path / "home", f"from subspace_peft import SubspaceBasis, build_basis\n{reference}")
        last = [line for line in done.stderr.splitlines() if error in line]
        assert done.returncode == 1
        assert last, done.stderr
        assert "org/" in done.stderr


def test_a_changed_basis_under_a_pinned_name_is_refused_naming_both(repos, bases, tmp_path):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert])))
    config = model.peft_config["default"]
    config.basis, config.basis_revision = "org/basis", None
    model.save_pretrained(tmp_path / "task")
    program = f"""
        import subspace_peft
        from peft import PeftModel
        from tests.models import bert
        PeftModel.from_pretrained(bert(), {str(tmp_path / "task")!r})
    """
    with Hub(repos) as hub:
        done = client(hub, tmp_path / "home", program)
    assert done.returncode == 1
    assert "BasisMismatchError" in done.stderr
    assert bases[bert].fingerprint in done.stderr


def test_inspect_tells_bases_from_tasks_on_the_hub(repos, bases, tmp_path):
    randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location))).save_pretrained(tmp_path / "task")
    program = """
        from subspace_peft.report import inspect_path
        for path in ("org/basis@v1", "org/task", "org/task@main"):
            facts = inspect_path(path)
            print(facts["kind"], facts["bytes"], facts["modules"])
        try:
            inspect_path("org/nothing")
        except ValueError as error:
            print("neither a basis" in str(error))
    """
    with Hub({**repos, "org/task": {"main": tmp_path / "task"}}) as hub:
        done = client(hub, tmp_path / "home", program)
    assert done.returncode == 0, done.stderr
    sizes = [
        (Path(bases[bert].location) / "basis.safetensors").stat().st_size,
        (tmp_path / "task" / "adapter_model.safetensors").stat().st_size,
    ]
    assert done.stdout.split() == ["basis", str(sizes[0]), "4", *["task", str(sizes[1]), "4"] * 2, "True"]
