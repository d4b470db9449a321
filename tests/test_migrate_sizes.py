"""Tasks that keep their size on a larger basis: tensors byte for byte, outputs bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from subspace_peft import (
    SubspaceBasis,
    bundle_tasks,
    load_task,
    migrate_bundle,
    migrate_task,
    open_bundle,
    update_basis,
)
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError
from subspace_peft.tuner import SubspaceConfig

from .models import bert, train_lora
from .test_migrate import KINDS, grown, ids, logits, saved  # noqa: F401 - a fixture among them

WEIGHTS = "adapter_model.safetensors"
TABLE = [*KINDS, {"extra_rank": 2}, {"coefficients": "diagonal", "extra_rank": 1, "mean_gain": "trainable"}]


@pytest.mark.parametrize("config", TABLE, ids=ids)
def test_nothing_of_the_task_changes(kind, config, bases, grown, tmp_path):  # noqa: F811
    folder, before = saved(kind, tmp_path / "old", bases[kind].location, **config)
    found = migrate_task(folder, grown[kind], pad=False)
    assert found.converted is None and found.total_drift == 0 and set(found.drift.values()) == {0.0}
    found.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    stored = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert stored["basis_fingerprint"] == grown[kind].fingerprint != bases[kind].fingerprint
    model = PeftModel.from_pretrained(kind(), tmp_path / "new")
    assert torch.equal(logits(model), before)
    # and once more, to the version after that
    third = update_basis(grown[kind], [str(train_lora(kind, tmp_path / "third", 99))], add=1, progress=False)
    third.save_pretrained(tmp_path / "v3")
    migrate_task(tmp_path / "new", third, pad=False).save_pretrained(tmp_path / "newer")
    assert (tmp_path / "newer" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert torch.equal(logits(PeftModel.from_pretrained(kind(), tmp_path / "newer")), before)


def uneven(basis: SubspaceBasis, sizes: dict[str, tuple[int, int]]) -> SubspaceBasis:
    """The leading directions of a basis, another number of them in each module and on each side."""
    found = {}
    for number, (name, module) in enumerate(basis.items()):
        end = name.rpartition(".")[2]
        found[name] = module.truncate(*sizes.get(end, (2 + number, 4)))
    return SubspaceBasis(found, dict(basis.info))


@pytest.mark.parametrize(
    ("sizes", "k", "pattern"),
    [
        ({"query": (3, 3), "value": (3, 3)}, 3, {}),
        ({"query": (3, 3), "value": (2, 5)}, None, {"query": 3, "value": [2, 5]}),
        ({"query": (3, 4), "value": (3, 4)}, None, {"query": [3, 4], "value": [3, 4]}),
        ({"query": (3, 3)}, None, None),
    ],
    ids=["one size", "by the end", "two sides", "each its own"],
)
def test_the_configuration_says_the_sizes_in_few_words(sizes, k, pattern, bases, tmp_path):
    small = uneven(bases[bert], sizes)
    small.save_pretrained(tmp_path / "small")
    folder, before = saved(bert, tmp_path / "old", small.location)
    found = migrate_task(folder, bases[bert], pad=False)
    assert found.config.k == k
    if pattern is not None:
        assert found.config.rank_pattern == pattern
    else:
        assert found.config.rank_pattern["query"] == 3 and len(found.config.rank_pattern) == 3
    found.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "new")), before)


def test_names_that_end_with_one_another_keep_their_sizes():
    from types import SimpleNamespace

    from subspace_peft.convert.moves import keep_sizes

    config = SubspaceConfig(basis="random")
    sizes = {"q": (1, 2), "a.q": (3, 4), "b.a.q": (5, 5), "b.a.v": (2, 2)}
    new = SimpleNamespace(k_out=9, k_in=9)
    keep_sizes(
        config, {n: SimpleNamespace(old=SimpleNamespace(k_out=a, k_in=b), new=new) for n, (a, b) in sizes.items()}
    )
    assert {name: config.sizes.used(name, 9, 9) for name in sizes} == sizes


def test_a_basis_that_does_not_begin_with_the_old_one_is_refused(bases, fleets, tmp_path):
    old = bases[bert]
    folder, _ = saved(bert, tmp_path / "old", old.location, mean_gain="fixed")
    refitted = update_basis(old, [str(train_lora(bert, tmp_path / "new0", 50))], k=7, progress=False)
    with pytest.raises(SubspaceError, match=r"pad=False \(--no-pad\).*'bert.*has another basis"):
        migrate_task(folder, refitted, pad=False)
    with pytest.raises(SubspaceError, match="has another basis"):
        migrate_task(folder, old.truncate(4), pad=False)
    turned = SubspaceBasis({name: replace(module, M=-module.M) for name, module in old.items()}, old.info)
    with pytest.raises(SubspaceError, match="has another mean core"):
        migrate_task(folder, turned, pad=False)
    directions, _ = saved(bert, tmp_path / "directions", old.location, coefficients="directions")
    turned = SubspaceBasis({name: replace(module, G=-module.G) for name, module in old.items()}, old.info)
    with pytest.raises(SubspaceError, match="has another set of direction tensors"):
        migrate_task(directions, turned, pad=False)
    # on the very basis nothing is to be done
    assert migrate_task(folder, old, pad=False).config.rank_pattern == {}


def test_live_models_bundles_and_the_command_line(bases, grown, tmp_path, capsys):  # noqa: F811
    folder, _ = saved(bert, tmp_path / "old", bases[bert].location)
    model = PeftModel.from_pretrained(bert(), folder)
    live = migrate_task(model, grown[bert], pad=False)
    file = load_file(folder / WEIGHTS)
    assert live.tensors.keys() == file.keys() and all(torch.equal(live.tensors[key], file[key]) for key in file)
    bundle_tasks([folder], tmp_path / "bundle", progress=False)
    moved, drifts = migrate_bundle(tmp_path / "bundle", grown[bert], tmp_path / "moved", pad=False, progress=False)
    assert set(drifts["old"].values()) == {0.0}
    assert torch.equal(
        logits(load_task(bert(), moved, "old")), logits(load_task(bert(), open_bundle(tmp_path / "bundle"), "old"))
    )
    assert open_bundle(tmp_path / "bundle").read("old").cores.keys() == moved.read("old").cores.keys()
    for name, core in open_bundle(tmp_path / "bundle").read("old").cores.items():
        assert torch.equal(moved.read("old").cores[name], core)
    place = str(grown[bert].location)
    assert main(["migrate", str(folder), "--basis", place, "--no-pad", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "old" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    capsys.readouterr()
    update = ["update", str(bases[bert].location), str(tmp_path / "x"), "--out", str(tmp_path / "v2"), "--no-pad"]
    assert main(update) == 1
    assert "--no-pad has no effect without --tasks" in capsys.readouterr().err
