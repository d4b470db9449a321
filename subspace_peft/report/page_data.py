"""The data behind the page's controls: whole numbers, so that hundreds of modules stay small."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .facts import ReportFacts

# whole numbers per 1: of shares in a module, of parts that are added up over modules, and of the shares that decide k
SCALES = {"kept": 10**5, "parts": 10**8, "held": 10**6}


def page_data(report: ReportFacts) -> str:
    """Return the data as JSON that may stand in a script element, whatever the modules are called.

    Args:
        report: with curves and choices.
    """
    choices, modules = report.choices, []
    for name, each in choices["modules"].items():
        module = {"name": name, **each}
        if name in report.curves:
            curve = report.curves[name]
            module |= {
                "weight": curve["weight"],
                "held": _whole(curve["held"], "held"),
                "kept": [_whole(curve[key], "kept") for key in ("seen", "left_out", "null")],
                "parts": [_whole(curve["in_all"][key], "parts") for key in ("seen", "left_out", "null")],
            }
            if curve["alternated"] and len(curve["alternated"]) < max(curve["spans"]) - 1:
                module["at"] = curve["alternated"]  # where the curves are a build's; elsewhere they are near
        modules.append(module)
    read, all_adapters = report.how["sources"]
    data = {
        "modules": modules,
        "scales": SCALES,
        "adapters": choices["adapters"],
        "loras": choices["bytes_of_loras"],
        "entry": choices["bytes_of_entry"],
        "direction": choices["bytes_of_direction"],
        "k": choices["k"],
        "same": choices["same"],
        "begin": choices["begin"],
        "out": choices["out"],
        "exact": read == all_adapters and len(report.curves) == len(modules),
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _whole(curve: Sequence[float] | None, scale: str) -> list[int] | None:
    return None if curve is None else [round(value * SCALES[scale]) for value in curve]
