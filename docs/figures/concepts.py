"""Draw the figures of docs/concepts.md from a fleet of real adapters and a basis of them.

    subspace-peft demo --stage sources --out demo-output
    python docs/figures/concepts.py demo-output

Every line and every pixel is of the arrays and files in that folder: eight LoRAs (r=8, query and value of the upper
three layers of MiniLM) on text tasks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file

from subspace_peft import SubspaceBasis, build_basis, project_lora
from subspace_peft.report import analyze_fleet, report_basis

HERE = Path(__file__).parent
SHOWN = 96  # of 384 rows and columns, so that single entries are seen
K = 16
STYLE = {
    "font.family": "sans-serif",
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "subspace-peft",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(fleet: Path, out: Path) -> None:
    """Draw all figures of the adapters in `fleet`/loras into `out`."""
    adapters = sorted(folder for folder in (fleet / "loras").iterdir() if folder.is_dir())
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(STYLE):
        place = Path(folder) / "basis"
        build_basis(adapters, k=K, progress=False).save_pretrained(place)
        basis = SubspaceBasis.from_pretrained(place)
        module = [name for name in basis if name.endswith("query")][-1]
        shown = next((each for each in adapters if each.name == "movies"), adapters[0])
        save(product(basis, shown, module), out / "product.svg")
        save(relations(adapters), out / "relations.svg")
        save(energy(place, adapters, module), out / "energy.svg")
        save(break_even(place, adapters, Path(folder)), out / "break-even.svg")


def save(figure: Figure, file: Path) -> None:
    """Write a figure without a date, so that the same arrays give the same file."""
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def product(basis: SubspaceBasis, adapter: Path, name: str) -> Figure:
    """Draw an adapter's update of one module, and the three matrices that stand for it."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = f"base_model.model.{name}"
    update = tensors[f"{prefix}.lora_B.weight"].double() @ tensors[f"{prefix}.lora_A.weight"].double()
    module = basis[name]
    core = project_lora(adapter, basis).cores[name].double()
    figure = plt.figure(figsize=(5.4, 2.5))
    grid = figure.add_gridspec(1, 4, width_ratios=[SHOWN, K, K, SHOWN], wspace=0.35)
    for place, (array, title, sizes) in enumerate(
        [
            (update.numpy()[:SHOWN, :SHOWN], "update ΔW  ≈", "{} × {}".format(*update.shape)),
            (module.U.double().numpy()[:SHOWN], "U", "{} × {}".format(*module.U.shape)),
            (core.numpy(), "core", "{} × {}".format(*core.shape)),
            (module.V.double().numpy()[:, :SHOWN], "V", "{} × {}".format(*module.V.shape)),
        ]
    ):
        axes = figure.add_subplot(grid[place])
        picture(axes, array, title, sizes)
    return figure


def picture(axes: Axes, array: np.ndarray, title: str, sizes: str) -> None:
    """Draw a matrix as a picture: blue below zero, red above."""
    most = np.abs(array).max()
    axes.imshow(array, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="none")
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(sizes, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.set_anchor("N")


def relations(adapters: list[Path]) -> Figure:
    """Draw how alike the adapters' updates are: cosines between them."""
    analysis = analyze_fleet(adapters, progress=False)
    cosines = np.array(analysis.cosines)
    names = [source["name"] for source in analysis.sources]
    # related ones beside one another: by the second eigenvector of the cosines
    order = np.argsort(np.linalg.eigh(cosines)[1][:, -2])
    cosines, names = cosines[np.ix_(order, order)], [names[place] for place in order]
    figure, axes = plt.subplots(figsize=(4.8, 4.4))
    np.fill_diagonal(cosines, np.nan)
    axes.imshow(cosines, cmap="Blues", vmin=0, vmax=np.nanmax(cosines))
    for row, column in np.ndindex(cosines.shape):
        if row != column:
            dark = cosines[row, column] > 0.6 * np.nanmax(cosines)
            said = (
                f"{abs(cosines[row, column]):.2f}"
                if abs(cosines[row, column]) < 0.005
                else f"{cosines[row, column]:.2f}"
            )
            axes.text(column, row, said, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return figure


def energy(basis: Path, adapters: list[Path], module: str) -> Figure:
    """Draw what a basis keeps of adapters, by its size, on one module."""
    found = report_basis(basis, adapters, progress=False).modules[module]
    figure, axes = plt.subplots(figsize=(5, 3.6))
    for values, label, line in (
        (found.seen, "adapters it was built from", "-"),
        (found.null, "noise it was built from", ":"),
        (found.left_out, "an adapter left out", "--"),
        (found.random, "any adapter, random basis", "-."),
    ):
        axes.plot(found.ks, [100 * value for value in values], line, marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.ks, [str(k) for k in found.ks])
    axes.set_xlabel("k, directions per side")
    axes.set_ylabel("energy kept, %")
    axes.set_ylim(-2, 102)
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2)
    return figure


def break_even(basis: Path, adapters: list[Path], work: Path) -> Figure:
    """Draw bytes of basis and tasks beside bytes of LoRAs, heads left out, by their number."""
    heads, loras, tasks = [], [], []
    for adapter in adapters:
        project_lora(adapter, basis).save_pretrained(work / adapter.name)
        tensors = load_file(adapter / "adapter_model.safetensors")
        heads.append(sum(each.nbytes for name, each in tensors.items() if "lora_" not in name))
        loras.append((adapter / "adapter_model.safetensors").stat().st_size - heads[-1])
        tasks.append((work / adapter.name / "adapter_model.safetensors").stat().st_size - heads[-1])
    once = (basis / "basis.safetensors").stat().st_size
    lora, task = float(np.mean(loras)), float(np.mean(tasks))
    count = np.arange(0, 11)
    figure, axes = plt.subplots(figsize=(5, 3.4))
    axes.plot(count, count * lora / 1e6, "-", label=f"LoRAs r=8: {lora / 1e3:.0f} kB each")
    axes.plot(
        count,
        (once + count * task) / 1e6,
        "--",
        label=f"basis: {once / 1e3:.0f} kB, and tasks: {task / 1e3:.1f} kB each",
    )
    meets = once / (lora - task)
    axes.plot([meets], [meets * lora / 1e6], "o", color="black")
    axes.annotate(f"break-even: {meets:.1f} tasks", (meets, meets * lora / 1e6), (12, -14), textcoords="offset points")
    axes.set_xlabel("tasks stored")
    axes.set_ylabel("megabytes")
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize=10, loc="upper left")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", type=Path, help="what `subspace-peft demo --stage sources` wrote")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    draw(arguments.fleet, arguments.out)
