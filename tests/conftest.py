"""Small models and small fleets, made in code; every test has its own cache folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small to share among cores

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from subspace_peft import SubspaceBasis, build_basis
from subspace_peft.tuner import SubspaceLayer

# transformers 5.24 came out before the PEFT that it asks for; it refuses stock LoRA just the same
needs_transformers_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(transformers.integrations.peft.MIN_PEFT_VERSION),
    reason=f"add_adapter of transformers {transformers.__version__} refuses PEFT {peft.__version__}",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SUBSPACE_PEFT_CACHE", str(folder))
    return folder


def bert(seed: int = 0, layers: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48, vocab_size=100
    )
    return BertForSequenceClassification(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=32)).eval()


TARGETS = {bert: ["query", "value"], gpt2: ["c_attn"]}


def train_lora(make: Callable[..., nn.Module], folder: Path, seed: int, **config: object) -> Path:
    """A stock LoRA with random weights on both sides, saved by PEFT."""
    model = make()
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[make], "fan_in_fan_out": make is gpt2, **config}
    model = get_peft_model(model, LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=[bert, gpt2], ids=["linear", "conv1d"])
def kind(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return request.param


@pytest.fixture(scope="session")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> dict[object, list[str]]:
    made = {}
    for make in (bert, gpt2):
        root = tmp_path_factory.mktemp(make.__name__)
        made[make] = [str(train_lora(make, root / f"lora{i}", seed=10 + i)) for i in range(5)]
    return made


@pytest.fixture(scope="session")
def bases(fleets: dict[object, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[object, SubspaceBasis]:
    made = {}
    for make, folders in fleets.items():
        basis = build_basis(folders, k=6, directions=3, progress=False)
        basis.save_pretrained(tmp_path_factory.mktemp(f"{make.__name__}-basis"))
        made[make] = basis
    return made


@pytest.fixture
def basis_folder(bases: dict[object, SubspaceBasis], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases[bert].location, tmp_path / "basis"))


def inputs() -> torch.Tensor:
    return torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module, seed: int = 3, std: float = 0.3) -> nn.Module:
    """Random coefficients, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "subspace_coef" in name:
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def basis_storage(model: nn.Module) -> int:
    """Bytes of distinct basis storage in `model`, whatever the number of adapters that use it."""
    seen: dict[int, int] = {}
    for layer in model.modules():
        if isinstance(layer, SubspaceLayer):
            for container in (layer.subspace_U, layer.subspace_V, layer.subspace_M, layer.subspace_G):
                for name in container:
                    storage = container[name].untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
