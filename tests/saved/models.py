"""The base models that the saved files belong to, with weights that no release of torch changes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel


def fill(named: Iterable[tuple[str, torch.Tensor]], seed: int, std: float) -> None:
    """Overwrite tensors in place by numpy's normal numbers, which depend on the tensor's name and the seed alone."""
    with torch.no_grad():
        for name, value in named:
            drawn = np.random.RandomState([seed, zlib.crc32(name.encode())]).standard_normal(tuple(value.shape))
            value.copy_(torch.from_numpy(std * drawn))


def weighted(model: nn.Module) -> nn.Module:
    """Give a base model its weights; those of norms are about 1."""
    fill(model.named_parameters(), seed=0, std=0.2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1 and name.endswith("weight"):
                value += 1
    return model.eval()


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=100,
        max_position_embeddings=16,
    )  # fmt: skip
    config._name_or_path = "org/tiny-bert"
    return weighted(BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=16)
    config._name_or_path = "org/tiny-gpt2"
    return weighted(GPT2LMHeadModel(config))


class Small(nn.Module):
    """Tokens → a picture of 6 × 6 → two convolutions → a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 36)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.lin = nn.Linear(6 * 9, 5)
        # where PEFT looks for the name of a model without a config
        self.__dict__["name_or_path"] = "org/tiny-small"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids).view(len(input_ids), 4, 6, 6)
        return self.lin(torch.relu(self.point(torch.relu(self.conv(x)))).flatten(1))


def small() -> nn.Module:
    return weighted(Small())


# an adapter that was injected does not say what its base model is
MAKERS = {None: bert, "org/tiny-bert": bert, "org/tiny-gpt2": gpt2, "org/tiny-small": small}
TARGETS = {bert: ["query", "value"], gpt2: ["c_attn"], small: ["embed", "conv", "point", "lin"]}


def outputs(model: nn.Module) -> torch.Tensor:
    """What a model says of three fixed rows."""
    ids = torch.from_numpy(np.random.RandomState(1).randint(0, 100, (3, 7)).astype(np.int64))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    picture = any(isinstance(module, Small) for module in inner.modules())
    with torch.no_grad():
        said = model.eval()(ids[:, :4] if picture else ids)
    return getattr(said, "logits", said).float().contiguous()
