"""Tasks of a bundle on the Hub, read by ranges over real HTTP on loopback: one client in a process of its own, the
others in this one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel, get_peft_model

import subspace_peft.basis.living as living
from subspace_peft import SubspaceConfig, TaskBank, add_tasks, bundle_tasks, load_task, open_bundle, push_bundle
from subspace_peft.bundle import bundle as opened
from subspace_peft.bundle import store
from subspace_peft.bundle.format import BUNDLE_FILE
from subspace_peft.errors import BadFileError, SubspaceError

from .models import bert, inputs, randomise
from .push_hub import Handler, PushHub
from .test_sharing import TOKEN, client

LOAD = """
    import json
    from subspace_peft import load_task
    from subspace_peft.bundle import store
    store.FIRST = 1024
    from tests.models import bert, inputs
    model, sums = bert(), {}
    for name in ["t7", "h2", "o1"]:
        model = load_task(model, "org/bundle", name)
        model.set_adapter(name)
        sums[name] = model.eval()(inputs()).logits.double().sum().item()
    config = model.peft_config[name]
    print(json.dumps([sums, config.basis, config.basis_revision, config.basis_fingerprint, config.bundle]))
"""


def total(model) -> float:
    with torch.no_grad():
        return model.eval()(inputs()).logits.double().sum().item()


@pytest.fixture
def hub() -> Iterator[PushHub]:
    with PushHub(token=TOKEN) as server:
        yield server


@pytest.fixture
def fresh(hub, tmp_path, monkeypatch) -> Callable[..., None]:
    """Point this process's huggingface_hub to the loopback one; `fresh("name")`: as a new process on a machine of that
    name."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(store, "FIRST", 1024)

    def start(machine: str, offline: bool = False) -> None:
        opened._opened.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / machine))
        hub.log.clear()

    start("first")
    return start


@pytest.fixture
def pushed(hub, fresh, folder, bases) -> str:
    # in this process the basis is alive, wherever the bundle says it is
    with pytest.warns(UserWarning, match="only in"):
        return push_bundle(folder, "org/bundle", force=True, token=TOKEN)


@pytest.fixture
def folder(bases, tmp_path, monkeypatch) -> Path:
    """A hundred tasks in rows, two that have a classifier, and two with directions of their own."""
    # pushing moves the basis, which other tests share
    for name in ("location", "revision"):
        monkeypatch.setattr(bases[bert], name, getattr(bases[bert], name))
    # and may have moved; another object of the same basis, which was pushed, may be alive as well
    bases[bert].save_pretrained(tmp_path / "basis")
    monkeypatch.setitem(living._alive, bases[bert].fingerprint, bases[bert])
    bank = TaskBank(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)))
    draw = torch.Generator().manual_seed(0)
    sizes = {module: layer.r["default"] for module, layer in bank.layers.items()}
    for number in range(100):
        bank.add(f"t{number}", {module: torch.randn(size, generator=draw) for module, size in sizes.items()})
    config = SubspaceConfig(basis=bases[bert].location, modules_to_save=["classifier"])
    heads = {f"h{seed}": randomise(get_peft_model(bert(), config), seed=seed) for seed in (1, 2)}
    for model in heads.values():
        torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    config = SubspaceConfig(basis=bases[bert].location, extra_rank=2, extra_rank_pattern={"query": 1})
    owns = {f"o{seed}": randomise(get_peft_model(bert(), config), seed=seed) for seed in (1, 2)}
    bundle_tasks(bank, tmp_path / "bundle", progress=False)
    add_tasks(tmp_path / "bundle", {**heads, **owns}, progress=False)
    return tmp_path / "bundle"


def test_one_task_is_read_without_the_rest_and_pinned(hub, folder, bases, tmp_path, fresh):
    place = "../basis"
    commit = push_bundle(folder, "org/bundle", push_basis_to="org/basis", token=TOKEN)
    assert open_bundle(folder).index["config"]["basis"] == place
    assert hub.repos["org/bundle"].names["main"] == commit
    assert set(hub.files("org/bundle")) == {"README.md", BUNDLE_FILE}
    size = len(hub.files("org/bundle")[BUNDLE_FILE])
    hub.log.clear()
    hub.sent = 0
    sums, basis, basis_commit, fingerprint, bundle = json.loads(client(hub, tmp_path / "two", LOAD))
    assert (basis, basis_commit) == ("org/basis", hub.repos["org/basis"].names["main"])
    assert fingerprint == bases[bert].fingerprint and str(folder) not in json.dumps(bundle)
    assert (bundle["location"], bundle["revision"], bundle["task"]) == ("org/bundle", commit, "o1")
    for name, given in sums.items():
        assert given == pytest.approx(total(load_task(bert(), folder, name)), rel=1e-6)
    asked = [path for path in hub.gets() if path.endswith(BUNDLE_FILE)]
    # the beginning, the rest of the header, and one request per task
    assert len(asked) == 5 and f"/resolve/{commit}/" in asked[1]
    assert hub.sent - sum(len(data) for data in hub.files("org/basis").values()) < size - 90 * 4 * 36 * 4


def test_a_hundred_tasks_take_a_hundred_and_two_requests_at_most(hub, pushed, fresh, monkeypatch):
    counts = {}
    for first in (1024, 128 * 1024):
        fresh("reader")
        monkeypatch.setattr(store, "FIRST", first)
        for number in range(100):
            open_bundle("org/bundle").read(f"t{number}")
        counts[first] = len(hub.log)
    # also where the header does not fit into the first request; a small bundle comes whole with it
    assert counts == {1024: 102, 128 * 1024: 1}


def test_of_a_task_with_own_directions_its_bytes_alone_are_fetched(hub, pushed, folder, fresh, monkeypatch):
    local = open_bundle(folder)
    fresh("reader")
    found = open_bundle("org/bundle")
    asked = []
    request = store._request

    def noted(repo_id, revision, token, start, end):
        asked.append(end - start)
        return request(repo_id, revision, token, start, end)

    monkeypatch.setattr(store, "_request", noted)
    numbers = found.read("o2")
    # cores of 6 × 6; one direction of 32 + 32 in two modules, two in the others
    assert asked == [4 * (4 * 36 + 2 * 64 + 2 * 2 * 64)]
    for module, (B, A) in local.read("o2").own.items():
        assert torch.equal(numbers.own[module][0], B) and torch.equal(numbers.own[module][1], A)
        assert B.shape[1] == (1 if "query" in module else 2)


def test_branches_private_bundles_the_cache_and_no_network(hub, folder, fresh):
    with pytest.warns(UserWarning, match="only in"):
        commit = push_bundle(folder, "org/bundle", force=True, token=TOKEN, private=True, revision="v2")
    assert hub.repos["org/bundle"].private and BUNDLE_FILE not in hub.files("org/bundle")
    fresh("two")
    with pytest.raises(SubspaceError, match="org/bundle"):
        open_bundle("org/bundle", revision="v2", token=False)
    found = open_bundle("org/bundle", revision="v2", token=TOKEN)
    expected = found.raw("t1")
    assert found.revision == commit and expected == open_bundle(folder).raw("t1")
    fresh("two", offline=True)
    with pytest.raises(SubspaceError, match=r"offline.*download\(\)"):
        open_bundle("org/bundle@v2")
    fresh("two")
    whole = open_bundle("org/bundle@v2", token=TOKEN).download()
    assert whole.name == BUNDLE_FILE and whole.read_bytes() == hub.files("org/bundle", "v2")[BUNDLE_FILE]
    assert open_bundle(whole).raw("t1") == expected
    fresh("two", offline=True)
    assert open_bundle("org/bundle@v2").raw("t1") == expected and open_bundle("org/bundle@v2").revision == commit
    # at a commit, the cache alone will do; on a branch one request asks which commit that is, and the header may need
    # another
    fresh("two")
    assert open_bundle("org/bundle", revision=commit).raw("t1") == expected and not hub.log
    assert open_bundle("org/bundle", revision="v2", token=TOKEN).raw("t1") == expected and len(hub.log) == 1


def test_a_local_basis_is_not_pushed_without_a_word(hub, folder, bases, fresh):
    with pytest.raises(SubspaceError) as caught:
        push_bundle(folder, "org/bundle", token=TOKEN)
    for word in (str(bases[bert].location), "push_basis_to=", "force=True"):
        assert word in str(caught.value)
    assert "org/bundle" not in hub.repos
    with pytest.raises(SubspaceError, match="not a repository id"):
        push_bundle(folder, "./folder")


WRONG = {
    "another range": (BadFileError, "asked for bytes"),
    "too much": (BadFileError, "asked for bytes"),
    "cut off": (BadFileError, "claims"),
    "a byte": (BadFileError, "has sha256"),
    "no file": (SubspaceError, "no bundle.safetensors could be read"),
    "no repository": (SubspaceError, "no bundle.safetensors could be read"),
}


@pytest.mark.parametrize("how", [*WRONG, "no ranges"])
def test_servers_that_do_not_do_as_asked(how, hub, pushed, folder, fresh, monkeypatch):
    files, send, span = hub.files("org/bundle"), Handler._send, open_bundle(folder).span("t9")
    shift = len(files[BUNDLE_FILE]) - open_bundle(folder).store.size

    def wrong(self, status, body, **headers):
        if status == 206 and how == "no ranges":
            del headers["Content_Range"]
            return send(self, 200, files[BUNDLE_FILE], **headers)
        if status == 206 and how == "another range":
            start, end, size = map(int, store.SPAN.fullmatch(headers["Content_Range"]).groups())
            headers["Content_Range"] = f"bytes {start + 8}-{end + 8}/{size}"
        if status == 206 and how == "too much":
            body = body + bytes(10**6)
        return send(self, status, body, **headers)

    monkeypatch.setattr(Handler, "_send", wrong)
    if how == "cut off":
        files[BUNDLE_FILE] = files[BUNDLE_FILE][:-4000]
    elif how == "a byte":
        data = bytearray(files[BUNDLE_FILE])
        data[span[0] + shift] ^= 1
        files[BUNDLE_FILE] = bytes(data)
    elif how == "no file":
        del files[BUNDLE_FILE]
    elif how == "no repository":
        del hub.repos["org/bundle"]
    fresh("reader")
    if how == "no ranges":
        assert open_bundle("org/bundle").raw("t9") == open_bundle(folder).raw("t9")
        return
    error, message = WRONG[how]
    with pytest.raises(error, match=message):
        open_bundle("org/bundle").read("t9")


def test_a_task_added_to_a_branch_is_seen_where_the_bundle_is_open(hub, pushed, folder, bases, fresh, tmp_path):
    model = randomise(get_peft_model(bert(), SubspaceConfig(basis=bases[bert].location)), seed=4)
    model.save_pretrained(tmp_path / "late")
    fresh("reader")
    model = load_task(bert(), "org/bundle", "t1")
    with pytest.raises(SubspaceError, match="no task 'late'"):
        load_task(model, "org/bundle", "late")
    add_tasks(folder, [tmp_path / "late"], progress=False)
    with pytest.warns(UserWarning, match="only in"):
        push_bundle(folder, "org/bundle", force=True, token=TOKEN)
    model = load_task(model, "org/bundle", "late")
    model.set_adapter("late")
    assert total(model) == pytest.approx(total(PeftModel.from_pretrained(bert(), tmp_path / "late")), rel=1e-6)
    # what was opened before stays at its commit
    assert model.peft_config["t1"].bundle["revision"] == pushed != model.peft_config["late"].bundle["revision"]
