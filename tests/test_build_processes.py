"""Building in several processes: the work is divided, the bytes are those of one, and they fail as one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_peft import build_basis, build_clusters
from subspace_peft.builders import module_plan
from subspace_peft.builders.distributed import ProcessGroup, disagreeing, packed, process_group, unpacked
from subspace_peft.builders.distributed_modules import collect, divide

from . import fresh
from .models import bert
from .test_resume import contents

WORKER = Path(__file__).with_name("build_worker.py")
ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def two(scenario: str, out: Path, sources: list[str]) -> list[dict[str, Any]]:
    """What two processes of a group say; {} of one that was killed."""
    running = fresh.start_group(str(WORKER), scenario, str(out), *sources)
    said = [process.communicate()[1] for process in running]
    assert running[0].returncode == 0, said[0][-3000:]
    assert running[1].returncode == (-9 if scenario == "killed" else 0), said[1][-3000:]
    files = [out / f"{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def launched(arguments: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # accelerate's own --cpu starts a single process, or asks for MPI; --multi_gpu starts several as torchrun does,
    # also without GPUs
    command = (
        "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        " --dynamo_backend no"
    )
    command += " --main_process_port 0 -m subspace_peft"
    return subprocess.run(
        [sys.executable, *command.split(), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
        cwd=cwd,
        check=False,
    )


@pytest.fixture
def whole(fleets, tmp_path):
    """The files of a build in one process."""
    build_basis(fleets[bert], k=4, directions=2, progress=False).save_pretrained(tmp_path / "whole")
    return contents(tmp_path / "whole")


# -- the parts
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "count", "loads"),
    [
        ({"a": 3, "b": 3, "c": 3, "d": 3}, 2, [6, 6]),
        ({"a": 1, "b": 1, "c": 4, "d": 2}, 2, [4, 4]),
        ({"a": 5}, 3, [5, 0, 0]),
        ({}, 2, [0, 0]),
    ],
)
def test_the_work_is_dealt_evenly_and_whole(costs, count, loads):
    processes = ProcessGroup()
    processes.count = count
    owners = processes.deal(costs)
    assert owners.keys() == costs.keys()
    assert [sum(costs[name] for name, owner in owners.items() if owner == i) for i in range(count)] == loads


def test_facts_and_tensors_arrive_as_they_were():
    facts, tensors = {"share": 0.1 + 0.2, "none": None}, {"U": torch.randn(3, 2), "scalar": torch.ones(1)}
    found, arrived = unpacked(packed(facts, tensors))
    assert found == facts
    assert arrived.keys() == tensors.keys() and all(torch.equal(arrived[key], tensors[key]) for key in tensors)
    assert unpacked(packed([1], {})) == ([1], {})


def test_one_process_alone_meets_nobody(bases):
    with process_group() as processes, process_group() as inner:
        assert inner is processes
        assert (processes.count, processes.main, processes.name, processes.neighbours, processes.exchange(b"x")) == (
            1,
            True,
            "",
            [0],
            [b"x"],
        )
        module = next(iter(bases[bert].values()))
        mine, owners = divide(processes, {"a": 1.0, "b": 2.0}, {"a"})
        assert (mine, owners) == (["b"], {"a": 0, "b": 0})
        assert collect(processes, owners, {"a": (module, {}), "b": (module, {})})["a"][0] is module
    assert disagreeing([1, 1, 2]) == 2
    assert disagreeing([1, 1]) is None


# -- the same bytes
# ------------------------------------------------------------------------------------------------------


def test_the_command_line_gives_the_bytes_of_one_process_and_says_them_once(fleets, tmp_path, whole):
    out = tmp_path / "out"
    asked = ["build", *fleets[bert], "--out", str(out), "-k", "4", "--directions", "2", "--json", "--quiet"]
    running = fresh.start_group("-m", "subspace_peft", *asked)
    said = [each.communicate() for each in running]
    assert [each.returncode for each in running] == [0, 0], said
    assert contents(out) == whole
    assert json.loads(said[0][0])["modules"] == 4
    assert said[1][0] == ""
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_accelerate_launch_gives_the_bytes_of_one_process_and_says_them_once(fleets, tmp_path, whole):
    out = tmp_path / "out"
    done = launched(["build", *fleets[bert], "--out", str(out), "-k", "4", "--directions", "2", "--json", "--quiet"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == whole
    # two of them would be no JSON
    assert json.loads(done.stdout)["modules"] == 4
    assert not (tmp_path / "out.partial").exists()


def test_a_script_divides_modules_and_files_and_goes_on(fleets, tmp_path, whole):
    one, other = two("plain", tmp_path, fleets[bert])
    for rank in range(2):
        assert contents(tmp_path / f"basis{rank}") == whole
    assert (len(one["built"]), len(other["built"])) == (2, 2)
    assert not set(one["built"]) & set(other["built"])
    assert sorted(one["scanned"] + other["scanned"]) == [f"lora{i}" for i in range(5)]
    assert one["scanned"] and other["scanned"]
    assert one["sum"] == other["sum"] == 2
    assert one["accelerate's"] == other["accelerate's"] == 2


@pytest.mark.slow
def test_streamed_modules_too(fleets, tmp_path, monkeypatch):
    one, other = two("streamed", tmp_path, fleets[bert])
    monkeypatch.setattr(module_plan, "EXACT_COLUMNS", 8)
    alone = build_basis(fleets[bert], k=4, directions=2, progress=False)
    assert {each["numerics"] for each in alone.info["measured"]["certificates"].values()} == {"streamed"}
    assert one["fingerprint"] == other["fingerprint"] == alone.fingerprint


def test_a_budget_is_measured_by_both_and_spread_alike(fleets, tmp_path):
    one, other = two("budget", tmp_path, fleets[bert])
    alone = build_basis(fleets[bert], budget=60, progress=False)
    assert len({tuple(sorted(shape.items())) for shape in alone.shapes().values()}) > 1
    assert one["fingerprint"] == other["fingerprint"] == alone.fingerprint
    assert [len(list((tmp_path / f"work{rank}").glob("*/*.table"))) for rank in range(2)] == [2, 2]


def machines(fleets, out: Path) -> list[str]:
    for rank in range(2):
        for source in fleets[bert]:
            shutil.copytree(source, out / f"machine{rank}" / Path(source).name)
    return [Path(source).name for source in fleets[bert]]


def test_machines_without_a_common_disk(fleets, tmp_path):
    one, other = two("two machines", tmp_path, machines(fleets, tmp_path))
    # each machine holds all its files against their hashes
    assert one["scanned"] == other["scanned"] == [f"lora{i}" for i in range(5)]
    assert len(one["built"]) == len(other["built"]) == 2
    alone = build_basis(fleets[bert], k=4, directions=2, progress=False)
    assert one["fingerprint"] == other["fingerprint"] == alone.fingerprint


@pytest.mark.slow
def test_finished_modules_on_own_disks_are_gone_on_from(fleets, tmp_path):
    one, other = two("own disks", tmp_path, fleets[bert])
    for each, rank in ((one, 0), (other, 1)):
        assert each["again"] == one["fingerprint"]
        assert each["built again"] == []
        assert len(list((tmp_path / f"work{rank}").glob("*/*.safetensors"))) == 2


@pytest.mark.slow
def test_a_basis_is_built_again_in_two_processes(bases, fleets, tmp_path):
    one, other = two("rebuilt", tmp_path, [str(bases[bert].location)])
    assert one["fingerprint"] == other["fingerprint"] == bases[bert].fingerprint


@pytest.mark.slow
def test_clusters_in_two_processes(fleets, tmp_path):
    one, other = two("clusters", tmp_path, fleets[bert])
    alone = build_clusters(fleets[bert], 2, k=4, progress=False)
    assert one["fingerprints"] == other["fingerprints"] == [basis.fingerprint for basis in alone.bases]
    assert one["facts"] == other["facts"] == alone.to_dict()
    assert len(one["built"]) == len(other["built"]) == 4


# -- failing as one
# --------------------------------------------------------------------------------------------------------


def test_another_file_under_the_same_name_on_another_machine_is_refused(fleets, tmp_path):
    names = machines(fleets, tmp_path)
    odd = tmp_path / "machine1" / names[2] / "adapter_model.safetensors"
    shutil.copy(tmp_path / "machine1" / names[3] / "adapter_model.safetensors", odd)
    for each in two("other files", tmp_path, names):
        assert each["error"] == "SourceError"
        assert (
            names[2] in each["text"] and "for process 0 of 2" in each["text"] and "for process 1 of 2" in each["text"]
        )


@pytest.mark.slow
def test_lists_that_differ_are_refused(fleets, tmp_path):
    for each in two("other list", tmp_path, fleets[bert]):
        assert each["error"] == "SourceError"
        assert "process 1 of 2" in each["text"] and "4 sources" in each["text"] and "same list" in each["text"]


@pytest.mark.parametrize(
    ("scenario", "error", "text"),
    [
        ("fails", "OSError", "No space left"),
        ("fails early", "OSError", "No space left"),
        ("bad arguments", "SubspaceError", "k=-1"),
    ],
)
def test_an_error_in_one_is_raised_in_both_and_names_itself(scenario, error, text, fleets, tmp_path):
    one, other = two(scenario, tmp_path, fleets[bert])
    assert other["error"] == error and text in other["text"]
    assert one["error"] == "ProcessError"
    assert "process 1 of 2 on" in one["text"] and f"failed: {error}" in one["text"] and text in one["text"]
    assert max(one["seconds"], other["seconds"]) < 60
    if scenario != "bad arguments":
        # a share of two modules: with a common folder the second is not begun, which takes a second each
        assert len(one["built"]) == 2 if scenario == "fails" else len(one["built"]) < 2
    assert not list(tmp_path.glob("work/*/failed-*"))


def test_a_process_that_is_killed_does_not_hang_the_other(fleets, tmp_path, whole):
    one, other = two("killed", tmp_path, fleets[bert])
    assert other == {}
    assert one["error"] == "ProcessError" and "has gone" in one["text"]
    assert one["seconds"] < 60
    # what the first had finished is there for the next call, in one process or several
    work = tmp_path / "work"
    assert len(list(work.glob("*/*.safetensors"))) == 2
    build_basis(fleets[bert], k=4, directions=2, work_folder=work, progress=False).save_pretrained(
        tmp_path / "resumed"
    )
    assert contents(tmp_path / "resumed") == whole


@pytest.mark.slow
def test_on_the_command_line_the_one_that_fails_speaks(fleets, tmp_path):
    out = tmp_path / "out"
    (out / "basis.safetensors").mkdir(parents=True)
    done = launched(["build", *fleets[bert], "--out", str(out), "--quiet", "--force"])
    assert done.returncode != 0
    # only the first writes
    assert "subspace-peft build, process 0 of 2 on " in done.stderr
    assert "Is a directory" in done.stderr
    assert "subspace-peft build, process 1" not in done.stderr
    assert done.stdout == ""
    assert [file.name for file in out.iterdir()] == ["basis.safetensors"]
