"""The top layers of a pretrained encoder as a small classifier that takes the frozen lower layers' outputs."""

from __future__ import annotations

import timeit
from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

ADAPTED = ("query", "value")  # the layers of a block that rows adapt
HEADS = 12  # of MiniLM, 6 × 384
VIT_HEADS = 6


class Block(nn.Module):
    """One transformer layer of width d.

    It is normalised behind its two halves as BERT is, or before them (`before`) as a ViT is.
    """

    def __init__(self, d: int, inner: int, heads: int, eps: float, before: bool) -> None:
        super().__init__()
        self.heads, self.before = heads, before
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, inner), nn.Linear(inner, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)

    def attention(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        n, length, d = x.shape
        # attention itself in float32: PyTorch's backward pass of it in bfloat16 takes ten times as long
        q, k, v = (
            f(x).float().view(n, length, self.heads, d // self.heads).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).reshape(n, length, d)).float()

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.before:
            x = x + self.attention(self.norm1(x), bias)
            return x + self.wide(self.norm2(x))
        x = self.norm1(x + self.attention(x, bias))
        return self.norm2(x + self.wide(x))


@cache
def half_is_faster() -> bool:
    """Tell whether this processor multiplies faster in bfloat16 than in float32, tried once in tens of milliseconds.

    With instructions for bfloat16 it is several times as fast, without them eight times as slow.
    """

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(320, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        return min(timeit.repeat(lambda: F.linear(x, weight), number=1, repeat=5))

    return seconds(torch.bfloat16) < seconds(torch.float32)


class HalfLinear(nn.Linear):
    """A frozen layer whose product is computed, and left, in bfloat16; see `half_is_faster`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class HalfBlock(Block):
    """A `Block` whose frozen layers, those that no row adapts, compute in bfloat16.

    Norms, residuals, query and value do not.
    """

    FROZEN = ("key", "out", "up", "down")

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        return super().wide(x).float()

    def freeze(self) -> None:
        """Turn the frozen layers into bfloat16."""
        for name in self.FROZEN:
            layer = getattr(self, name)
            layer.__class__ = HalfLinear
            layer.to(torch.bfloat16).requires_grad_(False)


class Top(nn.Module):
    """Blocks, the mean over real tokens, and a linear `classifier`.

    Args:
        blocks: state dicts of the layers, lowest first, in `Block`'s names.
        outputs: classes, or 1 for a number.
        heads, eps, before: as in `Block`.
        final: weight and bias of the norm behind the last layer, where there is one.
        seed: of the head's start.
        half: whether layers that no row adapts compute in bfloat16.
    """

    def __init__(
        self,
        blocks: list[Mapping[str, torch.Tensor]],
        outputs: int,
        *,
        heads: int,
        eps: float,
        before: bool,
        final: tuple[torch.Tensor, torch.Tensor] | None,
        seed: int,
        half: bool = False,
    ) -> None:
        super().__init__()
        inner, d = blocks[0]["up.weight"].shape
        self.layer = nn.ModuleList((HalfBlock if half else Block)(d, inner, heads, eps, before) for _ in blocks)
        for block, state in zip(self.layer, blocks, strict=True):
            block.load_state_dict(state)
            if half:
                block.freeze()
        self.norm: nn.Module = nn.Identity() if final is None else nn.LayerNorm(d, eps)
        if final is not None:
            self.norm.load_state_dict({"weight": final[0], "bias": final[1]})
        self.classifier = make_head(d, outputs, seed)

    def features(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the features that the head sees, (n, d)."""
        real = torch.arange(hidden.shape[1]) < lengths[:, None]
        # without padding there is a faster attention
        bias = None if bool(real.all()) else real[:, None, None, :]
        for block in self.layer:
            hidden = block(hidden, bias)
        weight = real.to(hidden.dtype).unsqueeze(-1)
        return (self.norm(hidden) * weight).sum(1) / weight.sum(1)

    def forward(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return outputs (n, outputs) for the lower layers' `hidden` (n, length, d).

        Of it the first `lengths` (n,) positions are real.
        """
        return self.classifier(self.features(hidden, lengths))


class Head(nn.Module):
    """The `classifier` alone, on features (n, 1, d) that were computed before: `Top` with nothing below trained."""

    def __init__(self, d: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.classifier = make_head(d, outputs, seed)

    def forward(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.classifier(hidden[:, 0])


def make_head(d: int, outputs: int, seed: int) -> nn.Linear:
    head = nn.Linear(d, outputs)
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head


BERT_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}
VIT_NAMES = {
    "attention.q_proj": "query",
    "attention.k_proj": "key",
    "attention.v_proj": "value",
    "attention.o_proj": "out",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}


def block_state(layer: nn.Module, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return a transformers layer's tensors in `Block`'s names.

    Raises:
        KeyError: a tensor has no counterpart; names it.
    """
    state = {}
    for key, value in layer.state_dict().items():
        module, _, kind = key.rpartition(".")
        state[f"{names[module]}.{kind}"] = value.detach().clone()
    return state
