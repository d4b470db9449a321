"""Draw overview.svg, the picture that README and docs open with: a fleet → one basis → kilobyte tasks, and serving.

    python docs/figures/overview.py

All figures are read from benchmarks/results. The picture brings its own background, in light and in dark, so that it
can be read on any page, and large letters, so that it can be read at the width of a phone.
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PLACE = Path(__file__).with_name("overview.svg")
LORA_RANK = 8  # of the LoRAs in load_many.json

STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
  .title { font-size: 23px; font-weight: 600 }
  .word { font-size: 20px }
  .small { font-size: 19px; fill: #57606a }
  .page { fill: #ffffff; stroke: #d0d7de }
  .lora { fill: #cfd6de; stroke: #8c959f }
  .basis { fill: #0b6b8a }
  .task { fill: #cc7014 }
  .bar { fill: #87919c }
  .ours { fill: #cc7014 }
  .arrow { stroke: #57606a; stroke-width: 3; fill: none; marker-end: url(#head) }
  .head { fill: #57606a }
  .line { stroke: #d0d7de }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .small { fill: #9aa5b1 }
    .page { fill: #0d1117; stroke: #30363d }
    .lora { fill: #3d4650; stroke: #7d8794 }
    .basis { fill: #2f9dc0 }
    .task, .ours { fill: #e58e26 }
    .bar { fill: #626d79 }
    .arrow { stroke: #9aa5b1 }
    .head { fill: #9aa5b1 }
    .line { stroke: #30363d }
  }
"""


def size(count: float) -> str:
    """Return a number of bytes in kB or MB, in two digits."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def figures() -> dict[str, str]:
    """Read what the picture shows from the committed results."""
    loading = json.loads((RESULTS / "load_many.json").read_text(encoding="utf-8"))
    mixed = json.loads((RESULTS / "mixed_batch.json").read_text(encoding="utf-8"))
    lora, task = (loading["results"][name] for name in ("LoRA r=8, load_adapter", "core, load_adapter"))
    served = mixed["results"]["query, value, 1000 tasks"]["64 rows × 1"]
    return {
        "lora": size(lora["file_bytes"]),
        # the two sides of k directions are shaped as the two factors of a LoRA of rank k
        "basis": size(lora["memory_bytes"] * loading["settings"]["k"] / LORA_RANK),
        "task": size(task["file_bytes"]),
        "one": f"{served['one LoRA']['cpu_ratio']:.2f}",
        "each": f"{served['LoRA adapter_names']['cpu_ratio']:.2f}",
        "ours": f"{served['core bank']['cpu_ratio']:.2f}",
    }


def text(x: float, y: float, words: str, kind: str = "word", anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, radius: float = 4) -> str:
    """Return a rectangle."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


def path(found: dict[str, str]) -> list[str]:
    """Return the upper half: adapters, their basis, tasks."""
    parts = [text(110, 44, "LoRA adapters", "title"), text(320, 44, "one basis", "title")]
    parts += [text(530, 44, "new tasks", "title")]
    for at in range(4):
        parts.append(box(48 + 12 * at, 66 + 12 * at, 88, 88, "lora"))
    parts.append(box(282, 84, 76, 88, "basis"))
    for at in range(12):
        parts.append(box(470 + 33 * (at % 4), 84 + 33 * (at // 4), 22, 22, "task"))
    parts += ['<path class="arrow" d="M192 128 H258"/>', '<path class="arrow" d="M376 128 H446"/>']
    parts += [text(110, 222, f"{found['lora']} each"), text(320, 222, f"{found['basis']}, once")]
    parts += [text(530, 222, f"{found['task']} each")]
    parts += [text(110, 248, "trained by PEFT", "small"), text(320, 248, "frozen, shared", "small")]
    parts += [text(530, 248, "trained by PEFT", "small")]
    return parts


def serving(found: dict[str, str]) -> list[str]:
    """Return the lower half: the cost of a batch in which every row is of another task."""
    parts = [
        '<path class="line" d="M24 276 H616"/>',
        text(320, 316, "a batch of 64 rows, each of another task", "title"),
    ]
    parts.append(text(320, 344, "CPU time for a token; 1 is the frozen model alone", "small"))
    unit = 152  # of one model's time
    rows = (
        ("one", "one LoRA for all rows", "bar"),
        ("each", "a LoRA per row (PEFT)", "bar"),
        ("ours", "a task per row, in one basis", "ours"),
    )
    for at, (key, label, kind) in enumerate(rows):
        y = 362 + 62 * at
        parts.append(text(36, y + 17, label, "word", "start"))
        parts.append(box(36, y + 25, unit * float(found[key]), 22, kind, 3))
        parts.append(text(36 + unit * float(found[key]) + 10, y + 43, found[key], "word", "start"))
    return parts


def draw() -> str:
    """Return the picture."""
    found = figures()
    about = (
        f"LoRA adapters of {found['lora']} each make one frozen basis of {found['basis']}; a new task in it takes"
        f" {found['task']}. Decoding a batch of 64 rows, each of another of 1,000 tasks, costs {found['ours']} of the"
        f" frozen model's CPU time, with a LoRA per row {found['each']}, with one LoRA for all rows {found['one']}."
    )
    head = '<marker id="head" markerWidth="5" markerHeight="6" refX="3" refY="3" orient="auto">'
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 560" role="img" aria-labelledby="title">',
        f'<title id="title">{escape(about)}</title>',
        f"<style>{STYLE}</style>",
        f'<defs>{head}<path class="head" d="M0 0 L5 3 L0 6 z"/></marker></defs>',
        box(1, 1, 638, 558, "page", 10),
        *path(found),
        *serving(found),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PLACE.write_text(draw(), encoding="utf-8")
