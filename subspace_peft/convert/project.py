"""Project a LoRA onto a shared basis, and measure the share of its energy that the basis keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .._io.warn import warn_caller
from ..base_names import REMEDY, difference, is_of, said_of_basis
from ..basis import SubspaceBasis
from ..basis.module_names import has_peft_prefix
from ..basis.module_store import names_of
from ..basis.pipeline_parts import parts_in
from ..errors import BasisMismatchError, SubspaceError
from ..sources import Source, open_source
from ..sources.guesses import warn_of_guesses
from ..sources.lora import is_embedding, is_saved_module, saved_modules
from .projection import Projection, projection_of
from .residual import directions_of


def project_lora(
    lora: Any,
    basis: SubspaceBasis | str | Path,
    *,
    token: str | bool | None = None,
    check_base_model: bool = True,
    base_model_name: str | None = None,
    allow_bin: bool = False,
    base_model: nn.Module | None = None,
    part: str | None = None,
    extra_rank: int | None = None,
    extra_budget: int | None = None,
) -> Projection:
    """Project an existing LoRA onto a basis, in closed form: ``C = (UᵀB)(AVᵀ)`` per module.

    What the basis does not keep goes, where asked for, into directions of the task's own, ``ΔW ≈ U C V + B A``. Core
    and own directions are fitted together (`convert/joint.py`): the core is then ``Uᵀ (ΔW − B A) Vᵀ``, which without
    these directions holds less than the projection. With as many as the LoRA's rank the task is the LoRA, exactly.

    Args:
        lora: Folder, Hub id with ``@revision``, state dict, ``(state_dict, config)`` or live PeftModel.
        basis: The basis, its folder or its Hub id.
        token: As in huggingface_hub.
        check_base_model: Refuse a LoRA whose config names another base model than the basis.
        base_model_name: The base model that the LoRA is of, whatever its config says; held against the basis's.
        allow_bin: Take pickled weights too, read with ``weights_only=True``.
        base_model: The model that the adapter adapts, to convert a DoRA, an adapter of another method and the like to
            a LoRA; it is left as it was.
        part: Of a pipeline's basis the part that the LoRA is of, such as ``text_encoder_2``, where its modules' names
            do not tell.
        extra_rank: Directions of the task's own in every module; None: none, or with `extra_budget` any number.
        extra_budget: How many parameters these may have in all (a direction has out + in): they go to the modules
            where a parameter keeps most energy of what the projection leaves, up to `extra_rank` in each.

    Raises:
        SourceError: The LoRA cannot be read.
        BasisMismatchError: The basis lacks a module or has it in another shape, or the base models differ, by their
            names or by the weights on record.
        SubspaceError: Every ``lora_B`` is zero; the LoRA has trained tensors that a task cannot hold (single token
            embeddings, biases of the base model); `base_model_name` is another model on the Hub than the basis's; or
            `extra_rank` or `extra_budget` is out of range.
    """
    _check_whole("extra_rank", extra_rank, 0, "0 for none; 1 to 4 are usual")
    _check_whole("extra_budget", extra_budget, 1, "the parameters of all own directions together")
    if extra_budget is not None and extra_rank == 0:
        raise SubspaceError(
            f"extra_budget={extra_budget} (--extra-budget {extra_budget}) buys nothing with extra_rank=0 (--extra-rank"
            " 0), which allows no directions in any module: leave one of them out."
        )
    source = open_source(lora, token=token, allow_bin=allow_bin, base_model=base_model)
    _check_extras(source)
    warn_of_guesses([source])
    if not isinstance(basis, SubspaceBasis):
        basis = SubspaceBasis.from_pretrained(basis, token=token)
    if base_model is not None and check_base_model:
        from ..tuner.base_record import hold_against

        hold_against(basis, base_model)
    if base_model_name is not None:
        source.said_base = said_of_basis(basis.base_model, base_model_name)
    elif check_base_model and not is_of(source.base_model, basis.info):
        own, other = str(source.base_model), str(basis.base_model)
        raise BasisMismatchError(
            f"{source.location}: trained on {own!r}, but the basis was built for {other!r}: {difference(own, other)}."
            f" Use a basis of the same base model. {REMEDY} check_base_model=False (--no-base-check) accepts any."
        )
    if part is not None and part not in (parts := parts_in(basis)):
        raise BasisMismatchError(
            f"part={part!r} (--part): the basis has no such part of a pipeline; it has {', '.join(parts) or 'none'}."
        )
    places = {name: key for name in source.keys if (key := basis.find(name, part)) is not None}
    absent = [name for name in source.keys if name not in places]
    if absent:
        raise BasisMismatchError(
            f"{source.location}: {len(absent)} of its modules are not in the basis, such as {names_of(absent, 3)}; it"
            f" has {names_of(basis, 3)}. Build a basis from sources that adapt these modules."
        )
    uses = Counter(places.values())
    twice = sorted(name for name, key in places.items() if uses[key] > 1)
    if twice:
        raise BasisMismatchError(
            f"{source.location}: its modules {names_of(twice, 3)} are one module of the basis ({places[twice[0]]}),"
            " leading parts of their names aside. Build a basis from sources that adapt both."
        )
    source.outer = _outer(source, places)
    cores = {}
    for name, key in places.items():
        update = source.factors(name)
        try:
            cores[key] = basis[key].project((update.B, update.A))
        except BasisMismatchError as error:
            raise BasisMismatchError(f"{source.location}: module {name!r}: {error}") from None
        source.norms.setdefault(name, update.norm())
    projection = projection_of(source, basis, places, cores)
    if not any(source.norm(name) for name in places):
        raise SubspaceError(f"{source.location}: every lora_B is zero, so there is nothing to project.")
    if extra_budget is None and not extra_rank:
        return projection
    fits = directions_of(projection, extra_rank, extra_budget)
    if not fits:
        warn_caller(
            f"project_lora: extra_budget={extra_budget} (--extra-budget {extra_budget}) buys nothing: the basis keeps"
            f" all of {source.location}, up to rounding."
        )
    return projection.with_fits(fits)


def _check_whole(name: str, value: Any, least: int, what: str) -> None:
    """Raise `SubspaceError` unless an argument is None or a whole number that is large enough."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        flag = name.replace("_", "-")
        raise SubspaceError(f"{name}={value!r} (--{flag} {value}): give a whole number, at least {least}: {what}.")


def _outer(source: Source, places: Mapping[str, str]) -> str:
    """Return what stands before the basis's names in all of a source's, "" where it is the adapted model's.

    The state dict of a model that holds the adapted one, such as a LightningModule, has its attribute's name in front.
    PEFT's own prefix marks where the adapted model begins; then what follows is that model's.
    """
    if source.parts or any(has_peft_prefix(key) for sides in source.keys.values() for key in sides.values()):
        return ""
    found = {name.removesuffix(key) if name.endswith(f".{key}") else "" for name, key in places.items()}
    return found.pop() if len(found) == 1 else ""


def _check_extras(source: Source) -> None:
    """Raise `SubspaceError` where a LoRA has trained tensors that a task cannot hold."""
    saved = saved_modules(source.config)
    # the trained tokens themselves before the rest of their layer
    for key in sorted(source.other_keys, key=lambda key: not key.endswith("trainable_tokens_delta")):
        if not (is_saved_module(source.plain(key), source.config) or is_embedding(source.plain(key))):
            raise SubspaceError(
                f"{source.location}: {key} is neither a factor nor of its modules_to_save"
                f" ({', '.join(saved) or 'none'}). Where it was trained with the LoRA, a projected task cannot hold"
                " it, and without it the adapter is another: train without trainable_token_indices, with bias='none'."
                " Where it is the base model's own, as in a whole model's state dict, pass the adapter alone, as"
                " `get_peft_model_state_dict(model)` gives it."
            )
