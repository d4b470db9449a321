"""The contents of a report, as data: what was measured of a basis and a fleet, and what `report.json` holds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import ModuleFindings

# the key for shares of adapters that were left out: `report.json` has had it from its first version on, and with it
# `numbers` and `sources`
LEFT_OUT = "unseen"
FILE_KEYS = {"left_out": LEFT_OUT, "left_out_here": "unseen_here"}


@dataclass(frozen=True)
class ReportFacts:
    """The contents of a report.

    Attributes:
        basis: its place, fingerprint, builder, base model, number of modules, k, bytes, parameters per task.
        numbers: shares of energy, as `subspace_peft.energy` defines them: ``kept`` (the basis, of the sources it was
            built from), ``kept_of_new`` (of adapters that it was not built from), ``null_kept`` (a basis of noise
            adapters of equal strength, of them), ``unseen`` (a basis of the other folds, of those left out),
            ``random`` and ``mean_only``; ``k_for_share``, ``above`` (output and input directions above the null,
            medians), ``k_for_new_tasks`` (see `useful_k`), ``break_even`` adapters, ``bytes_per_lora``,
            ``bytes_per_task``, ``bytes_of_basis``, ``extra_rank`` (how many own directions per module make every
            adapter that it was built from faithful; where there is none, every adapter), ``extra_rank_of_new`` (the
            same of adapters that it was not built from), ``bytes_per_direction`` (what one of them takes in all
            modules), ``sources``, ``built_from`` (how many adapters the basis was built from), ``in_seed_groups``;
            ``at_least`` where ``kept`` is a bound. None where it could not be measured.
        verdict: sentences.
        modules: the findings of every module measured.
        sources: per adapter name, location, seed_group, norm, ``in_basis``, ``kept``, ``unseen``, ``mean_only`` and
            ``extra_rank``: how many own directions per module make it faithful, None where 64 do not.
        skipped: adapters that could not be used, each with its reason.
        how: how it was measured: modules and sources of how many, folds, seed.
        curves: per module what bases of every k keep, see `fleet_curves.curves_of_fleet`.
        choices: sizes in bytes and the command, from which the page computes what another k would give.
        made: ``date`` (UTC), ``version`` of the package, the ``command`` that makes such a report, and the
            ``basis`` as it is typed there.
    """

    basis: dict[str, Any]
    numbers: dict[str, Any]
    verdict: list[str]
    modules: dict[str, ModuleFindings] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return strict JSON: NaN and infinities become null."""
        found = asdict(self)
        found["modules"] = {
            name: {FILE_KEYS.get(key, key): value for key, value in module.items()}
            for name, module in found["modules"].items()
        }
        return _strict(found)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
