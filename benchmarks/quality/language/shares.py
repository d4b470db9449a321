"""How many parameters each row trains, as shares of LoRA r=8's, by arithmetic for models of other widths."""

from __future__ import annotations

from .rows import MORE, TABLE
from .setting import WIDE, K

# (outputs, inputs) of the adapted query and value of one layer: MiniLM, SmolLM2-135M, Mistral-7B
SHAPES = {
    384: ((384, 384), (384, 384)),
    576: ((576, 576), (192, 576)),
    4096: ((4096, 4096), (1024, 4096)),
}


def parameters(row: str, shapes: tuple[tuple[int, int], ...]) -> int:
    """Return how many parameters a row trains on modules of these `shapes`.

    Raises:
        ValueError: there is no such row.
    """
    name, _, more = row.partition(" + ")
    own = int(more.split()[0]) if more else 0
    if name == "zero-shot":
        return 0
    if name.startswith("LoRA r="):
        return sum(int(name.removeprefix("LoRA r=")) * (out + inner) for out, inner in shapes)
    if name.startswith("VeRA r="):
        return sum(int(name.removeprefix("VeRA r=")) + out for out, _ in shapes)
    if name == "mean only":
        return len(shapes)
    if name in ("fleet", "random", "base weights", "fleet k=32"):
        k = WIDE if name == "fleet k=32" else K
        return sum(k * k + own * (out + inner) for out, inner in shapes)
    raise ValueError(f"There is no row {row!r}.")


def shares_table() -> list[str]:
    """Return the rows' parameters as shares of LoRA r=8's, on query and value, per width."""
    lines = [
        f"| row | {' | '.join(f'{width:,} wide' for width in SHAPES)} |",
        f"|---|{'---|' * len(SHAPES)}",
    ]
    for row in (*TABLE, *MORE):
        each = [100 * parameters(row, shapes) / parameters("LoRA r=8", shapes) for shapes in SHAPES.values()]
        lines.append(
            f"| {row} | {' | '.join(f'{share:.2g} %' if share < 10 else f'{share:.0f} %' for share in each)} |"
        )
    return lines
