"""Every variant of PEFT's LoRA through every verb: the same function on every token, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_configs
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspace_peft import build_basis, compress_fleet, load_task, project_lora, update_basis
from subspace_peft.cli import main
from subspace_peft.errors import SubspaceError
from subspace_peft.sources import open_source

X = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
ATOL = 1e-5


def llama(**config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, **config)).eval()


def trained(folder: Path, seed: int, config: peft.PeftConfig, make=llama) -> Path:
    """An adapter with random numbers wherever it is trained, saved by PEFT."""
    model = get_peft_model(make(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ("lora_" in name or "miss_block" in name) and "magnitude" not in name and "ranknum" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def lora(**more: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more}
    )


def sub(name: str, **values: object) -> object:
    if not hasattr(lora_configs, name):
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    return getattr(lora_configs, name)(**values)


# name → configuration; those whose update is s·B·A
PLAIN = {
    "plain": lambda: lora(),
    "rslora": lambda: lora(use_rslora=True),
    "patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 9}),
    "dropout": lambda: lora(lora_dropout=0.3, init_lora_weights="gaussian"),
    "some layers": lambda: lora(layers_to_transform=[1], exclude_modules=["k_proj"]),
    "orthogonal": lambda: lora(r=4, init_lora_weights="orthogonal"),
    "eva": lambda: lora(init_lora_weights="eva", eva_config=sub("EvaConfig")),
    "mica": lambda: lora(init_lora_weights="mica"),
    "velora": lambda: lora(velora_config=sub("VeloraConfig", num_groups=8)),
    "monteclora": lambda: lora(monteclora_config=sub("MontecloraConfig", num_samples=2, buffer_size=2)),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "saved head": lambda: lora(modules_to_save=["lm_head"]),
}

# those that are converted on their base model, and by what name
CONVERTED = {
    "dora": ("DORA", lambda: lora(use_dora=True)),
    "dora on embeddings": ("DORA", lambda: lora(use_dora=True, target_modules=["embed_tokens", "q_proj"])),
    "kasa": ("KASA", lambda: lora(kasa_config=sub("KasaConfig"))),
    "bdlora": (
        "BDLORA",
        lambda: lora(
            r=4,
            use_bdlora=sub("BdLoraConfig", target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2),
        ),
    ),
    "pissa": ("PISSA", lambda: lora(init_lora_weights="pissa")),
    "olora": ("OLORA", lambda: lora(init_lora_weights="olora")),
    "adalora": (
        "ADALORA",
        lambda: AdaLoraConfig(
            init_r=3,
            target_r=2,
            total_step=10,
            tinit=1,
            tfinal=1,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        ),
    ),
    "miss": ("MISS", lambda: peft.MissConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
    "miss bat": (
        "MISS",
        lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ),
}

# those that no basis can hold, and the word of the reason
REFUSED = {
    "alora": ("alora_invocation_tokens: aLoRA", lambda: lora(alora_invocation_tokens=[5, 6])),
    "replication": ("layer_replication", lambda: lora(layer_replication=[(0, 2), (1, 2)])),
    "bias of lora_B": ("lora_bias", lambda: lora(lora_bias=True)),
    "experts": ("target_parameters", lambda: lora(target_parameters=["q_proj.weight"], target_modules=[])),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X).logits


VERBS = ("build", "project", "compress", "update")

Adapters = Callable[[str, int, Callable[[], object]], Path]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Adapters:
    """Adapters by a name and a number, each trained once for all verbs, which only read them."""
    made: dict[tuple[str, int], Path] = {}

    def adapter(name: str, number: int, config: Callable[[], object]) -> Path:
        if (name, number) not in made:
            made[name, number] = trained(tmp_path_factory.mktemp("adapters") / f"lora{number}", number, config())
        return made[name, number]

    return adapter


def through(
    verb: str,
    pair: Sequence[Path],
    adapters: Adapters,
    tmp_path: Path,
    base: nn.Module | None = None,
    *,
    known: bool = True,
) -> torch.Tensor:
    """The logits of the model with the first adapter, as what the verb made has it.

    Args:
        verb: of `VERBS`.
        pair: the adapter's folder, and one like it.
        adapters: the fixture.
        tmp_path: an empty folder.
        base: the base model that the verb is given.
        known: whether the basis that the adapter is projected on is built from it, among others.
    """
    folder, other = pair
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"] or ["q_proj"]
    more = {"base_model": base}
    basis = tmp_path / "basis"
    if verb == "build":
        build_basis([folder, other], k=32, progress=False, **more).save_pretrained(basis)
    else:
        plain = [adapters(f"plain {targets}", 100 + n, lambda: lora(target_modules=targets)) for n in range(2)]
        if verb == "update":
            old = build_basis(plain, k=6, progress=False)
            update_basis(old, [folder, other], add=26, progress=False, **more).save_pretrained(basis)
        else:
            plain += [folder, other] if known else []
            build_basis(plain, k=32, partial=True, progress=False, **more).save_pretrained(basis)
    if verb == "compress":
        compress_fleet([folder, other], basis, tmp_path / "bundle", progress=False, **more)
        return logits(load_task(llama(), tmp_path / "bundle", folder.name))
    project_lora(folder, basis, **more).save_pretrained(tmp_path / "task")
    return logits(PeftModel.from_pretrained(llama(), tmp_path / "task"))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("variant", PLAIN)
def test_a_variant_that_is_sba_keeps_its_function(variant, verb, adapters, tmp_path):
    pair = [adapters(variant, n, PLAIN[variant]) for n in range(2)]
    got, wanted = through(verb, pair, adapters, tmp_path), logits(PeftModel.from_pretrained(llama(), pair[0]))
    assert (wanted - logits(llama())).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("variant", CONVERTED)
def test_another_variant_is_refused_and_on_its_base_model_converted(variant, verb, adapters, tmp_path):
    kind, config = CONVERTED[variant]
    pair = [adapters(variant, n, config) for n in range(2)]
    with pytest.raises(SubspaceError, match=r"[Pp]ass its base model, base_model= \(--base-model\)"):
        through(verb, pair, adapters, tmp_path / "refused", known=False)
    base = llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    got, wanted = (
        through(verb, pair, adapters, tmp_path / "taken", base),
        logits(PeftModel.from_pretrained(llama(), pair[0])),
    )
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    source = open_source(pair[0], base_model=base)
    assert source.converted == kind and source.lost < 1e-4
    # these two are of full rank: what is cut off is stated
    whole = kind != "DORA" and variant != "miss bat"
    assert (source.lost < 1e-10) == whole
    tolerance = ATOL if whole else 0.1 * (wanted - logits(base)).abs().max()
    torch.testing.assert_close(got, wanted, atol=float(tolerance), rtol=0)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("variant", REFUSED)
def test_what_no_basis_holds_is_refused_by_its_name(variant, verb, adapters, tmp_path):
    reason, config = REFUSED[variant]
    pair = [adapters(variant, n, config) for n in range(2)]
    for number, base in enumerate((None, llama())):
        with pytest.raises(SubspaceError, match=reason):
            through(verb, pair, adapters, tmp_path / str(number), base, known=False)


def test_the_command_line_converts_too(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    folders = [trained(tmp_path / f"bd{n}", n, CONVERTED["kasa"][1]()) for n in range(2)]
    base, basis = ["--base-model", str(tmp_path / "base")], str(tmp_path / "basis")
    names = [str(folder) for folder in folders]
    assert main(["build", *names, "--out", basis, "-k", "16", "--quiet"]) == 1
    assert "--base-model" in capsys.readouterr().err
    assert main(["build", *names, "--out", basis, "-k", "16", "--quiet", *base]) == 0
    capsys.readouterr()
    assert main(["project", names[0], "--basis", basis, "--out", str(tmp_path / "task"), *base]) == 0
    assert "converted from KASA, which lost" in capsys.readouterr().out
    assert main(["project", names[0], "--basis", basis]) == 1
    assert "faithful" not in capsys.readouterr().out
    assert main(["compress", *names, "--basis", basis, "--out", str(tmp_path / "bundle"), "--quiet", *base]) == 0
    assert "converted from KASA" in capsys.readouterr().out
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(llama(), tmp_path / "task")),
        logits(PeftModel.from_pretrained(llama(), folders[0])),
        atol=ATOL,
        rtol=0,
    )
