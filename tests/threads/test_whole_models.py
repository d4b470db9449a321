"""Batches in threads with modules that are trained whole, gradients, copies of the model and compilers."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from subspace_peft import SubspaceConfig, TaskBank
from subspace_peft.errors import SubspaceError

from ..models import bert, inputs, randomise
from .served import MODELS, WORKERS, Plain, Served, attempt, by_argument, by_names, threads

pytestmark = pytest.mark.usefixtures("many_switches")


def test_modules_to_save_in_threads():
    config = {"basis": "random", "k": 3, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = get_peft_model(bert(), SubspaceConfig(**config))
    model.add_adapter("two", SubspaceConfig(**config))
    model.add_adapter("headless", SubspaceConfig(**{**config, "modules_to_save": None}))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "modules_to_save" in name:
            parameter.data.add_(number)
    randomise(model).eval()
    bank = TaskBank(model)
    bank.add("banked", {name: torch.randn(layer.r["default"]) for name, layer in bank.layers.items()})
    rows = [["two", "default", "__base__"], ["default", "two", "two"], ["banked", "two", "headless"], ["banked"] * 3]
    with torch.no_grad():
        alone = [model(inputs(), adapter_names=names).logits for names in rows]
        single = {name: model(inputs(), adapter_names=[name] * 3).logits for name in {*rows[0], *rows[2]}}
    for names, answer in zip(rows, alone, strict=True):
        for i, name in enumerate(names):
            torch.testing.assert_close(answer[i], single[name][i], atol=1e-5, rtol=1e-4)

    def work(worker: int) -> bool:
        with torch.no_grad():
            if worker % 2:
                return torch.allclose(model(inputs(), adapter_names=rows[worker]).logits, alone[worker], atol=1e-5)
            with bank.tasks(rows[worker]):
                return torch.allclose(model(inputs()).logits, alone[worker], atol=1e-5)

    assert [set(each) for each in threads(work)] == [{True}] * WORKERS
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        torch.testing.assert_close(twin(inputs(), adapter_names=rows[0]).logits, alone[0])


class Checkpointed(Plain):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(lambda y: self.two(self.one(y).tanh()), x, use_reentrant=self.reentrant)
        return self.three(h.tanh())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["inside", "after", "in another thread", "in another thread, after"])
def test_recomputation_has_its_tasks_or_is_refused(where, reentrant):
    served = Served(Checkpointed, *MODELS["linear"][1:])
    model, names = served.model, ["t0", "t1"]
    model.base_model.model.reentrant = reentrant
    x = served.x.clone().requires_grad_()
    free = Served(*MODELS["linear"])
    (wanted,) = torch.autograd.grad(free.model(x, adapter_names=names).square().sum(), x)

    def backward() -> None:
        if "thread" not in where:
            loss.backward()
            return
        heard: list[Any] = []
        thread = threading.Thread(target=lambda: heard.append(attempt(lambda _: loss.backward(), 0)))
        thread.start()
        thread.join()
        if heard[0] is not None:
            raise heard[0]

    with served.bank.tasks(names):
        loss = model(x).square().sum()
        if "after" not in where:
            if where == "inside":
                backward()
                torch.testing.assert_close(x.grad, wanted, atol=1e-4, rtol=1e-3)
                return
            with pytest.raises(SubspaceError):
                backward()
            return
    with pytest.raises(SubspaceError, match="checkpoint"):
        backward()
    # training is left alone
    model.train()
    model(x).square().sum().backward()


def test_training_mode_of_any_layer_is_refused(linear):
    linear.model.base_model.model.train()
    try:
        with pytest.raises(SubspaceError, match="training mode"):
            by_argument(linear, 0)
    finally:
        linear.model.eval()


def test_replicas_compute_their_own_rows_or_refuse(linear):
    """What `nn.DataParallel` does: shallow copies of all modules, each in a thread."""
    replicas = [shallow(linear.model) for _ in range(2)]

    def work(worker: int) -> Any:
        names = linear.rows()[worker]
        return linear.wrong(worker, torch.no_grad()(replicas[worker % 2])(linear.x, adapter_names=names))

    assert [set(each) for each in threads(work)] == [{False}] * WORKERS
    with linear.bank.tasks(["t0", "t1"] * 2):
        heard: list[Any] = []
        for replica in replicas:
            thread = threading.Thread(target=lambda r=replica: heard.append(attempt(lambda _: r(linear.x), 0)))
            thread.start()
            thread.join()
    assert all(isinstance(each, SubspaceError) for each in heard)


def shallow(module: nn.Module) -> nn.Module:
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else shallow(child)
    for name, value in module._parameters.items():
        twin._parameters[name] = value
    for name, value in module._buffers.items():
        twin._buffers[name] = value
    return twin


def test_a_deep_copy_has_batches_of_its_own(linear):
    with torch.no_grad(), linear.bank.tasks(["t0", "t1"]):
        twin = copy.deepcopy(linear.model)
        plain = twin(linear.x)
    with torch.no_grad():
        torch.testing.assert_close(linear.model(linear.x), plain)
        assert not torch.allclose(plain, linear.model(linear.x, adapter_names=["t0", "t1"]), atol=1e-3)


@pytest.mark.usefixtures("compiler")
def test_one_compilation_serves_all_batches_of_a_bank():
    """And it serves the tasks of the thread that calls."""
    served = Served(*MODELS["linear"])
    counter = CompileCounter()
    compiled = torch.compile(served.model, backend=counter, fullgraph=True, dynamic=False)
    rows = [["t0", "__base__"], ["t1", "t2"], ["t3", "t1"], ["t4", "t4"]]
    wanted = [by_names(served, names) for names in rows]
    with torch.no_grad():
        own = served.model(served.x)
        for names, answer in zip(rows, wanted, strict=True):
            with served.bank.tasks(names):
                torch.testing.assert_close(compiled(served.x), answer, atol=1e-5, rtol=1e-4)
        assert counter.frame_count == 1
        torch.testing.assert_close(compiled(served.x), own, atol=1e-5, rtol=1e-4)
        assert counter.frame_count == 2
        torch.testing.assert_close(compiled(served.x, adapter_names=rows[1]), wanted[1], atol=1e-5, rtol=1e-4)
        assert counter.frame_count == 3

        def work(worker: int) -> bool:
            with torch.no_grad(), served.bank.tasks(rows[worker]):
                return torch.allclose(compiled(served.x), wanted[worker], atol=1e-4)

        assert [set(each) for each in threads(work)] == [{True}] * WORKERS
        assert counter.frame_count == 3


@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_in_coroutines():
    served = Served(*MODELS["linear"])
    compiled = torch.compile(served.model, backend="eager")
    with torch.no_grad():
        own = served.model(served.x)

    async def worker(i: int) -> list[bool]:
        found = []
        for _ in range(3):
            with served.bank.tasks(served.rows()[i]):
                await asyncio.sleep(0)
                found.append(served.wrong(i, compiled(served.x)))
                await asyncio.sleep(0)
        return found

    async def plain() -> list[bool]:
        found = []
        for _ in range(6):
            await asyncio.sleep(0)
            given = attempt(lambda _: compiled(served.x), 0)
            found.append(not isinstance(given, SubspaceError) and not torch.allclose(given, own, atol=1e-4))
        return found

    async def main() -> list[list[bool]]:
        return await asyncio.gather(*map(worker, range(3)), plain())

    assert not any(any(each) for each in asyncio.run(main()))
