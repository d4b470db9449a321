"""Bases and tasks pushed to a Hub and loaded from it, over real HTTP on loopback, each client in a process of its
own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import get_peft_model

from subspace_peft import SubspaceConfig, build_basis
from subspace_peft.errors import SubspaceError

from .models import bert, randomise
from .push_hub import PushHub
from .test_hub import client as plain_client

TOKEN = "hf_test"
PUSH = """
    from peft import get_peft_model
    from subspace_peft import SubspaceBasis, SubspaceConfig
    from tests.models import bert, inputs, randomise
    basis = SubspaceBasis.from_pretrained({basis!r})
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=basis, task_type="SEQ_CLS"))).eval()
"""
LOAD = """
    import subspace_peft
    from peft import PeftModel
    from tests.models import bert, inputs
    model = PeftModel.from_pretrained(bert(), "me/task", **{more}).eval()
    config = model.peft_config["default"]
    print(model(inputs()).logits.double().sum().item(), config.basis, config.basis_revision)
"""


def client(hub: PushHub, home: Path, *programs: str, fails: bool = False, **env: str) -> str:
    import textwrap

    program = "\n".join(textwrap.dedent(each) for each in programs)
    done: subprocess.CompletedProcess[str] = plain_client(hub, home, program, **env)  # type: ignore[arg-type]
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture
def hub() -> Iterator[PushHub]:
    with PushHub(token=TOKEN) as server:
        yield server


@pytest.fixture
def push(basis_folder: Path) -> str:
    return PUSH.format(basis=str(basis_folder))


def test_a_basis_and_a_task_are_pushed_pinned_and_loaded_elsewhere(hub, push, tmp_path):
    said = client(
        hub,
        tmp_path / "one",
        push,
        """
        sha = basis.push_to_hub("org/basis")
        print(sha, basis.location, basis.revision)
        print(model.push_to_hub("me/task", tags=["mine"]), model(inputs()).logits.double().sum().item())
        """,
        HF_TOKEN=TOKEN,
    ).split()
    sha, location, revision, commit, total = said
    assert (location, revision) == ("org/basis", sha) and hub.repos["org/basis"].names["main"] == sha
    assert hub.repos["me/task"].names["main"] == commit
    config = json.loads(hub.files("me/task")["adapter_config.json"])
    assert (config["basis"], config["basis_revision"]) == ("org/basis", sha)
    assert set(hub.files("org/basis")) == {"README.md", "basis.safetensors", "basis_config.json"}
    card = hub.files("me/task")["README.md"].decode()
    assert "import subspace_peft" in card and "mine" in card.split("---")[1]
    # another machine, without a token: both are public
    assert client(hub, tmp_path / "two", LOAD.format(more={})).split() == [total, "org/basis", sha]
    # the branch moves on, and the task stays with its commit
    hub.put("org/basis", Path(__file__).parent / "__pycache__")
    assert client(hub, tmp_path / "three", LOAD.format(more={})).split() == [total, "org/basis", sha]


@pytest.mark.slow
def test_a_task_whose_basis_is_local_is_not_pushed_without_a_word(hub, push, basis_folder, tmp_path):
    says = client(hub, tmp_path / "one", push, 'model.push_to_hub("me/task")', fails=True, HF_TOKEN=TOKEN)
    for word in ("SubspaceError", str(basis_folder), "push_basis_to=", "save_basis = True", "force=True"):
        assert word in says
    assert "me/task" not in hub.repos

    client(hub, tmp_path / "one", push, 'model.push_to_hub("me/task", push_basis_to="me/basis")', HF_TOKEN=TOKEN)
    assert json.loads(hub.files("me/task")["adapter_config.json"])["basis"] == "me/basis"
    # this machine knows now where the basis is on the Hub
    client(hub, tmp_path / "one", push, 'model.push_to_hub("me/other")', HF_TOKEN=TOKEN)
    assert json.loads(hub.files("me/other")["adapter_config.json"])["basis"] == "me/basis"

    client(
        hub,
        tmp_path / "two",
        push,
        'model.peft_config["default"].save_basis = True; model.push_to_hub("me/whole")',
        HF_TOKEN=TOKEN,
    )
    load = LOAD.replace("me/task", "me/whole").format(more={})
    whole = client(hub, tmp_path / "three", load).split()[0]
    assert whole == client(hub, tmp_path / "four", LOAD.format(more={})).split()[0]

    client(hub, tmp_path / "five", push, 'model.push_to_hub("me/forced", force=True)', HF_TOKEN=TOKEN)
    assert json.loads(hub.files("me/forced")["adapter_config.json"])["basis"] is None


@pytest.mark.slow
def test_private_repositories_need_a_token_for_task_and_basis(hub, push, tmp_path):
    client(
        hub,
        tmp_path / "one",
        push,
        'model.push_to_hub("me/task", push_basis_to="me/basis", private=True)',
        HF_TOKEN=TOKEN,
    )
    assert hub.repos["me/task"].private and hub.repos["me/basis"].private
    assert "me/task" in client(hub, tmp_path / "two", LOAD.format(more={}), fails=True)
    loaded = client(hub, tmp_path / "two", LOAD.format(more={"token": TOKEN}))
    assert loaded.split()[1] == "me/basis"
    assert client(hub, tmp_path / "two", LOAD.format(more={}), HF_HUB_OFFLINE="1") == loaded


@pytest.mark.slow
def test_a_branch_a_revision_and_an_auto_class(hub, push, tmp_path):
    client(
        hub, tmp_path / "one", "from tests.models import bert", f"bert().save_pretrained({str(tmp_path / 'bert')!r})"
    )
    train = push.replace(
        "bert(),",
        f"__import__('transformers').AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'bert')!r}),",
    )
    client(
        hub,
        tmp_path / "one",
        train,
        """
        basis.push_to_hub("me/basis", branch="v2")
        model.push_to_hub("me/task", revision="dev")
        """,
        HF_TOKEN=TOKEN,
    )
    assert hub.files("me/task") == {} and "adapter_config.json" in hub.files("me/task", "dev")
    first = client(hub, tmp_path / "two", LOAD.format(more={"revision": "dev"})).split()[0]
    auto = """
        from peft import AutoPeftModelForSequenceClassification
        import subspace_peft
        from tests.models import inputs
        model = AutoPeftModelForSequenceClassification.from_pretrained("me/task", revision="dev").eval()
        print(model(inputs()).logits.double().sum().item())
    """
    assert client(hub, tmp_path / "three", auto).split()[0] == first


@pytest.mark.slow
def test_what_others_wrote_in_the_readmes_stays(hub, push, tmp_path):
    again = 'basis.push_to_hub("me/basis"); model.push_to_hub("me/task")'
    client(hub, tmp_path / "one", push, again, HF_TOKEN=TOKEN)
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nTrained on a train.\n")
    for repo in ("me/basis", "me/task"):
        files = hub.files(repo)
        files["README.md"] = (own / "README.md").read_bytes()
    client(hub, tmp_path / "two", push, again, HF_TOKEN=TOKEN)
    assert hub.files("me/basis")["README.md"] == (own / "README.md").read_bytes()
    card = hub.files("me/task")["README.md"].decode()
    assert "Trained on a train." in card and "license: mit" in card and "import subspace_peft" in card


@pytest.mark.parametrize("how", ["another basis", "a byte", "cut off"])
def test_a_basis_that_was_changed_under_a_pin_is_refused(how, hub, push, fleets, tmp_path):
    client(hub, tmp_path / "one", push, 'model.push_to_hub("me/task", push_basis_to="me/basis")', HF_TOKEN=TOKEN)
    files = hub.files("me/basis")
    good = json.loads(files["basis_config.json"])["fingerprint"]
    if how == "another basis":
        build_basis(fleets[bert][:3], k=3, progress=False).save_pretrained(tmp_path / "other")
        # a force-push under the same commit's name
        files.update(
            {name: (tmp_path / "other" / name).read_bytes() for name in ("basis.safetensors", "basis_config.json")}
        )
    elif how == "a byte":
        data = bytearray(files["basis.safetensors"])
        data[-3] ^= 1
        files["basis.safetensors"] = bytes(data)
    else:
        files["basis.safetensors"] = files["basis.safetensors"][:-100]
    says = client(hub, tmp_path / "two", LOAD.format(more={}), fails=True)
    if how == "another basis":
        assert good in says and json.loads(files["basis_config.json"])["fingerprint"] in says
    assert {"another basis": "BasisMismatchError"}.get(how, "BadFileError") in says


def test_a_basis_is_fetched_once_for_all_tasks(hub, push, tmp_path):
    client(
        hub,
        tmp_path / "one",
        push,
        """
        model.push_to_hub("me/task", push_basis_to="me/basis")
        for i in range(3):
            randomise(model, seed=i).push_to_hub(f"me/task{i}")
        """,
        HF_TOKEN=TOKEN,
    )
    home = tmp_path / "two"
    hub.log.clear()
    client(hub, home, LOAD.format(more={}))
    assert sorted(path.rpartition("/")[2] for path in hub.gets()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "basis.safetensors",
        "basis_config.json",
    ]
    # the basis is known by its content: not even the other cache is needed, nor where the next task says it is
    shutil.rmtree(home / "hub")
    hub.log.clear()
    several = "\n".join(f'    model.load_adapter("me/task{i}", "t{i}")' for i in range(3))
    client(hub, home, LOAD.format(more={}) + several)
    assert not [line for line in hub.log if "/me/basis/" in line]
    assert len(hub.gets()) == 8


def test_the_cache_is_listed_verified_and_emptied(hub, push, tmp_path, capsys, monkeypatch):
    from subspace_peft.cli import main

    client(hub, tmp_path / "one", push, 'model.push_to_hub("me/task", push_basis_to="me/basis")', HF_TOKEN=TOKEN)
    home = tmp_path / "two"
    client(hub, home, LOAD.format(more={}))
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(home / "subspace"))
    fingerprint = json.loads(hub.files("me/basis")["basis_config.json"])["fingerprint"]
    assert main(["cache", "ls"]) == 0
    listed = capsys.readouterr().out
    assert fingerprint[:12] in listed and "me/basis" in listed and "4 modules" in listed
    assert main(["cache", "verify"]) == 0
    file = home / "subspace" / "bases" / fingerprint / "basis.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["cache", "verify"]) == 1
    assert fingerprint[:12] in (said := capsys.readouterr()).out + said.err
    assert main(["cache", "rm", "ffff"]) == 1
    assert main(["cache", "rm", fingerprint[:8]]) == 0 and not file.exists()
    capsys.readouterr()
    assert main(["cache", "ls"]) == 0 and "empty" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["./folder", "/abs/folder", "org/name@v1"])
def test_paths_are_no_repositories(place, bases):
    model = get_peft_model(bert(), SubspaceConfig(basis=bases[bert]))
    for push_to in (bases[bert].push_to_hub, randomise(model).push_to_hub):
        with pytest.raises(SubspaceError, match="not a repository id"):
            push_to(place)


def test_folders_are_pushed_from_the_command_line(hub, push, basis_folder, tmp_path):
    task = str(tmp_path / "task")
    calls = [
        [task, "me/task"],
        [str(basis_folder), "org/basis"],
        [task, "me/task", "--branch", "tries", "--message", "Try"],
        [task, "me/task"],
        [str(tmp_path), "me/nothing"],
        [task, "./here"],
    ]
    run = f"""
    import contextlib, io
    from subspace_peft.cli import main
    model.save_pretrained({task!r})
    print(model(inputs()).logits.double().sum().item())
    for call in {calls!r}:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = main(["push", *call])
        if status:
            print(status, said.getvalue().strip().splitlines()[-1], sep="|")
    """
    lines = client(hub, tmp_path / "one", push, run, HF_TOKEN=TOKEN).splitlines()
    total, refused, basis, page, first, _, second, task_page, nothing, here = lines
    sha = hub.repos["org/basis"].names["main"]
    assert refused.startswith("1|") and "--push-basis-to" in refused
    assert basis == f"org/basis@{sha} (basis)" and page == f"{hub.url}/org/basis/commit/{sha}"
    assert task_page == f"{hub.url}/me/task/commit/{hub.repos['me/task'].names['main']}"
    assert hub.repos["me/task"].names["tries"] and first.endswith("(task)") and second.endswith("(task)")
    assert "neither a basis, a task nor a bundle" in nothing and "not a repository id" in here
    config = json.loads(hub.files("me/task")["adapter_config.json"])
    assert (config["basis"], config["basis_revision"]) == ("org/basis", sha)
    assert hub.files("me/task")["adapter_model.safetensors"] == Path(task, "adapter_model.safetensors").read_bytes()
    assert "me/task" in hub.files("me/task")["README.md"].decode()
    # the folder itself stays as it was saved
    assert json.loads(Path(task, "adapter_config.json").read_text())["basis"] == "../basis"
    assert client(hub, tmp_path / "three", LOAD.format(more={})).split() == [total, "org/basis", sha]
