"""Batches in threads while tasks come and go, and while the whole model changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from subspace_peft import SubspaceConfig, TaskBank, hotswap
from subspace_peft.errors import SubspaceError

from ..models import randomise
from .served import MODELS, WORKERS, Served, attempt, block, by_argument, by_block, by_names, threads

pytestmark = pytest.mark.usefixtures("many_switches")


def meanwhile(change: Callable[[int], None], work: Callable[[int], Any]) -> tuple[list[list[Any]], list[Exception]]:
    """Do `work` in threads while another changes something over and over."""
    stop, errors = threading.Event(), []

    def changing() -> None:
        number = 0
        while not stop.is_set():
            try:
                change(number)
            except Exception as error:
                errors.append(error)
                return
            number += 1

    thread = threading.Thread(target=changing)
    thread.start()
    try:
        return threads(work), errors
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("change", ["grow", "come and go", "replace others", "load adapters", "swap others"])
@pytest.mark.parametrize("call", [by_block, by_argument])
def test_tasks_that_stay_are_right_while_others_change(change, call, tmp_path):
    served = Served(*MODELS["linear"])
    served.model.add_adapter("other", SubspaceConfig(basis="random", k=3, target_modules=["one"], alpha=8.0))
    served.model.save_pretrained(tmp_path, selected_adapters=["other"])
    others = [served.cores(seed) for seed in (100, 101)]

    def changing(number: int) -> None:
        if change == "grow":
            served.bank.add(f"new{number}", others[0])
        elif change == "replace others":
            served.bank.add("other", others[number % 2])
        elif change == "load adapters":
            served.model.load_adapter(tmp_path / "other", f"more{number}")
        elif change == "swap others":
            hotswap(served.model, tmp_path / "other", "other")
        elif number % 2:
            served.bank.remove("new")
        else:
            served.bank.add("new", others[0])

    found, errors = meanwhile(changing, lambda worker: call(served, worker))
    assert not errors
    if change == "swap others":
        # a batch with one of the model's own adapters in it cannot tell which was swapped
        found = [[y for y in each if not isinstance(y, SubspaceError)] for each in found]
    assert not any(served.wrong(worker, y) for worker, each in enumerate(found) for y in each)


def test_a_task_that_is_replaced_is_one_or_the_other(linear):
    """Never the one in some layers, and the other in the rest."""
    versions = [linear.cores(seed) for seed in (7, 8)]
    answers = []
    for version in versions:
        linear.bank.add("changing", version)
        answers.append(linear.model(linear.x, adapter_names=["changing"] * 2))

    def work(worker: int) -> bool:
        with torch.no_grad():
            given = linear.model(linear.x, adapter_names=["changing"] * 2)
        return any(torch.allclose(given, answer, atol=1e-4) for answer in answers)

    found, errors = meanwhile(lambda number: linear.bank.add("changing", versions[number % 2]), work)
    assert not errors
    assert [set(each) for each in found] == [{True}] * WORKERS


def test_a_block_keeps_the_tasks_that_it_was_entered_with(linear):
    linear.bank.add("short", linear.cores(9))
    with torch.no_grad(), linear.bank.tasks(["short", "t0"]):
        before = linear.model(linear.x)
    with torch.no_grad(), linear.bank.tasks(["short", "t0"]):
        linear.bank.remove("short")
        linear.bank.add("another", linear.cores(10))  # in the place that it had
        torch.testing.assert_close(linear.model(linear.x), before)
    linear.bank.remove("another")
    with pytest.raises(SubspaceError, match="non-existing"):
        by_names(linear, ["short", "t0"])


def test_tasks_are_added_from_threads(linear):
    bank = TaskBank(linear.model, capacity=2)
    try:

        def work(worker: int) -> None:
            number = len(bank)
            bank.add(f"{worker}/{number}", linear.cores(worker))
            if number % 3 == 0:
                bank.remove(f"{worker}/{number}")

        problems = [y for each in threads(work) for y in each if y is not None]
        assert not problems, problems[0]
        assert len(set(bank.slots.values())) == len(bank)
        for name in bank:
            wanted = linear.cores(int(name[0]))
            assert all(torch.equal(core, wanted[module]) for module, core in bank[name].items())
    finally:
        for layer in linear.bank.layers.values():
            layer.bank = linear.bank


def swapped_meanwhile(served: Served, change: Callable[[], Any], call: Callable[[], Any]) -> Any:
    """Call the model, and have another thread do `change` between its first layer and its second."""
    caller = threading.get_ident()

    def meddle(*_: Any) -> None:
        if threading.get_ident() == caller:
            thread = threading.Thread(target=change)
            thread.start()
            thread.join()

    hook = served.model.base_model.model.two.base_layer.register_forward_pre_hook(meddle)
    try:
        return attempt(lambda _: call(), 0)
    finally:
        hook.remove()


def test_what_changes_the_whole_model_is_refused_under_way(tmp_path):
    served = Served(*MODELS["linear"])
    randomise(served.model, seed=5).save_pretrained(tmp_path)
    model, mixed = served.model, ["default", "t0"]

    def disable_and_enable() -> None:
        model.base_model.disable_adapter_layers()

    for change, message in [
        (lambda: hotswap(model, tmp_path), "hotswap"),
        (lambda: model.merge_adapter(), "merge"),
        (lambda: (model.merge_adapter(), model.unmerge_adapter()), "merge"),
        (disable_and_enable, "disabled"),
        (lambda: model.delete_adapter("default"), "deleted"),
    ]:
        for call in (lambda: by_names(served, mixed), lambda: block(served, mixed)):
            if message == "merge" and "default" not in model.peft_config:
                continue
            heard = swapped_meanwhile(served, change, call)
            assert isinstance(heard, SubspaceError), (message, heard)
            assert message in str(heard)
            if any(layer.merged for layer in served.bank.layers.values()):
                model.unmerge_adapter()
            if message == "deleted":
                return
            model.base_model.enable_adapter_layers()


def test_names_are_refused_while_another_thread_has_disabled_the_adapters(linear):
    disabled, done, found = threading.Event(), threading.Event(), []

    def disable() -> None:
        with torch.no_grad(), linear.model.disable_adapter():
            disabled.set()
            done.wait(20)
            found.append(linear.model(linear.x))
            found.append(linear.model(linear.x, adapter_names=["t0", "t1"]))

    other = threading.Thread(target=disable)
    other.start()
    try:
        assert disabled.wait(20)
        for call in (by_argument, by_block):
            with pytest.raises(SubspaceError, match="Another thread has disabled"):
                call(linear, 0)
    finally:
        done.set()
        other.join()
    with torch.no_grad():
        base = linear.model(linear.x, adapter_names=["__base__"] * 2)
    # as with PEFT's own methods, where adapters are disabled in the thread itself their names do nothing
    assert all(torch.allclose(each, base, atol=1e-5) for each in found)
    assert not linear.wrong(0, by_argument(linear, 0))


def test_set_adapter_in_another_thread_changes_no_named_row(linear):
    linear.model.add_adapter("spare", SubspaceConfig(basis="random", k=3, target_modules=["one"], alpha=8.0))
    found, errors = meanwhile(
        lambda number: linear.model.set_adapter(["spare", "default"][number % 2]),
        lambda worker: linear.wrong(worker, by_argument(linear, worker)),
    )
    linear.model.set_adapter("default")
    linear.model.delete_adapter("spare")
    assert not errors
    assert [set(each) for each in found] == [{False}] * WORKERS
