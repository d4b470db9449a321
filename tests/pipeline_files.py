"""Small diffusion pipelines, and LoRA files of their parts in several dialects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

diffusers = pytest.importorskip("diffusers", reason="tests of diffusers' pipelines; diffusers is not installed")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 77,
    "projection_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def unet(cross: int = 32, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=8,
        norm_num_groups=8,
        **more,
    ).eval()


def text_encoder() -> nn.Module:
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(**TEXT)).eval()


def text_encoder_2() -> nn.Module:
    torch.manual_seed(2)
    return CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).eval()


MODELS = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
CROSS = {
    name: (module.out_features, module.in_features)
    for name, module in unet().named_modules()
    if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_v"))
}
CLIP = {f"text_model.encoder.layers.{i}.self_attn.{q}": (32, 32) for i in range(2) for q in ("q_proj", "v_proj")}
NAMES = {"unet": CROSS, "text_encoder": CLIP, "text_encoder_2": CLIP}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
SD, SDXL = ("unet", "text_encoder"), ("unet", "text_encoder", "text_encoder_2")


def factors(parts: tuple[str, ...], seed: int) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        (part, name): (
            0.3 * torch.randn(4, inner, generator=generator),
            0.3 * torch.randn(out, 4, generator=generator),
        )
        for part in parts
        for name, (out, inner) in NAMES[part].items()
    }


def diffusers_file(parts: tuple[str, ...], seed: int) -> dict[str, torch.Tensor]:
    state = {}
    for (part, name), (A, B) in factors(parts, seed).items():
        state |= {f"{part}.{name}.lora_A.weight": A, f"{part}.{name}.lora_B.weight": B}
    return state


def kohya_file(parts: tuple[str, ...], seed: int) -> dict[str, torch.Tensor]:
    state = {}
    for (part, name), (A, B) in factors(parts, seed).items():
        stem = KOHYA[part] + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(4.0)}
    return state


def old_diffusers_file(parts: tuple[str, ...], seed: int) -> dict[str, torch.Tensor]:
    return {
        key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value
        for key, value in diffusers_file(parts, seed).items()
    }


def wrapped_file(parts: tuple[str, ...], seed: int) -> dict[str, torch.Tensor]:
    """As a training script saves it whose models were wrapped by PEFT, DDP and torch.compile."""
    state = diffusers_file(parts, seed)
    return {key.replace(".", ".module._orig_mod.base_model.model.", 1): value for key, value in state.items()}


FILES = {
    "diffusers": diffusers_file,
    "kohya": kohya_file,
    "diffusers, old": old_diffusers_file,
    "wrapped": wrapped_file,
}


def write(state: dict[str, torch.Tensor], file: Path) -> Path:
    save_file(state, file)
    return file


def run(part: str, model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if part != "unet":
            return model(torch.arange(3, 10)[None]).last_hidden_state
        noise, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
        return model(noise, torch.tensor(3), text).sample


def wanted(part: str, parts: tuple[str, ...], seed: int = 0) -> torch.Tensor:
    """What the plain model computes with the LoRA's updates added to its weights by hand."""
    model = MODELS[part]()
    layers = dict(model.named_modules())
    for (own, name), (A, B) in factors(parts, seed).items():
        if own == part:
            layer = layers.get(name) or layers[name.removeprefix("text_model.")]
            layer.weight.data += B @ A
    return run(part, model)


def tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(number) for number in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def vae() -> nn.Module:
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)


def pipeline(root: Path, parts: tuple[str, ...]) -> Any:
    words, scheduler = tokenizer(root / "words"), diffusers.DDIMScheduler()
    if parts == SD:
        return diffusers.StableDiffusionPipeline(
            vae(), text_encoder(), words, unet(), scheduler, None, None, requires_safety_checker=False
        )
    return diffusers.StableDiffusionXLPipeline(
        vae(), text_encoder(), text_encoder_2(), words, words, unet(), scheduler, force_zeros_for_empty_prompt=False
    )
