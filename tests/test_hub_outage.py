"""A Hub that does not answer, or says no: waited for, named truly, never taken for a fault of what was asked for."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status
from peft import PeftModel, get_peft_model

from subspace_peft import (
    SubspaceBasis,
    SubspaceConfig,
    build_basis,
    bundle_tasks,
    compress_fleet,
    load_adapter,
    open_bundle,
    project_lora,
)
from subspace_peft.basis.living import _alive
from subspace_peft.bundle import bundle as opened
from subspace_peft.bundle import store
from subspace_peft.errors import BasisNotFoundError, HubOfflineError, HubUnavailableError, SourceError, SubspaceError
from subspace_peft.hub_requests import LIMIT, PATIENT_LIMIT, WAIT, ask
from subspace_peft.tasks.read import read_task

from .faulty_hub import FAULTS, FaultyHub, point_here, without_pauses
from .models import bert, inputs, randomise

LORAS = ["org/l0", "org/l1", "org/l2"]


@pytest.fixture(scope="module")
def repos(bases, fleets, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("repos")
    place = str(bases[bert].location)
    randomise(get_peft_model(bert(), SubspaceConfig(basis=place))).save_pretrained(folder / "task")
    bundle_tasks([folder / "task"], folder / "bundle", progress=False)
    loras = {name: Path(fleets[bert][number]) for number, name in enumerate(LORAS)}
    return {"org/basis": Path(place), "org/task": folder / "task", "org/bundle": folder / "bundle", **loras}


@pytest.fixture
def hub(repos, tmp_path, monkeypatch) -> Iterator[FaultyHub]:
    with FaultyHub() as server:
        for name, folder in repos.items():
            server.put(name, folder)
        server.collections["org/c-1"] = LORAS
        point_here(monkeypatch, server.url, str(tmp_path / "hub"))
        monkeypatch.setattr(store, "FIRST", 256)
        opened._opened.clear()
        yield server


@pytest.fixture
def paused(monkeypatch) -> list[float]:
    return without_pauses(monkeypatch)


def built(sources: Any, **options: Any) -> str:
    return build_basis(sources, k=3, progress=False, **options).fingerprint


def loaded(bases: Any) -> float:
    model = bert()
    load_adapter(model, "org/task", basis=bases[bert])
    with torch.no_grad():
        return model.eval()(inputs()).logits.double().sum().item()


def stock(bases: Any) -> float:
    model = PeftModel.from_pretrained(bert(), "org/task", basis=bases[bert])
    with torch.no_grad():
        return model.eval()(inputs()).logits.double().sum().item()


def read_bundle(bases: Any) -> float:
    opened._opened.clear()
    return sum(float(core.sum()) for core in open_bundle("org/bundle").read("task").cores.values())


def pushed(bases: Any) -> list[str]:
    basis = SubspaceBasis(dict(bases[bert]), bases[bert].info)
    basis.push_to_hub("me/basis")
    return [str(basis.location), basis.fingerprint]


# how the Hub is asked → a call that does, given the bases
CALLERS: dict[str, Callable[[Any], Any]] = {
    "build": lambda bases: built(LORAS),
    "build, skip_bad": lambda bases: built(LORAS, skip_bad=True),
    "collection": lambda bases: built("collection:org/c-1", skip_bad=True),
    "project": lambda bases: project_lora("org/l0", bases[bert]).energy_kept,
    "load a task": loaded,
    "PeftModel": stock,
    "read a task": lambda bases: sorted(read_task("org/task", basis=bases[bert]).cores),
    "basis": lambda bases: SubspaceBasis.from_pretrained("org/basis").fingerprint,
    "bundle": read_bundle,
    "push": pushed,
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_waited_for(hub, paused, bases, caller, fault):
    call = CALLERS[caller]
    # huggingface_hub repeats some requests itself, six times
    hub.due(fault, times=4 if fault == "reset" or caller in ("bundle", "collection", "push") else 9)
    found = call(bases)
    assert hub.left <= 0 or fault == "cut off"
    hub.due(None)
    assert call(bases) == found


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("fault", [429, 503, "reset"])
def test_what_lasts_is_named_and_nothing_is_skipped_for_it(hub, paused, bases, caller, fault):
    hub.due(fault, times=float("inf"))
    with pytest.raises(HubUnavailableError) as caught:
        CALLERS[caller](bases)
    said = str(caught.value)
    assert not isinstance(caught.value, (SourceError, BasisNotFoundError))
    assert "the Hub did not answer" in said and WAIT in said and " times in " in said
    assert str(fault) in said or "Error" in said
    limit = PATIENT_LIMIT if "build" in caller or caller == "collection" else LIMIT
    assert 0.4 * limit < sum(paused) <= limit
    assert ("0 of 3 sources were read" in said) == ("build" in caller)


@pytest.mark.parametrize("caller", CALLERS)
def test_a_server_that_is_not_there_is_no_bad_adapter(hub, paused, bases, caller, monkeypatch, tmp_path):
    point_here(monkeypatch, "http://127.0.0.1:9", str(tmp_path / "hub"))
    monkeypatch.setenv(WAIT, "3")
    with pytest.raises(HubUnavailableError, match=r"the Hub did not answer: Connect.*refused"):
        CALLERS[caller](bases)
    assert sum(paused) <= 3


@pytest.mark.parametrize("caller", [each for each in CALLERS if each != "push"])
def test_offline_is_said_at_once(hub, paused, bases, caller, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubOfflineError, match="HF_HUB_OFFLINE") as caught:
        CALLERS[caller](bases)
    assert isinstance(caught.value, (SourceError, BasisNotFoundError))
    assert (hub.asked, paused) == (0, [])
    if caller.startswith("build"):
        assert all(name in str(caught.value) for name in LORAS)


def test_a_build_goes_on_from_what_was_fetched(hub, paused, bases, fleets):
    hub.due(503, times=float("inf"), only="org/l2")
    with pytest.raises(HubUnavailableError, match=r"org/l2.*2 of 3 sources were read before, the last: l0, l1"):
        built(LORAS, skip_bad=True)
    fetched = len(hub.gets())
    hub.due(None)
    assert built(LORAS) == built(fleets[bert][:3])
    assert all("org/l2" in line for line in hub.gets()[fetched:])


def test_a_build_says_in_its_bar_what_it_waits_for(hub, paused, capsys):
    hub.due(503, times=9)
    build_basis(LORAS, k=3)
    said = capsys.readouterr().err
    assert "reading sources" in said and "the Hub does not answer (503 Service Unavailable): org/l0" in said


def test_a_call_says_in_the_log_what_it_waits_for(hub, paused, caplog):
    hub.due(503, times=9)
    SubspaceBasis.from_pretrained("org/basis")
    said = [record.message for record in caplog.records if record.name == "subspace_peft.hub_requests"]
    assert said and all("503 Service Unavailable): org/basis is asked for again in" in line for line in said)


def test_no_request_more_is_made_where_all_is_well(hub, paused):
    hub.due(None)
    built(LORAS)
    # config, tensors and README, each a HEAD and a GET
    assert hub.asked == 3 * 6 and paused == []


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({}, 0.8, 1.2),
        ({"Retry_After": "7"}, 7, 7),
        ({"Retry_After": "0"}, 0.8, 1.2),
        ({"Retry_After": "DATE"}, 18, 20),
        ({"Retry_After": "nonsense"}, 0.8, 1.2),
        ({"RateLimit": '"api";r=0;t=12'}, 12, 12),
        ({"RateLimit": '"api";r=3;t=12'}, 0.8, 1.2),
        ({"RateLimit": '"api";r=0;t=12', "Retry_After": "7"}, 12, 12),
    ],
)
def test_the_hub_is_left_alone_for_as_long_as_it_asks(hub, paused, headers, least, most):
    headers = {key: value.replace("DATE", email.utils.formatdate(time.time() + 20)) for key, value in headers.items()}
    hub.due(429, times=1, **headers)

    def call() -> int:
        response = get_session().get(f"{hub.url}/org/basis/resolve/main/README.md")
        hf_raise_for_status(response)
        return response.status_code

    assert ask("org/basis", call) == 200
    assert len(paused) == 1 and least <= paused[0] <= most


def test_a_longer_pause_than_the_limit_is_not_begun(hub, paused, bases):
    hub.due(429, times=float("inf"), Retry_After="3600")
    with pytest.raises(HubUnavailableError, match=r"asked once\. The Hub asks to be left alone for 3600 s"):
        read_bundle(bases)
    assert paused == []


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv(WAIT, given)
    with pytest.raises(SubspaceError, match="give a number of seconds"):
        ask("org/basis", lambda: 1)


@pytest.mark.parametrize("call", ["fault", "pause"])
def test_ctrl_c_ends_the_wait(monkeypatch, call):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def failing() -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr("subspace_peft.hub_requests.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask("org/basis", interrupted if call == "fault" else failing)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), PermissionError(13, "denied"), ValueError("no"), SubspaceError("no")],
    ids=repr,
)
def test_a_fault_of_this_machine_is_not_the_hubs(paused, error):
    def failing() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        ask("org/basis", failing)
    assert caught.value is error and paused == []


# -- the Hub answers: no ----------------------------------------------------------------------------------------------

# what the Hub says → status, headers, and what a user is told
REFUSALS = {
    "unknown": (404, {"X_Error_Code": "RepoNotFound"}, "has no repository .*private.*hf auth login"),
    "private": (401, {"X_Error_Code": "RepoNotFound"}, "has no repository .*private.*hf auth login"),
    "gated": (403, {"X_Error_Code": "GatedRepo"}, "is gated: ask for access.*hf auth login"),
    "revision": (404, {"X_Error_Code": "RevisionNotFound"}, "has no revision main"),
    "token": (401, {"X_Error_Message": "Invalid credentials in Authorization header"}, "does not know this token"),
    "forbidden": (403, {"X_Error_Message": "no"}, "your token does not allow that"),
}
ASKED = {
    "build": (lambda: built(LORAS), SourceError),
    "basis": (lambda: SubspaceBasis.from_pretrained("org/basis"), BasisNotFoundError),
    "bundle": (lambda: open_bundle("org/bundle"), SubspaceError),
}


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("answer", REFUSALS)
def test_a_refusal_is_told_apart_and_not_waited_for(hub, paused, answer, what):
    status, headers, said = REFUSALS[answer]
    call, kind = ASKED[what]
    hub.due(status, times=float("inf"), **headers)
    if answer == "forbidden" and what != "bundle":
        # huggingface_hub itself counts a HEAD that is forbidden as no connection, but its cause says what it is
        said = "does not allow that"
    with pytest.raises(kind, match=said) as caught:
        call()
    assert not isinstance(caught.value, HubUnavailableError) and paused == []


def test_a_repository_that_is_not_there_is_skipped_as_bad_adapters_are(hub, paused):
    basis = build_basis([*LORAS, "org/none"], k=3, progress=False, skip_bad=True)
    assert [entry["name"] for entry in basis.info["skipped"]] == ["org/none"]


def test_compressing_skips_none_for_an_outage(hub, paused, bases, tmp_path):
    hub.due(503, times=float("inf"), only="org/l1")
    with pytest.raises(HubUnavailableError, match="org/l1"):
        compress_fleet(LORAS, str(bases[bert].location), tmp_path / "out", skip_bad=True, progress=False)
    assert not (tmp_path / "out").exists()


# -- uploads ----------------------------------------------------------------------------------------------------------


def test_the_owners_words_are_not_overwritten_for_an_outage(hub, paused, bases):
    pushed(bases)
    before = dict(hub.files("me/basis"))
    hub.due(503, times=float("inf"), only="README")
    with pytest.raises(HubUnavailableError):
        pushed(bases)
    assert hub.files("me/basis") == before


@pytest.mark.parametrize("pull_request", [False, True])
def test_only_what_can_be_done_twice_is_done_again(hub, paused, bases, pull_request):
    basis = SubspaceBasis(dict(bases[bert]), bases[bert].info)
    basis.push_to_hub("me/basis")
    commits = len(hub.repos["me/basis"].commits)
    hub.due("lost", times=1, only="POST .*/commit/")
    if pull_request:
        with pytest.raises(HubUnavailableError, match=r"a pull request may have been opened already.*asked once"):
            basis.push_to_hub("me/basis", create_pr=True)
        assert len(hub.repos["me/basis"].commits) == commits + 1
    else:
        sha = basis.push_to_hub("me/basis")
        assert hub.repos["me/basis"].names["main"] == sha


def test_a_push_without_the_right_token_says_how_to_log_in(hub, paused, bases):
    hub.token = "right"
    with pytest.raises(HfHubHTTPError, match="hf auth login"):
        pushed(bases)
    assert json.dumps(paused) == "[]"


def test_a_basis_that_is_here_is_found_without_the_hub(hub, paused, repos, bases, tmp_path):
    place = str(bases[bert].location)
    config = json.loads((repos["org/task"] / "adapter_config.json").read_text())
    SubspaceBasis.from_pretrained(place)
    _alive.pop(bases[bert].fingerprint, None)
    hub.due(503, times=float("inf"))
    made = SubspaceConfig(
        basis="org/basis", basis_revision="main", basis_fingerprint=config["basis_fingerprint"]
    ).resolve()
    assert made.location == place and hub.asked == 0
