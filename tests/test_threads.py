"""Batches of several tasks at the same time: in threads, executors and coroutines, and while tasks come and go."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, TextIteratorStreamer
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig, TaskBank, hotswap
from subspace_peft.errors import SubspaceError

from .models import bert, inputs, randomise

WORKERS, TURNS = 4, 6


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.second, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.embed(x)).tanh())


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).tanh())


class Plain(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.one, self.two, self.three = layer(8, 8), layer(8, 8), layer(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x).tanh()).tanh())


def quantised(layer: str, **given: Any) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Plain(lambda rows, columns: getattr(bitsandbytes.nn, layer)(rows, columns, **given))
    return model.to("cpu")  # which quantises


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[], torch.Tensor]]] = {
    "linear": (Plain, ["one", "two", "three"], lambda: torch.randn(2, 3, 8)),
    "conv1d": (lambda: Plain(lambda n, m: Conv1D(m, n)), ["one", "two", "three"], lambda: torch.randn(2, 3, 8)),
    "conv2d": (Convolved, ["one", "two"], lambda: torch.randn(2, 2, 5, 5)),
    "embedding": (Embedded, ["embed", "second", "out"], lambda: torch.randint(0, 20, (2, 5))),
    "8 bits": (
        partial(quantised, "Linear8bitLt", has_fp16_weights=False),
        ["one", "two", "three"],
        lambda: torch.randn(2, 3, 8),
    ),
    "4 bits": (partial(quantised, "Linear4bit"), ["one", "two", "three"], lambda: torch.randn(2, 3, 8)),
}
"""Kind → a model, the modules that are adapted, an input of two rows."""


class Served:
    """A model with a bank of tasks, and what each task answers when it is alone."""

    def __init__(self, make: Callable[[], nn.Module], targets: list[str], given: Callable[[], torch.Tensor]) -> None:
        torch.manual_seed(0)
        config = SubspaceConfig(basis="random", k=3, target_modules=targets, alpha=8.0, extra_rank=1)
        self.model = randomise(get_peft_model(make(), config), std=1.0).eval()
        for name, parameter in self.model.named_parameters():
            if "extra" in name:
                parameter.data *= 20  # their scale is small at a small alpha
        self.x = given()
        self.bank = TaskBank(self.model, capacity=2, extra_rank=2)
        for name in range(WORKERS + 1):
            self.bank.add(f"t{name}", self.cores(name), own=self.own(name))
        with torch.no_grad():
            self.alone = {name: self.model(self.x, adapter_names=names) for name, names in self.rows().items()}

    def cores(self, seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {name: torch.randn(layer.r["default"], generator=draw) for name, layer in self.bank.layers.items()}

    def own(self, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Two own directions, one or none."""
        rank, draw = (2, 1, 0)[seed % 3], torch.Generator().manual_seed(seed)
        sizes = {name: (layer.out_features, layer.in_features) for name, layer in self.bank.layers.items()}
        return {
            name: (torch.randn(out, rank, generator=draw), torch.randn(rank, size, generator=draw))
            for name, (out, size) in sizes.items()
        }

    def rows(self) -> dict[int, list[str]]:
        """A mixed batch for each worker: tasks of the bank, the model's adapter, the base model."""
        return {i: [f"t{i}", ["default", "__base__", f"t{i + 1}"][i % 3]] for i in range(WORKERS)}

    def wrong(self, worker: int, answer: torch.Tensor) -> bool:
        return not torch.allclose(answer, self.alone[worker], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", params=MODELS)
def served(request) -> Served:
    return Served(*MODELS[request.param])


@pytest.fixture(scope="module")
def linear() -> Served:
    return Served(*MODELS["linear"])


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def by_block(served: Served, worker: int) -> torch.Tensor:
    with torch.no_grad(), served.bank.tasks(served.rows()[worker]):
        return served.model(served.x)


def by_argument(served: Served, worker: int) -> torch.Tensor:
    with torch.no_grad():
        return served.model(served.x, adapter_names=served.rows()[worker])


def nested(served: Served, worker: int) -> torch.Tensor:
    with torch.no_grad(), served.bank.tasks(["t0", "t0"]):
        with served.bank.tasks(served.rows()[worker]):
            inner = served.model(served.x)
        assert not served.wrong(0, served.model(served.x, adapter_names=served.rows()[0]))
    return inner


def with_gradients(served: Served, worker: int) -> torch.Tensor:
    with served.bank.tasks(served.rows()[worker]):
        return served.model(served.x).detach()


def threads(work: Callable[[int], Any]) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in range(WORKERS)]
    started = [
        threading.Thread(target=lambda i=i: found[i].extend(attempt(work, i) for _ in range(TURNS)))
        for i in range(WORKERS)
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return found


def attempt(work: Callable[[int], Any], worker: int) -> Any:
    try:
        return work(worker)
    except Exception as error:
        return error


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


# -- tasks come and go ------------------------------------------------------------------------------------------------


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


def by_names(served: Served, names: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return served.model(served.x, adapter_names=names)


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


def block(served: Served, names: list[str]) -> torch.Tensor:
    with torch.no_grad(), served.bank.tasks(names):
        return served.model(served.x)


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


# -- modules that are trained whole -----------------------------------------------------------------------------------


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


# -- gradients --------------------------------------------------------------------------------------------------------


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


# -- copies of a model, compilers -------------------------------------------------------------------------------------


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


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


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
