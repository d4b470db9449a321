"""The tables of results under one treatment of heads: scores, gains over the head, differences, rates, the trial."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from .choice import CHOICE, choice_lines, with_choice
from .paired import Difference, difference, mean_score
from .rate_choice import choice_of_rates, mean
from .same_head import CHOSEN, HEADS, WIDE
from .sections import Rows, reached_table, scores
from .tasks import SENTIMENT

HEAD, LORA = "head only", "LoRA r=8"
ROWS = (
    HEAD,
    "mean only",
    LORA,
    "LoRA r=4",
    "LoRA r=2",
    "LoRA r=1",
    "VeRA r=384",
    "LoRA-XS-like",
    "random",
    f"random k={WIDE}",
    "random + 1 own",
    "random + 2 own",
    "fleet",
    f"fleet k={WIDE}",
    "fleet + 1 own",
    "fleet + 2 own",
    "fleet + 4 own",
    "hybrid",
    "eigenlora",
    CHOICE,
)
FLEETS = ("fleet", f"fleet k={WIDE}", "fleet + 1 own", "fleet + 2 own", "fleet + 4 own", "hybrid", "eigenlora", CHOICE)
# what a row of the fleet's is held against beside LoRA r=8: rows of its size, and the control without a fleet
BESIDE = {
    "fleet": ("random", "LoRA-XS-like", "mean only", "LoRA r=1", "VeRA r=384", "hybrid", "eigenlora"),
    f"fleet k={WIDE}": (f"random k={WIDE}", "LoRA r=1", "VeRA r=384", "fleet"),
    "fleet + 1 own": ("random + 1 own", "LoRA r=1", "VeRA r=384", "fleet"),
    "fleet + 2 own": ("random + 2 own", "LoRA r=2", "fleet"),
    "fleet + 4 own": ("LoRA r=4", "fleet"),
    CHOICE: ("fleet", "fleet + 2 own", "LoRA r=2"),
}
HEADROOM = 3.0  # points
WORTH = 0.5  # points of validation for which the head's rate would be swept: that is twice the runs
COLUMNS = [
    "| | points [95 % bootstrap] | by t over tasks | tasks won / tied / lost | tasks |",
    "|---|---|---|---|---|",
]


def kinds(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Return the tasks about opinion and the others, where there are both."""
    parts = {
        "opinion": [task for task in tasks if task in SENTIMENT],
        "other": [task for task in tasks if task not in SENTIMENT],
    }
    return parts if all(parts.values()) else {}


def table(rows: Rows, order: Sequence[str] = ROWS) -> list[str]:
    """Return a line per row: parameters, means, and every task's score.

    Means are over the tasks that all rows have; a row that is not run on all of LoRA r=8's tasks yet has none.
    """
    methods = [name for name in order if name in rows]
    tasks = list(dict.fromkeys(task for name in methods for task in rows[name]))
    whole = [name for name in methods if set(rows[name]) >= set(rows.get(LORA, ()))]
    common = [task for task in tasks if all(task in rows[name] for name in whole)]
    means = {f"mean of {len(common)}": common, **kinds(common)} if common else {}
    lines = [f"| row | trained | {' | '.join([*means, *tasks])} |", "|---" * (2 + len(means) + len(tasks)) + "|"]
    for name in methods:
        each = scores(rows, name)
        trained = statistics.fmean(row["trained"] for row in rows[name].values())
        cells = [f"**{mean_score(each, chosen):.1f}**" if name in whole else "–" for chosen in means.values()]
        cells += [f"{mean_score(each, [task]):.1f}" if task in each else "–" for task in tasks]
        lines.append(f"| {name} | {trained:,.0f} | {' | '.join(cells)} |")
    return lines


def with_headroom(rows: Rows) -> list[str]:
    """Return the tasks on which LoRA r=8 gains `HEADROOM` points over the head alone, by validation scores.

    The test split has no say in it: choosing by test scores would choose tasks on which LoRA was lucky there.
    """
    return [
        task
        for task, row in rows.get(LORA, {}).items()
        if task in rows.get(HEAD, {})
        and 100 * (mean(row["validations"]) - mean(rows[HEAD][task]["validations"])) >= HEADROOM
    ]


def only(rows: Rows, tasks: Iterable[str]) -> Rows:
    """Return `rows` on some tasks; rows that have none of them are left out."""
    wanted = set(tasks)
    parts = {name: {task: row for task, row in each.items() if task in wanted} for name, each in rows.items()}
    return {name: each for name, each in parts.items() if each}


def line(name: str, found: Difference) -> str:
    by_t = found.by_t
    star = " *" if found.beyond_noise else ""
    t_words = "–" if by_t is None else f"[{by_t[0]:+.1f}, {by_t[1]:+.1f}]{' *' if by_t[0] > 0 or by_t[1] < 0 else ''}"
    counts = f"{found.wins} / {found.ties} / {found.losses}"
    return f"| {name} | {found}{star} | {t_words} | {counts} | {len(found.tasks)} |"


def between(rows: Rows, pairs: Iterable[tuple[str, str]], words: str = "") -> list[str]:
    """Return a line per pair of rows that are there and have a task in common."""
    lines = []
    for a, b in pairs:
        left, right = (scores(rows, name) if name in rows else {} for name in (a, b))
        common = [task for task in left if task in right]
        if common:
            both = difference({t: left[t] for t in common}, {t: right[t] for t in common})
            lines.append(line(f"{words}{a} − {b}", both))
    return lines


def tables_of(title: str, rows: Rows) -> list[str]:
    """Return scores, gains over the head alone, and the fleet's rows against others, all and by kind of task."""
    listed = [(a, b) for a in FLEETS for b in (LORA, *BESIDE.get(a, ()))]
    out = [f"### {title}", "", *table(rows), "", "Gain over the head alone:", "", *COLUMNS]
    out += between(rows, [(name, HEAD) for name in ROWS if name != HEAD])
    out += ["", "Rows of the fleet, and what they are held against:", "", *COLUMNS, *between(rows, listed)]
    controls = [("random + 1 own", "LoRA r=1"), ("random + 2 own", "LoRA r=2"), ("LoRA r=1", LORA), ("random", LORA)]
    out += between(rows, controls)
    for words, chosen in kinds(list(rows.get("fleet", {}))).items():
        out += between(only(rows, chosen), listed, f"{words} tasks: ")
    return [*out, ""]


def twice(title: str, rows: Rows) -> list[str]:
    """Return `tables_of` all tasks, and of those with headroom."""
    rows = with_choice(rows)
    out = tables_of(title, rows)
    if some := with_headroom(rows):
        words = f"{title}; only where LoRA r=8 gains {HEADROOM:g} points over the head on validation"
        return [*out, *tables_of(f"{words} ({', '.join(some)})", only(rows, some))]
    none = f"LoRA r=8 gains {HEADROOM:g} points over the head alone on validation on none of these tasks."
    return [*out, none, ""]


def trial_scores(rows: Rows) -> dict[str, float]:
    """Return row → mean over tasks of the best rate's mean validation score, in points."""
    best = {
        name: [max(value or 0.0 for _, value in row["sweep"]) for row in each.values()] for name, each in rows.items()
    }
    return {name: 100 * statistics.fmean(each) for name, each in best.items()}


def decided(trials: Mapping[str, Rows]) -> str:
    """Return the treatment of heads that the trial chooses.

    It is the one under which the rows with an adapter validate best on average: a treatment under which some row is
    trained too little has no say in what adapters can do. Sweeping the head's rate takes twice the runs and
    chooses from twice the candidates, so it has to be `WORTH` points ahead of every other.

    Args:
        trials: names of `same_head.HEADS` → rows.

    Raises:
        ValueError: none is given.
    """
    if not trials:
        raise ValueError("There is no trial of heads to decide by: run `run.py head-trial`.")
    means = {}
    for name, rows in trials.items():
        found = [value for row, value in trial_scores(rows).items() if row != HEAD]
        means[name] = statistics.fmean(found) - (WORTH if HEADS[name].joint else 0.0)
    return max(means, key=means.__getitem__)


def trials_of(found: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return treatment → rows of the trial, of those whose results are there."""
    named = {name: f"head-trial-{name.replace(' ', '-')}" for name in HEADS}
    return {name: found[file] for name, file in named.items() if file in found}


def trial_table(trials: Mapping[str, Rows]) -> list[str]:
    """Return a line per treatment of heads: validation scores of all rows, and two differences between them."""
    names = [name for name in (HEAD, LORA, "fleet", "random") if all(name in rows for rows in trials.values())]
    lines = [
        f"| head | {' | '.join(names)} | mean of adapters | fleet − random | LoRA r=8 − head |",
        "|---" * (len(names) + 4) + "|",
    ]
    for name, rows in trials.items():
        each = trial_scores(rows)
        cells = [f"{each[row]:.1f}" for row in names]
        cells.append(f"{statistics.fmean(value for row, value in each.items() if row != HEAD):.1f}")
        cells += [
            f"{each[a] - each[b]:+.1f}" if a in each and b in each else "–"
            for a, b in (("fleet", "random"), (LORA, HEAD))
        ]
        lines.append(f"| {name}: {HEADS[name].about} | {' | '.join(cells)} |")
    return lines


def trial_section(trials: Mapping[str, Rows]) -> list[str]:
    """Return `trial_table` under a heading, and what the rule chooses from it."""
    tasks = list(dict.fromkeys(task for rows in trials.values() for each in rows.values() for task in each))
    title = f"### Trial of head treatments: validation scores, two seeds, best rates, {', '.join(tasks)}"
    said = f"The rule chooses *{decided(trials)}*; the tables are of *{CHOSEN}*."
    return [title, "", *trial_table(trials), "", said, ""]


def same_head_sections(found: Mapping[str, Rows]) -> list[str]:
    """Return all tables of the results under one head treatment; nothing where there are none."""
    out: list[str] = []
    if trials := trials_of(found):
        out += trial_section(trials)
    for name, words in (("main", "text"), ("images", "image")):
        if name not in found:
            continue
        rows = found[name]
        count = len({task for each in rows.values() for task in each})
        title = f"{count} {words} tasks, 300 training examples, one head treatment, rates swept with two seeds"
        out += twice(title, rows)
        if chosen := choice_lines(with_choice(rows)):
            words = f"{words[0].upper()}{words[1:]} tasks: what choosing by validation takes"
            out += [f"### {words}", "", *chosen, ""]
        out += [
            f"### {count} {name if name == 'images' else 'text'} tasks: rates chosen",
            "",
            *choice_of_rates(rows, ROWS),
            "",
        ]
        if any(len(row["curves"][0]) > 1 for row in rows.get("fleet", {}).values()):
            first = [name for name in ROWS if name in rows and len(next(iter(rows[name].values()))["curves"][0]) > 1]
            out += [
                "### Speed: runs within a point of LoRA r=8's final validation score",
                "",
                *reached_table(rows, first),
                "",
            ]
    if "one-rate" in found:
        out += twice(
            "The same without a sweep: every row at the rate that was best on the other tasks", found["one-rate"]
        )
    return out
