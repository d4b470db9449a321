"""Batches of several tasks at the same time: in threads, executors, coroutines, generators and streams."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TextIteratorStreamer

from subspace_peft import SubspaceConfig, TaskBank
from subspace_peft.errors import SubspaceError

from .served import TURNS, WORKERS, Served, attempt, by_argument, by_block, threads

pytestmark = pytest.mark.usefixtures("many_switches")


def nested(served: Served, worker: int) -> torch.Tensor:
    with torch.no_grad(), served.bank.tasks(["t0", "t0"]):
        with served.bank.tasks(served.rows()[worker]):
            inner = served.model(served.x)
        assert not served.wrong(0, served.model(served.x, adapter_names=served.rows()[0]))
    return inner


def with_gradients(served: Served, worker: int) -> torch.Tensor:
    with served.bank.tasks(served.rows()[worker]):
        return served.model(served.x).detach()


def pool(work: Callable[[int], Any]) -> list[list[Any]]:
    with ThreadPoolExecutor(WORKERS) as executor:
        found = [[executor.submit(attempt, work, i) for _ in range(TURNS)] for i in range(WORKERS)]
        return [[future.result() for future in each] for each in found]


def in_executor(work: Callable[[int], Any]) -> list[list[Any]]:
    async def main() -> list[list[Any]]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(WORKERS) as executor:

            async def worker(i: int) -> list[Any]:
                return [await loop.run_in_executor(executor, attempt, work, i) for _ in range(TURNS)]

            return await asyncio.gather(*map(worker, range(WORKERS)))

    return asyncio.run(main())


def to_thread(work: Callable[[int], Any]) -> list[list[Any]]:
    async def worker(i: int) -> list[Any]:
        return [await asyncio.to_thread(attempt, work, i) for _ in range(TURNS)]

    async def main() -> list[list[Any]]:
        return await asyncio.gather(*map(worker, range(WORKERS)))

    return asyncio.run(main())


@pytest.mark.parametrize("way", [threads, pool, in_executor, to_thread])
@pytest.mark.parametrize("call", [by_block, by_argument, nested, with_gradients])
def test_every_thread_gets_its_own_tasks(served, call, way):
    found = way(lambda worker: call(served, worker))
    problems = [y for worker, each in enumerate(found) for y in each if isinstance(y, Exception)]
    assert not problems, problems[0]
    assert sum(served.wrong(worker, y) for worker, each in enumerate(found) for y in each) == 0
    assert [len(each) for each in found] == [TURNS] * WORKERS
    assert not any(layer.row_slot.open or layer.row_slot.live for layer in served.bank.layers.values())


@pytest.mark.parametrize("inside", ["the coroutine", "a thread", "the argument"])
def test_coroutines_that_take_turns_keep_their_tasks(served, inside):
    async def worker(i: int) -> list[torch.Tensor]:
        found = []
        for _ in range(TURNS):
            with served.bank.tasks(served.rows()[i]):
                await asyncio.sleep(0)
                if inside == "a thread":
                    found.append(await asyncio.to_thread(served.model, served.x))
                elif inside == "the coroutine":
                    found.append(served.model(served.x))
                await asyncio.sleep(0)
            if inside == "the argument":
                await asyncio.sleep(0)
                found.append(served.model(served.x, adapter_names=served.rows()[i]))
        return found

    async def main() -> list[list[torch.Tensor]]:
        return await asyncio.gather(*map(worker, range(WORKERS)))

    for i, each in enumerate(asyncio.run(main())):
        assert not any(served.wrong(i, y) for y in each)


def test_plain_calls_amid_others_are_right_or_refused(linear):
    """A call without names, of the active adapter, while others name theirs by argument: it is right each time."""
    with torch.no_grad():
        own = linear.model(linear.x)

    def work(worker: int) -> bool:
        with torch.no_grad():
            if worker % 2:
                return linear.wrong(worker, by_argument(linear, worker))
            return not torch.allclose(linear.model(linear.x), own, atol=1e-5)

    assert [set(each) for each in threads(work)] == [{False}] * WORKERS


def test_a_thread_without_tasks_beside_a_block_is_refused(linear):
    """Whether it was meant to belong to the block cannot be known: both kinds of program are written."""
    heard: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            heard.append(attempt(lambda _: linear.model(linear.x), 0))
            heard.append(attempt(lambda _: linear.model.base_model.model(linear.x), 0))
            heard.append(by_argument(linear, 1))
            heard.append(by_block(linear, 2))

    with torch.no_grad(), linear.bank.tasks(linear.rows()[0]):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        copied = threading.Thread(target=lambda: heard.append(context.run(linear.model, linear.x)))
        context = contextvars.copy_context()
        copied.start()
        copied.join()
    for refused in heard[:2]:
        assert isinstance(refused, SubspaceError)
        assert "copy_context" in str(refused)
        assert "adapter_names" in str(refused)
    assert not linear.wrong(1, heard[2])
    assert not linear.wrong(2, heard[3])
    assert not linear.wrong(0, heard[4])


def test_a_call_that_began_before_the_block_goes_on(linear):
    """A plain call is under way when another thread enters a block."""
    with torch.no_grad():
        own = linear.model(linear.x)
    entered, answered = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        if threading.current_thread() is thread:
            entered.set()
            answered.wait(10)

    heard: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: heard.append(torch.no_grad()(linear.model)(linear.x)))
    hook = linear.model.base_model.model.two.base_layer.register_forward_hook(pause)
    try:
        thread.start()
        assert entered.wait(10)
        with linear.bank.tasks(linear.rows()[0]):
            answered.set()
            thread.join()
    finally:
        hook.remove()
    torch.testing.assert_close(heard[0], own)


def test_a_coroutine_that_outlives_its_block_is_refused(linear):
    async def main() -> Any:
        async def late() -> torch.Tensor:
            await asyncio.sleep(0.01)
            return linear.model(linear.x)

        with linear.bank.tasks(linear.rows()[0]):
            task = asyncio.create_task(late())
        return await asyncio.gather(task, return_exceptions=True)

    (heard,) = asyncio.run(main())
    assert isinstance(heard, SubspaceError)
    assert "left before" in str(heard)
    by_argument(linear, 0)


def test_generators_that_take_turns_are_refused(linear):
    """They share their caller's context; a server that runs each step in a thread gives each another one."""

    def stream(worker: int) -> Iterator[torch.Tensor]:
        with linear.bank.tasks(linear.rows()[worker]):
            yield linear.model(linear.x)
            yield linear.model(linear.x)

    first, second = stream(0), stream(1)
    next(first), next(second), next(first)
    with pytest.raises(SubspaceError, match="yield"):
        next(first)
    second.close()
    stepwise = stream(0)
    contextvars.copy_context().run(next, stepwise)
    with pytest.raises(SubspaceError, match="coroutine"):
        contextvars.copy_context().run(next, stepwise)
    assert not linear.wrong(2, by_argument(linear, 2))
    assert not any(layer.row_slot.open for layer in linear.bank.layers.values())


@pytest.mark.parametrize("entered", ["inside", "outside", "argument"])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "top_k": 1}], ids=["greedy", "sampling"])
def test_streaming_from_a_generating_thread(served_llama, entered, how):
    model, bank, x = served_llama

    class Tokens:
        def decode(self, tokens: Any, **_: Any) -> str:
            return "".join(f"{int(token)} " for token in tokens)

    def stream(name: str) -> str:
        streamer = TextIteratorStreamer(Tokens(), timeout=30)
        given = {"input_ids": x, "max_new_tokens": 6, "pad_token_id": 0, "streamer": streamer, **how}

        def inside() -> None:
            with bank.tasks([name]):
                model.generate(**given)

        if entered == "inside":
            thread = threading.Thread(target=inside)
        elif entered == "argument":
            thread = threading.Thread(target=model.generate, kwargs={**given, "adapter_names": [name]})
        else:
            with bank.tasks([name]):
                thread = threading.Thread(
                    target=contextvars.copy_context().run, args=(lambda: model.generate(**given),)
                )
                thread.start()
                return "".join(streamer)
        thread.start()
        heard = "".join(streamer)
        thread.join()
        return heard

    wanted = {f"t{i}": model.generate(x, adapter_names=[f"t{i}"], max_new_tokens=6, pad_token_id=0) for i in range(3)}
    with ThreadPoolExecutor(3) as executor:
        heard = dict(zip(wanted, executor.map(stream, wanted), strict=True))
    for name, tokens in wanted.items():
        assert heard[name].split()[-6:] == [str(int(token)) for token in tokens[0, -6:]]


def test_beams_in_threads(served_llama):
    model, bank, x = served_llama
    common = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    wanted = [model.generate(x, adapter_names=[f"t{i}"], **common) for i in range(WORKERS)]

    def work(worker: int) -> bool:
        if worker % 2:
            return torch.equal(model.generate(x, adapter_names=[f"t{worker}"], **common), wanted[worker])
        with bank.tasks([f"t{worker}"], copies=3):
            return torch.equal(model.generate(x, **common), wanted[worker])

    assert [set(each) for each in threads(work)] == [{True}] * WORKERS


@pytest.fixture(scope="module")
def served_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=60,
        eos_token_id=None,
    )
    model = get_peft_model(
        LlamaForCausalLM(config),
        SubspaceConfig(basis="random", k=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    ).eval()
    bank = TaskBank(model)
    for i in range(WORKERS):
        bank.add(f"t{i}", {name: 8 * torch.randn(layer.r["default"]) for name, layer in bank.layers.items()})
    return model, bank, torch.arange(1, 9)[None]
