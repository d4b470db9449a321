"""`compare`: per method the learning rate that is best on the validation split, then the report seeds at that rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from subspace_peft.errors import SubspaceError

from .methods import Method
from .old_keywords import takes_old_keyword
from .run_cache import RunCache, plain

RUN_KEYS = ("validation", "test", "trained_adapter", "trained_head", "bytes", "seconds", "curve")
SWEEP_SEED = 0
WIDENINGS = 2

Run = Callable[[Method, "float | None", int], Mapping[str, Any]]


@takes_old_keyword("cells", "cache")
def compare(
    methods: Sequence[Method],
    run: Run,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    cache: RunCache,
    sweep_seed: int = SWEEP_SEED,
    sweep_seeds: Sequence[int] | None = None,
    widenings: int = WIDENINGS,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train every method under one budget and report its test score over `seeds`.

    Per method, every learning rate is tried with `sweep_seed`, or with each of `sweep_seeds`, and the one with the
    best mean validation score taken, the smaller of equals. A best one at the edge of the sweep widens the sweep by
    its own ratio. Then each of `seeds` is trained at that rate; the test score decides nothing. A run whose score is
    not finite counts as −∞: it is kept and reported.

    Args:
        methods: the rows. One without rates is not trained: it is run once, with rate None.
        run: ``run(method, rate, seed)`` trains and returns at least ``validation`` and ``test`` (scores, larger is
            better), ``trained_adapter`` and ``trained_head`` (parameters), ``bytes`` (the adapter's file without the
            head), ``seconds`` (of training), ``curve`` (pairs of step and validation score); ``metrics``, a dict, and
            anything else that JSON holds is kept beside them. ``test`` and ``metrics`` may be None where `seed` is not
            reported.
        seeds: report seeds.
        cache: where finished runs are kept, and found again after an interruption.
        sweep_seed: seed of the sweep's runs. A report seed that is the same one is not trained twice.
        sweep_seeds: several of them, in the place of `sweep_seed`.
        widenings: how often a sweep may be widened.
        progress: show a bar.

    Returns:
        Per method a dict that JSON holds: ``method``; ``rate`` and ``at_edge`` (whether it is still the smallest or
        largest of those tried); ``sweep``, every rate tried with its ``validation`` and, with `sweep_seeds`, the
        ``validations`` and ``tests`` of each seed; ``seeds``, ``tests``,
        ``validations``, ``metrics`` and ``curves``, an entry per seed; ``test`` and ``test_sd``, mean and sample
        standard deviation; ``diverged``, how many seeds; ``trained_adapter``, ``trained_head``, ``bytes``;
        ``seconds``, the mean. None stands for a score that is not finite, and for a standard deviation of fewer than
        two.

    Raises:
        SubspaceError: no seeds, or one of them twice; two methods of one name; a run whose result lacks a key. Before
            any training, but for the last.
    """
    names = [method.name for method in methods]
    if len(set(names)) != len(names):
        raise SubspaceError(f"Two methods have one name: {', '.join(names)}. Name each row once.")
    sweeping = [sweep_seed] if sweep_seeds is None else list(sweep_seeds)
    for name, given in (("seeds", seeds), ("sweep_seeds", sweeping)):
        if not given or len(set(given)) != len(given):
            raise SubspaceError(f"{name}={list(given)}: give at least one, each once.")
    total = sum(len(sweeping) * len(method.rates) + len(seeds) if method.rates else 1 for method in methods)
    with tqdm(total=total, desc="comparing", unit="run", disable=not progress) as bar:
        return [_row(method, run, seeds, cache, sweeping, widenings, bar) for method in methods]


def _row(
    method: Method, run: Run, seeds: Sequence[int], cache: RunCache, sweeping: list[int], widenings: int, bar: Any
) -> dict[str, Any]:
    def finished(rate: float | None, seed: int, *, tested: bool = True) -> dict[str, Any]:
        bar.set_postfix_str(f"{method.name}, {'untrained' if rate is None else f'rate {rate:g}'}, seed {seed}")
        result = cache.read(method, rate, seed)
        # a sweep's run may have left the test out, and its seed be reported now
        if result is None or not _complete(result) or (tested and _left_out(result)):
            fresh = run(method, rate, seed)
            if missing := [key for key in RUN_KEYS if key not in fresh]:
                raise SubspaceError(
                    f"The run of {method.name!r} returned no {', '.join(missing)}; it has to return all of {RUN_KEYS}."
                )
            result = cache.write(method, rate, seed, fresh)
        bar.update()
        return result

    def widened() -> None:
        bar.total += len(sweeping)
        bar.refresh()

    def at(rate: float) -> dict[str, Any]:
        return _mean_of([finished(rate, seed, tested=False) for seed in sweeping])

    if not method.rates:
        return _summary(method, None, False, {}, list(seeds)[:1], [finished(None, seeds[0])])
    tried = _sweep(method.rates, at, widenings, widened)
    rate = _best(tried)
    at_edge = rate in (min(tried), max(tried))
    return _summary(method, rate, at_edge, tried, list(seeds), [finished(rate, seed) for seed in seeds])


def _sweep(
    rates: Sequence[float], run: Callable[[float], dict[str, Any]], widenings: int, widened: Callable[[], None]
) -> dict[float, dict[str, Any]]:
    tried = {rate: run(rate) for rate in rates}
    for _ in range(widenings if len(rates) > 1 else 0):
        ordered, best = sorted(tried), _best(tried)
        if best == ordered[0]:
            further = ordered[0] ** 2 / ordered[1]
        elif best == ordered[-1]:
            further = ordered[-1] ** 2 / ordered[-2]
        else:
            break
        widened()
        # rounded, so that the same sweep names the same rates on every machine
        further = float(f"{further:.6g}")
        tried[further] = run(further)
    return tried


def _mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a sweep keeps of the `runs` of one rate; a seed whose score is not finite makes the mean None."""
    scores = [_score(run["validation"]) for run in runs]
    found = {
        "validation": statistics.fmean(scores) if all(map(math.isfinite, scores)) else None,
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }
    if len(runs) > 1:
        found |= {key + "s": [run[key] for run in runs] for key in ("validation", "test")}
    return found


def _complete(result: Mapping[str, Any]) -> bool:
    return all(key in result for key in RUN_KEYS)


def _left_out(result: Mapping[str, Any]) -> bool:
    return result["test"] is None and result.get("metrics", {}) is None


def _score(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else -math.inf


def _best(tried: Mapping[float, Mapping[str, Any]]) -> float:
    """Return the rate with the best validation score; of equals the smallest."""
    return max(sorted(tried), key=lambda rate: _score(tried[rate]["validation"]))


def _summary(
    method: Method,
    rate: float | None,
    at_edge: bool,
    tried: Mapping[float, Mapping[str, Any]],
    seeds: list[int],
    runs: list[dict[str, Any]],
) -> dict[str, Any]:
    tests = [_score(result["test"]) for result in runs]
    finite = all(map(math.isfinite, tests))
    sweep = [{"rate": each, **tried[each]} for each in sorted(tried)]
    return plain(
        {
            "method": method.name,
            "rate": rate,
            "at_edge": at_edge,
            "sweep": sweep,
            "seeds": seeds,
            "test": statistics.fmean(tests) if finite else None,
            "test_sd": statistics.stdev(tests) if finite and len(tests) > 1 else None,
            "tests": tests,
            "validations": [result["validation"] for result in runs],
            "diverged": sum(not math.isfinite(test) for test in tests),
            "metrics": [result.get("metrics") for result in runs],
            "trained_adapter": runs[0]["trained_adapter"],
            "trained_head": runs[0]["trained_head"],
            "bytes": runs[0]["bytes"],
            "seconds": statistics.fmean(result["seconds"] for result in runs),
            "curves": [result["curve"] for result in runs],
        }
    )
