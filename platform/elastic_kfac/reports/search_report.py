"""One search as one HTML file that needs no network, while it runs and afterwards.

What comes in which order: the result in a sentence and a table, what went wrong, the configuration to
use, accuracy over time beside the references, memory against time, the parameters, which of them
matter, when each trial ran, every trial as CSV, and what it was made with.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from elastic_kfac import __version__
from elastic_kfac.experiments.importance import FEWEST, RELIABLE, importances
from elastic_kfac.experiments.search_folder import (
    BEST,
    Experiment,
    Trial,
    choices,
    mapping,
    read_experiment,
)
from elastic_kfac.reports.run_page import escaped, mapping_table, page, write_page
from elastic_kfac.reports.search_figures import (
    MOST_AXES,
    MOST_OTHERS,
    Axis,
    curves_figure,
    importance_figure,
    parallel_figure,
    pareto_figure,
    text_of,
    timeline_figure,
)
from elastic_kfac.reports.search_page import (
    SCRIPT,
    STYLE,
    Cell,
    Column,
    Line,
    download,
    figure,
    named_section,
    pairs,
    table,
)
from elastic_kfac.reports.search_tables import result_tables, trials_table
from elastic_kfac.reports.search_words import amount, headline, lacking, progress_line
from elastic_kfac.runs.summary import duration

SECTIONS = {
    "result": "Result",
    "failures": "What did not go through",
    "best": "Configuration to use",
    "curves": "Time to accuracy",
    "pareto": "Memory against time",
    "parameters": "Parameters",
    "importance": "Which parameters matter",
    "timeline": "Timeline",
    "trials": "All trials",
    "provenance": "Provenance",
}
"""Identity and title of every section, in their order."""


def write_experiment_report(folder: Path) -> Path:
    """Writes `report.html` into the folder of a search, finished or not.

    Returns:
        The path of the page.

    Raises:
        UsageError: If the folder is not there or holds no search.
    """
    folder = Path(folder)
    return write_page(folder / "report.html", render_experiment(read_experiment(folder)))


def render_experiment(experiment: Experiment) -> str:
    """The page of a search; equal searches give equal text."""
    contents = {
        "result": result_tables(experiment),
        "failures": _failures(experiment),
        "best": _best(experiment),
        "curves": _curves(experiment),
        "pareto": _pareto(experiment),
        "parameters": _parameters(experiment),
        "importance": _importance(experiment),
        "timeline": _timeline(experiment),
        "trials": trials_table(experiment),
        "provenance": _provenance(experiment),
    }
    links = "".join(f'<a href="#{key}">{escaped(SECTIONS[key])}</a>' for key in contents)
    parts = [
        "<header>",
        f'<p>elastic-kfac search <b>{escaped(experiment.name)}</b> · <span class="state '
        f'{_css(experiment.status)}">{escaped(experiment.status)}</span> '
        f"{escaped(progress_line(experiment))}</p>",
        _bar(experiment),
        f"<h1>{escaped(headline(experiment))}</h1>",
        _tiles(experiment),
        f'<nav aria-label="Sections">{links}</nav>',
        "</header>",
    ]
    parts += [named_section(key, SECTIONS[key], content) for key, content in contents.items()]
    return page(experiment.name, parts, style=STYLE, script=SCRIPT)


def _bar(experiment: Experiment) -> str:
    if experiment.status == "finished":
        return ""
    share = experiment.done / experiment.total if experiment.total else 0.0
    bar = (
        f'<div class="bar" role="progressbar" aria-label="trials done" aria-valuemin="0" '
        f'aria-valuemax="{experiment.total}" aria-valuenow="{experiment.done}">'
        f'<i style="width: {share:.1%}"></i></div>'
    )
    if experiment.status != "running":
        return bar
    return (
        bar + '<p class="live"><span id="written">Reload this page to see newer trials.</span>'
        '<label><input type="checkbox" id="live"> reload every 10 s</label></p>'
    )


def _tiles(experiment: Experiment) -> str:
    best, points = experiment.best, experiment.points
    reached = sum(p.value is not None for p in points if p.tried)
    tiles = [
        ("best, median", amount(experiment, best.value if best else None)),
        ("target accuracy", "–" if experiment.target is None else f"{experiment.target:.2%}"),
        ("points that reached it", f"{reached} of {sum(p.tried for p in points)}"),
        ("trials done", f"{experiment.done} of {experiment.total}"),
        ("failed", str(experiment.count("failed"))),
        ("refused", str(experiment.count("refused"))),
        ("stopped early", str(experiment.count("stopped"))),
    ]
    cells = (
        f'<div class="tile"><span>{escaped(n)}</span><b>{escaped(v)}</b></div>' for n, v in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _failures(experiment: Experiment) -> str:
    parts = []
    groups = (
        ("failed", "Failed", "The search went on without them."),
        ("refused", "Refused before they began", "They could not have worked; they cost no time."),
        ("stopped", "Stopped early", "The scheduler gave their time to better ones."),
    )
    columns = [Column("trial"), Column("why"), Column("seeds"), Column("parameters")]
    for status, title, note in groups:
        alike: dict[tuple[str, str, str], list[Trial]] = {}
        for trial in experiment.trials:
            if trial.status == status:
                alike.setdefault((trial.stage, trial.point, trial.reason), []).append(trial)
        lines = [
            Line(
                [
                    Cell("<br>".join(escaped(trial.id) for trial in trials)),
                    Cell(escaped(reason or "no reason was recorded"), css="why"),
                    Cell(escaped(", ".join(trial.seed for trial in trials))),
                    Cell(pairs(trials[0].parameters, text_of), css="why"),
                ],
                trial=trials[0].index,
            )
            for (_, _, reason), trials in alike.items()
        ]
        count = experiment.count(status)
        if lines:
            parts.append(f'<h3>{title} ({count})</h3><p class="note">{note}</p>')
            parts.append(table(title, columns, lines))
    return "".join(parts) or "<p>Nothing failed, was refused or was stopped early.</p>"


def _best(experiment: Experiment) -> str:
    best = experiment.best
    if best is None:
        return f"<p>{escaped(lacking(experiment))}</p>"
    default = mapping(mapping(experiment.about.get("references")).get("default")).get("config")
    lines = []
    for name, value in best.parameters.items():
        before = _value_at(default, name)
        cells = [name, text_of(value), "–" if before is _UNKNOWN else text_of(before)]
        lines.append(Line([Cell(f"<code>{escaped(text)}</code>") for text in cells]))
    columns = [Column("parameter"), Column("best"), Column("default")]
    parts = [table("The best point beside the default", columns, lines)]
    command = f"elastic-kfac train {shlex.quote(f'{experiment.location}/best_config.yaml')}"
    if experiment.best_config is None:
        parts.append('<p class="note">best_config.yaml has not been written yet.</p>')
        return "".join(parts)
    parts.append(f"<p>Train with it: <code>{escaped(command)}</code></p>")
    parts.append(download("best_config.yaml", experiment.best_config, "text/yaml"))
    parts.append('<button type="button" class="download" data-copy="config">Copy</button>')
    parts.append(
        "<details><summary>best_config.yaml</summary>"
        f'<pre id="config">{escaped(experiment.best_config.rstrip())}</pre></details>'
    )
    return "".join(parts)


def _curves(experiment: Experiment) -> str:
    axes: dict[Axis, str] = {"seconds": "training seconds", "step": "steps"}
    drawn = [
        figure(
            curves_figure(experiment, axis),
            f"Test accuracy over {words}: the best point, {_names(experiment)} and other trials.",
        )
        for axis, words in axes.items()
    ]
    if not any(drawn):
        return "<p>No trial has been evaluated yet.</p>"
    others = len(experiment.points) - 1
    more = f" Of {others} other points, {MOST_OTHERS} are drawn." if others > MOST_OTHERS else ""
    note = (
        "Thick: the median repeat; thin, same colour: the other seeds. A dot ends a trial that "
        "reached the target, a cross one that did not. Point at a line or a row to see the same "
        f"trial everywhere.{more}"
    )
    return f'<div class="two">{"".join(drawn)}</div><p class="note">{note}</p>'


def _pareto(experiment: Experiment) -> str:
    svg = pareto_figure(experiment)
    if not svg:
        return (
            "<p>No point has both reached the target and recorded its peak memory, so there is "
            "nothing to weigh.</p>"
        )
    left_out = sum(p.tried and p.value is None for p in experiment.points)
    note = (
        "On the line: no other point is both faster and smaller. Star: best; diamonds: references."
    )
    if left_out:
        note += f" Left out: {left_out} that did not reach the target."
    text = (
        f"Peak memory against {experiment.unit} to the target, with the front of best trade-offs."
    )
    return figure(svg, text, escaped(note), shape="narrow")


def _parameters(experiment: Experiment) -> str:
    found, _ = importances(experiment)
    order = [each.parameter for each in found]
    order += [name for name in experiment.parameters if name not in order]
    shown = order[:MOST_AXES]
    space = mapping(experiment.space.get("parameters"))
    lines = [
        Line([Cell(f"<code>{escaped(name)}</code>"), Cell(escaped(_range(space.get(name))))])
        for name in experiment.parameters
    ]
    svg = parallel_figure(experiment, shown)
    note = (
        "A line per point, orange the best, the darker the better; dashed lines did not reach the "
        "target. Axes in order of importance."
    )
    if len(order) > len(shown):
        note += f" Not drawn: {', '.join(order[MOST_AXES:])}."
    drawn = figure(
        svg, f"Parallel coordinates of {', '.join(shown)}.", escaped(note), shape="wide"
    ) or ("<p>Fewer than two points have ended.</p>")
    searched = table("Searched ranges", [Column("parameter"), Column("searched")], lines)
    return f"{drawn}<h3>Searched</h3>{searched}"


def _importance(experiment: Experiment) -> str:
    found, count = importances(experiment)
    if not found:
        return (
            f"<p>{count} ended points of at least {FEWEST} that are needed, or all of them had the "
            "same values.</p>"
        )
    note = (
        f"Share of the variance of the points' ranks that a parameter explains by itself (eta "
        f"squared of Kruskal and Wallis; numbers in two or three parts), over n = {count} points "
        "that finished or were stopped; the missed target ranks last. The line is what chance "
        "alone gives; a bar near it says nothing."
    )
    if count < RELIABLE:
        note += f" With fewer than {RELIABLE} points this is a hint at most."
    words = ", ".join(f"{each.parameter} {each.share:.0%}" for each in found)
    svg = importance_figure(found, count)
    return figure(svg, f"Importance: {words}.", escaped(note), shape="narrow")


def _timeline(experiment: Experiment) -> str:
    svg = timeline_figure(experiment)
    if not svg:
        return "<p>No trial has begun.</p>"
    resizes = [
        f"{trial.id}: {' → '.join(map(str, [trial.changes[0].before, *sizes]))}"
        for trial in experiment.trials
        if (sizes := [change.after for change in trial.changes])
    ]
    note = "A bar per trial, in the order in which they were planned."
    if resizes:
        note += f" Black lines: the trial's workers changed ({'; '.join(resizes[:12])}"
        note += f"; and {len(resizes) - 12} more)." if len(resizes) > 12 else ")."
    clones = [f"{t.id} from {t.parent}" for t in experiment.trials if t.parent]
    if clones:
        note += f" Continued another trial's state: {', '.join(clones)}."
    return figure(svg, "When each trial ran and how it ended.", escaped(note), shape="wide")


def _provenance(experiment: Experiment) -> str:
    about = experiment.about
    seeds = sorted({trial.seed for trial in experiment.trials if trial.seed}, key=_as_number)
    facts: dict[str, Any] = {f"hardware: {k}": v for k, v in mapping(about.get("hardware")).items()}
    facts |= dict(mapping(about.get("versions")))
    facts["seeds"] = ", ".join(seeds) or "none yet"
    facts["objective"] = f"{experiment.metric} ({experiment.unit}), smaller is better"
    started, ends = about.get("started"), [t.numbers.get("ended", 0.0) for t in experiment.trials]
    if isinstance(started, int | float) and ends and max(ends) > started:
        facts["took"] = f"{duration(max(ends) - started)} until the newest end of a trial"
    where = shlex.quote(experiment.location)
    again = f"elastic-kfac report {where}"
    space = yaml.safe_dump(
        dict(experiment.space), sort_keys=False, default_flow_style=None, width=96
    )
    parts = [mapping_table(facts)]
    parts.append(f'<p class="note">This page again: <code>{escaped(again)}</code>. ')
    parts.append(f"Page written by elastic-kfac {escaped(__version__)}.</p>")
    if experiment.space:
        parts.append(
            "<h3>To repeat the search</h3><p>Save the space, then run "
            "<code>elastic-kfac tune space.yaml</code>; seeds and ranges are in it.</p>"
            + download("space.yaml", space, "text/yaml")
            + f"<details><summary>space.yaml</summary><pre>{escaped(space.rstrip())}</pre></details>"
        )
    return "".join(parts)


_UNKNOWN = object()


def _value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return _UNKNOWN
        config = config[part]
    return config


def _range(parameter: Any) -> str:
    listed = choices(parameter)
    if listed is not None:
        return "one of " + ", ".join(text_of(value) for value in listed)
    for kind, words in (("uniform", ""), ("loguniform", ", logarithmic"), ("randint", ", whole")):
        ends = mapping(parameter).get(kind)
        if isinstance(ends, list | tuple) and len(ends) == 2:
            return f"{text_of(ends[0])} to {text_of(ends[1])}{words}"
    return "unknown"


def _names(experiment: Experiment) -> str:
    return ", ".join(experiment.references) or BEST


def _css(status: str) -> str:
    return status if status in ("running", "failed", "interrupted") else ""


def _as_number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (1 << 62, text)
