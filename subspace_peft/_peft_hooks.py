"""Every change that this package makes to PEFT, in one place.

PEFT has no plugin mechanism: a method is made known by adding it to PEFT's own tables, and a few of its functions have
to be told of it. Each hook below says what it changes and with which versions of PEFT it was seen to work (0.21.0 to
0.21.2, the lowest and the highest that are tested) and what happens where PEFT lacks the place. `register` does all of
them as this module is imported, which the package does as soon as PEFT is; no other module imports this one.

The member of PEFT's enum, `PeftType.SUBSPACE`, is made in `tuner/peft_type.py`, since the rest builds on it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import peft
import peft.helpers
import peft.peft_model
from peft import PeftModel
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import register_peft_method

from ._io.warn import warn_caller
from .basis.newer import written_by
from .hub_requests import ask
from .tasks.arguments import keywords_of
from .tasks.hotswap import SAME
from .tasks.pipeline_task import check_one_task
from .tasks.push import push_task
from .tuner import peft_mixed
from .tuner.card import base_facts, noted, write_section
from .tuner.config import SubspaceConfig
from .tuner.config_file import naming_newer_version
from .tuner.layer import SubspaceLayer
from .tuner.loaded_from import LoadedFrom
from .tuner.model import SubspaceModel
from .tuner.peft_type import NAME, PREFIX, SUBSPACE
from .tuner.renaming import by_head_names

STOCK_PUSH = ("use_temp_dir", "max_shard_size", "commit_description", "use_auth_token", "organization", "repo_url")
MIXED_LISTS = ("COMPATIBLE_TUNER_TYPES", "PREFIXES", "Configs", "Layers")


def register() -> None:
    """Register the method with PEFT, and apply all hooks. Idempotent.

    Seen with PEFT 0.21.0 to 0.21.2.

    Raises:
        RuntimeError: PEFT, or another plugin, has a method of this name or prefix already.
    """
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(SUBSPACE)
    if known is SubspaceModel:
        return
    if known is not None or PREFIX in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise RuntimeError(
            f"PEFT already has a method named {NAME} or with prefix {PREFIX!r} ({known}). Another plugin, or a newer"
            " PEFT, took the name: upgrade subspace-peft."
        )
    mixes = join_mixed_models()
    register_peft_method(
        name=NAME.lower(),
        config_cls=SubspaceConfig,
        model_cls=SubspaceModel,
        prefix=PREFIX,
        is_mixed_compatible=mixes,
    )
    allow_hotswap()
    allow_rescaling()
    push_as_tasks()
    write_own_cards()
    tell_folders()
    name_outages()
    find_heads()
    read_files_as_ours()
    pass_names_when_disabled()


def allow_hotswap() -> None:
    """Let PEFT's `hotswap_adapter` take this method, comparing the fields of `tasks.hotswap.SAME`.

    Seen with PEFT 0.21.0 to 0.21.2. Where its table of methods is not there, a warning says so, and `hotswap_adapter`
    refuses the method; `subspace_peft.hotswap` works all the same.
    """
    try:
        from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
    except ImportError:
        _lacks("peft.utils.hotswap.CONFIG_KEYS_TO_CHECK", "`hotswap_adapter` refuses it; use `subspace_peft.hotswap`")
        return
    CONFIG_KEYS_TO_CHECK[SUBSPACE] = list(SAME)


def allow_rescaling() -> None:
    """Let PEFT's `rescale_adapter_scale` take layers of this method, which have the `scaling` that it changes.

    It asks each module by `isinstance` for LoRA's class; a tuple of classes answers for both. Seen with PEFT 0.21.0 to
    0.21.2. Where that name is not there, a warning says so, and `rescale_adapter_scale` finds no layers.
    """
    known = vars(peft.helpers).get("LoraLayer")
    if not isinstance(known, type):
        _lacks("peft.helpers.LoraLayer", "`rescale_adapter_scale` does not find it; use `set_scale` of its layers")
        return
    peft.helpers.LoraLayer = (known, SubspaceLayer)


def push_as_tasks() -> None:
    """Let `PeftModel.push_to_hub` do as `push_task` for models with a subspace task; others go the way they went.

    Seen with PEFT 0.21.0 to 0.21.2. Idempotent. Where the method is not there, a warning says so.
    """
    original: Callable[..., Any] | None = getattr(PeftModel, "push_to_hub", None)
    if original is None:
        _lacks("PeftModel.push_to_hub", "push saved tasks by `subspace-peft push`")
        return
    if getattr(original, "subspace", False):
        return

    @functools.wraps(original)
    def push_to_hub(self: PeftModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(config, SubspaceConfig) for config in self.peft_config.values()):
            return original(self, repo_id, *args, **kwargs)
        known = set(keywords_of(push_task, PeftModel.save_pretrained))
        # what transformers' method takes beside, and huggingface_hub's
        unused = [key for key in kwargs if key in keywords_of(original) or key in STOCK_PUSH if key not in known]
        for key in unused:
            if kwargs.pop(key) is not None:
                warn_caller(f"push_to_hub: {key}= has no effect on subspace tasks.")
        return push_task(self, repo_id, *args, **kwargs)

    push_to_hub.subspace = True  # type: ignore[attr-defined]
    PeftModel.push_to_hub = push_to_hub  # type: ignore[method-assign]


def write_own_cards() -> None:
    """Let `PeftModel.create_or_update_model_card` leave a subspace task's README to the task's own card.

    PEFT's page has gaps to fill in. It is written before anything is saved, which is the moment to note how to make
    the base model. Other models go the way they went. Seen with PEFT 0.21.0 to 0.21.2. Idempotent. Where the method is
    not there, a warning says so, and cards do not say how the base model is made.
    """
    original: Callable[..., Any] | None = getattr(PeftModel, "create_or_update_model_card", None)
    if original is None:
        _lacks("PeftModel.create_or_update_model_card", "cards do not say how the base model is made")
        return
    if getattr(original, "subspace", False):
        return

    @functools.wraps(original)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> Any:
        for config in self.peft_config.values():
            if isinstance(config, SubspaceConfig):
                config.card = noted(config.card, base=base_facts(self.get_base_model(), config))
        # the adapter that PEFT saves in that folder, the others in folders of it
        default = self.peft_config.get("default")
        if not isinstance(default, SubspaceConfig):
            return original(self, output_dir)
        if (Path(output_dir) / "README.md").is_file():
            # the Trainer has just written one of its own, and asks for its contents
            write_section(Path(output_dir), default.to_dict())
        return None

    create_or_update_model_card.subspace = True  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]


def tell_folders() -> None:
    """Let `PeftConfig.from_pretrained`, as transformers' `load_adapter` calls it, note the folder that it reads from.

    A task's basis is recorded relative to that folder. Other methods' configurations stay as they were. Seen with PEFT
    0.21.0 to 0.21.2. Idempotent. Where the method is not there, a warning says so, and such loaders find the basis by
    its fingerprint alone.
    """
    stored = inspect.getattr_static(PeftConfig, "from_pretrained", None)
    if not isinstance(stored, classmethod):
        _lacks("PeftConfig.from_pretrained", "transformers' load_adapter finds a basis by its fingerprint alone")
        return
    original: Callable[..., Any] = stored.__func__
    if getattr(original, "subspace", False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, place: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        file = Path(place, subfolder or "", "adapter_config.json")
        with naming_newer_version(written_by(file) if file.is_file() else None):
            config = original(cls, place, subfolder=subfolder, **kwargs)
        if isinstance(config, SubspaceConfig) and config.loaded_from is None:
            folder = Path(place, subfolder or "")
            if folder.is_dir():
                config.loaded_from = LoadedFrom(folder, kwargs.get("token"))
        return config

    from_pretrained.subspace = True  # type: ignore[attr-defined]
    PeftConfig.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]


def read_files_as_ours() -> None:
    """Let `PeftConfig.from_json_file`, whatever class it is called on, read a subspace task's file as our own class.

    What a newer version of this package wrote is then said of this package, not of PEFT. Seen with PEFT 0.21.0 to
    0.21.2. Idempotent. Where the method is not there, a warning says so.
    """
    stored = inspect.getattr_static(PeftConfig, "from_json_file", None)
    if not isinstance(stored, classmethod):
        _lacks("PeftConfig.from_json_file", "files of newer versions are spoken of as PEFT's")
        return
    original: Callable[..., Any] = stored.__func__
    if getattr(original, "subspace", False):
        return

    @functools.wraps(original)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> Any:
        found = original(cls, path_json_file, **kwargs)
        ours = isinstance(found, dict) and found.get("peft_type") == NAME and not issubclass(cls, SubspaceConfig)
        return SubspaceConfig.from_json_file(path_json_file, **kwargs) if ours else found

    from_json_file.subspace = True  # type: ignore[attr-defined]
    PeftConfig.from_json_file = classmethod(from_json_file)  # type: ignore[method-assign,assignment]


def pass_names_when_disabled() -> None:
    """Let forward passes of this method's models know of `adapter_names` while the adapters are disabled, too.

    PEFT leaves them out then, whichever thread has disabled the adapters, and another thread's rows would have the
    base model's results. The layers refuse those, and give the base model's to the thread that asked for it. Seen with
    PEFT 0.21.0 to 0.21.2. Idempotent. Where the method is not there, a warning says so.
    """
    original: Callable[..., Any] | None = getattr(PeftModel, "_enable_peft_forward_hooks", None)
    if original is None:
        _lacks("PeftModel._enable_peft_forward_hooks", "do not disable adapters in one thread while others compute")
        return
    if getattr(original, "subspace", False):
        return

    @functools.wraps(original)
    def hooks(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.base_model, SubspaceModel):
            return self.base_model._enable_peft_forward_hooks(*args, **kwargs)
        return original(self, *args, **kwargs)

    hooks.subspace = True  # type: ignore[attr-defined]
    PeftModel._enable_peft_forward_hooks = hooks  # type: ignore[method-assign]


def name_outages() -> None:
    """Let `PeftConfig._get_peft_type`, PEFT's first question about an adapter, wait for a Hub that does not answer.

    PEFT takes every error for "can't find adapter_config.json", so that an outage would look like an adapter that is
    not there. So would a pipeline's task, whose parts have a folder each, and which is refused with their names. The
    adapter's method is not known yet; what else is wrong is said in PEFT's own words. Seen with PEFT 0.21.0 to 0.21.2.
    Idempotent. Where the method is not there, a warning says so.
    """
    stored = inspect.getattr_static(PeftConfig, "_get_peft_type", None)
    if not isinstance(stored, classmethod):
        _lacks("PeftConfig._get_peft_type", "`PeftModel.from_pretrained` takes a Hub's outage for a missing adapter")
        return
    original: Callable[..., Any] = stored.__func__
    if getattr(original, "subspace", False):
        return

    @functools.wraps(original)
    def _get_peft_type(cls: type, model_id: Any, **kwargs: Any) -> Any:
        if not kwargs.get("subfolder"):
            check_one_task(model_id)
        return ask(str(model_id), lambda: original(cls, model_id, **kwargs))

    _get_peft_type.subspace = True  # type: ignore[attr-defined]
    PeftConfig._get_peft_type = classmethod(_get_peft_type)  # type: ignore[method-assign,assignment]


def find_heads() -> None:
    """Let `PeftModel.load_adapter` find the modules that a task trained whole in a model in wrappers.

    A task is saved without the names of wrappers, and PEFT asks for a compiled model's ``_orig_mod.classifier``. Seen
    with PEFT 0.21.0 to 0.21.2. Idempotent. Where the function is not there, a warning says so.
    """
    original: Callable[..., Any] | None = vars(peft.peft_model).get("set_peft_model_state_dict")
    if original is None:
        _lacks("peft.peft_model.set_peft_model_state_dict", "tasks with modules_to_save are not loaded into wrappers")
        return
    if getattr(original, "subspace", False):
        return

    @functools.wraps(original)
    def set_peft_model_state_dict(model: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(config, SubspaceConfig) for config in model.peft_config.values()):
            state = by_head_names(model, state)
        return original(model, state, *args, **kwargs)

    set_peft_model_state_dict.subspace = True  # type: ignore[attr-defined]
    peft.peft_model.set_peft_model_state_dict = set_peft_model_state_dict


def join_mixed_models() -> bool:
    """Let `PeftMixedModel` take this method.

    PEFT keeps the methods of mixed models in closed lists (`MIXED_LISTS`), and has no hook for a method that has to
    look at the whole model before a module is replaced. So the method is added to the lists, and three methods are put
    before `MixedModel`'s own, for our configurations only. Seen with PEFT 0.21.0 to 0.21.2. Idempotent.

    Returns:
        Whether this PEFT has the lists. Where it has not, nothing is changed, and its mixed model refuses the method
        in its own words.
    """
    import peft.tuners.mixed as package
    from peft.tuners.mixed import model as module

    if not all(hasattr(module, name) for name in MIXED_LISTS):
        return False
    if SUBSPACE in module.COMPATIBLE_TUNER_TYPES:
        return True
    # `PeftMixedModel` reads them from the package, its tuner from the module
    package.COMPATIBLE_TUNER_TYPES = module.COMPATIBLE_TUNER_TYPES = (*module.COMPATIBLE_TUNER_TYPES, SUBSPACE)
    module.PREFIXES.append(PREFIX)
    module.Layers = (*module.Layers, SubspaceLayer)
    module.Configs = Union[module.Configs, SubspaceConfig]  # noqa: UP007 - PEFT asks for its __args__
    _put_before(module.MixedModel, "_prepare_adapter_config", peft_mixed.prepare_adapter_config)
    _put_before(module.MixedModel, "_prepare_model", peft_mixed.prepare_model)
    _put_before(module.MixedModel, "_create_and_replace", peft_mixed.create_and_replace)
    return True


def _put_before(tuner: type, name: str, ours: Callable[..., Any]) -> None:
    """Let the tuner's method `name` be `ours` for our configurations; it gets the method it takes the place of."""
    stored = inspect.getattr_static(tuner, name)

    @functools.wraps(getattr(tuner, name))
    def method(self: Any, config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
        theirs = stored.__get__(self, type(self))
        if isinstance(config, SubspaceConfig):
            return ours(self, theirs, config, *args, **kwargs)
        return theirs(config, *args, **kwargs)

    setattr(tuner, name, method)


def _lacks(place: str, consequence: str) -> None:
    warnings.warn(
        f"PEFT {peft.__version__} has no {place}, through which it would know the {NAME} method: {consequence}. An"
        " upgrade of subspace-peft may know this PEFT.",
        stacklevel=3,
    )


# here and not where it is imported: whichever import of PEFT or of this module comes first, its end is reached once
register()
