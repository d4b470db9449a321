"""Per method the learning rate that is best on the validation split; `compare`: then the report seeds at that rate."""

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


def try_rates(
    method: Method,
    run: Run,
    *,
    cache: RunCache,
    seed: int = SWEEP_SEED,
    seeds: Sequence[int] | None = None,
    keys: Sequence[str] = (),
    widenings: int = WIDENINGS,
    bar: Any,
) -> dict[float, dict[str, Any]]:
    """Train a method at every learning rate of its sweep, which a best one at the edge widens.

    Args:
        method: with at least one rate.
        run, cache, widenings: as in `compare`.
        seed: of all runs.
        seeds: several of them, in the place of `seed`.
        keys: what a kept result has to hold beside `RUN_KEYS`; one that does not is trained again.
        bar: a tqdm bar whose total counts the sweep's runs; further ones are added to it.

    Returns:
        Rate → the run's result; with several seeds their mean ``validation`` and ``seconds``, and each one's
        ``validations`` and ``tests``.

    Raises:
        SubspaceError: a run whose result lacks a key.
    """
    sweeping = [seed] if seeds is None else list(seeds)

    def finished(rate: float) -> dict[str, Any]:
        results = []
        for each in sweeping:
            results.append(finished_run(method, rate, each, run, cache, keys=keys))
            bar.update()
        return results[0] if len(results) == 1 else _mean_of(results)

    tried = {rate: finished(rate) for rate in method.rates}
    for _ in range(widenings if len(method.rates) > 1 else 0):
        ordered, best = sorted(tried), best_rate(tried)
        if best == ordered[0]:
            further = ordered[0] ** 2 / ordered[1]
        elif best == ordered[-1]:
            further = ordered[-1] ** 2 / ordered[-2]
        else:
            break
        # rounded, so that the same sweep names the same rates on every machine
        further = float(f"{further:.6g}")
        bar.total += len(sweeping)
        bar.refresh()
        tried[further] = finished(further)
    return tried


def _mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a sweep keeps of the `runs` of one rate; a seed whose score is not finite makes the mean None."""
    scores = [finite_score(run["validation"]) for run in runs]
    return {
        "validation": statistics.fmean(scores) if all(map(math.isfinite, scores)) else None,
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        **{key + "s": [run[key] for run in runs] for key in ("validation", "test")},
    }


def finished_run(
    method: Method,
    rate: float | None,
    seed: int,
    run: Run,
    cache: RunCache,
    *,
    keys: Sequence[str] = (),
    tested: bool = False,
) -> dict[str, Any]:
    """Return a run's kept result, or do the run and keep its result.

    Args:
        method, rate, seed, run, cache: as in `compare`.
        keys: as in `try_rates`.
        tested: whether a kept result that left the test out is not enough.

    Raises:
        SubspaceError: the run's result lacks a key.
    """
    needed = (*RUN_KEYS, *keys)
    result = cache.read(method, rate, seed)
    if result is not None and all(key in result for key in needed) and not (tested and _left_out(result)):
        return result
    fresh = run(method, rate, seed)
    if missing := [key for key in needed if key not in fresh]:
        raise SubspaceError(
            f"The run of {method.name!r} returned no {', '.join(missing)}; it has to return all of {needed}."
        )
    return cache.write(method, rate, seed, fresh)


def _row(
    method: Method, run: Run, seeds: Sequence[int], cache: RunCache, sweeping: list[int], widenings: int, bar: Any
) -> dict[str, Any]:
    def shown(method: Method, rate: float | None, seed: int) -> Mapping[str, Any]:
        bar.set_postfix_str(f"{method.name}, {'untrained' if rate is None else f'rate {rate:g}'}, seed {seed}")
        return run(method, rate, seed)

    def reported(rate: float | None, seed: int) -> dict[str, Any]:
        # a sweep's run may have left the test out, and its seed be reported now
        result = finished_run(method, rate, seed, shown, cache, tested=True)
        bar.update()
        return result

    if not method.rates:
        return _summary(method, None, False, {}, list(seeds)[:1], [reported(None, seeds[0])])
    tried = try_rates(method, shown, cache=cache, seeds=sweeping, widenings=widenings, bar=bar)
    rate = best_rate(tried)
    at_edge = rate in (min(tried), max(tried))
    return _summary(method, rate, at_edge, tried, list(seeds), [reported(rate, seed) for seed in seeds])


def _left_out(result: Mapping[str, Any]) -> bool:
    return result["test"] is None and result.get("metrics", {}) is None


def finite_score(value: Any) -> float:
    """Return a score as a float, −∞ for None and what is not finite."""
    return float(value) if value is not None and math.isfinite(value) else -math.inf


def best_rate(tried: Mapping[float, Mapping[str, Any]]) -> float:
    """Return the rate with the best validation score; of equals the smallest."""
    return max(sorted(tried), key=lambda rate: finite_score(tried[rate]["validation"]))


def _summary(
    method: Method,
    rate: float | None,
    at_edge: bool,
    tried: Mapping[float, Mapping[str, Any]],
    seeds: list[int],
    runs: list[dict[str, Any]],
) -> dict[str, Any]:
    tests = [finite_score(result["test"]) for result in runs]
    finite = all(map(math.isfinite, tests))
    kept = ("validation", "seconds", "validations", "tests")
    sweep = [{"rate": rate, **{key: tried[rate][key] for key in kept if key in tried[rate]}} for rate in sorted(tried)]
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
