"""Every measured number in README and docs, computed from its file under `benchmarks/results`.

    python benchmarks/claims.py            # `make verify-claims`: no stale, missing or orphan number
    python benchmarks/claims.py --write    # writes the rows into the documents, and docs/benchmarks.md

A row of a table is found in its document by its first cell, a piece of text by its words. `n` formats a
value of a file. A row that has digits in a result cell from elsewhere is refused, as is a number with a
unit in a document that neither comes from here nor is listed in GIVEN with its reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
UNITS = r"(?:CPU |training )?(?:s|ms|min|minutes?|seconds|hours?)\b|%|[kMGT]i?B\b|×"
MEASURED = re.compile(rf"(?<![\w.(/])[−-]?\d[\d.,]*(?: to [+−-]?\d[\d.,]*)?\s?(?:{UNITS})")
_MARK = re.compile("\x02[^\x03]*\x03")


@cache
def load(name: str) -> Any:
    """A result file."""
    return json.loads((ROOT / RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def n(value: float | str, spec: str = "g") -> str:
    """A value of a file in a row or a text."""
    return f"\x02{value:{spec}}\x03"


def pick(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The first row with these values."""
    return next(r for r in rows if all(r.get(key) == value for key, value in wanted.items()))


def share(value: float, digits: int = 0) -> str:
    """A fraction in percent."""
    return f"{n(100 * value, f'.{digits}f')} %"


def of(text: str, count_only: bool = False) -> str:
    """`17 of 18` of a summary."""
    return n(text.split()[0] if count_only else text, "")


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    document: str
    label: str
    """The first cell, with what a person has chosen: sizes, settings."""
    cells: tuple[str, ...]
    given: tuple[str, ...] = ()
    """Digits in the cells that are settings, not results."""

    @property
    def line(self) -> str:
        return _plain(f"| {self.label} | {' | '.join(self.cells)} |")


def _plain(text: str) -> str:
    return text.replace("\x02", "").replace("\x03", "").replace("|  |", "| |")


def file_of(name: str) -> str:
    return f"[{name}]({RESULTS}/{name}.json)"


def readme() -> Iterator[Row]:
    """The table of results."""

    def row(label: str, result: str, peer: str, file: str, *given: str) -> Row:
        return Row("README.md", label, (result, peer, file), given)

    steps = load("kfac_step")["rows"]
    resnet = {"case": "resnet20", "inverse_update_steps": 10}
    every = pick(steps, **resnet, factor_update_steps=1, method="eigen")
    usual = pick(steps, **resnet, factor_update_steps=5, method="eigen")
    sgd = sorted(round(r["sgd_ms"]) for r in (every, usual))
    yield row(
        "K-FAC step, ResNet-20, factors every step, eigen every 10 (default: every 5 and 10)",
        f"{n(every['ours_ms'], ',.0f')} CPU ms ({n(usual['ours_ms'], ',.0f')})",
        f"kfac-pytorch {n(every['peer_ms'], ',.0f')} ms ({n(usual['peer_ms'], ',.0f')}); "
        f"SGD {n(sgd[0])} to {n(sgd[-1])} ms",
        file_of("kfac_step"),
    )
    wide = {r["layer"]: n(r["eigen_plain_over_sgd"], ".1f") for r in load("wide_layers")["time"]}

    table = "embedding 30000 x 64, 2048 tokens"

    def times(start: str) -> str:
        return f"{next(value for layer, value in wide.items() if layer.startswith(start))} ×"

    yield row(
        "Plain K-FAC step, Linear 2,048 / 4,096 wide, 128 rows",
        f"{times('linear 2048')} / {times('linear 4096')} the CPU time; a head of 50,000 outputs "
        f"{times('head 512')}, a table of 30,000 × 64 {wide[table]} × "
        f"({wide[f'{table}, momentum 0.9']} × with momentum)",
        "SGD",
        file_of("wide_layers"),
        "50,000",
        "30,000 × 64",
    )
    changes = load("changes_in_place")["results"]
    gaps = {name: n(changes[name]["gap"]["p50_s"], ".2f") for name in ("grow", "drain", "kill")}
    lost = changes["node lost"]
    yield row(
        "No step for so long, in place (the default): growth, drain, killed worker, lost node",
        f"{gaps['grow']}, {gaps['drain']}, {gaps['kill']}, {n(lost['gap']['p50_s'], '.2f')} s; "
        f"{n(sum(change['steps_redone'] for change in changes.values()))} steps redone",
        "restarts, below",
        file_of("changes_in_place"),
    )
    recovery = load("elastic_recovery")["results"]
    ours, alone = recovery["ours"], recovery["plain_ray_train"]
    yield row(
        "Planned node removal to next step, by a restart",
        f"{n(ours['planned_s']['median'], '.1f')} s",
        f"Ray Train alone {n(alone['planned_s']['median'], '.1f')} s",
        file_of("elastic_recovery"),
    )
    yield row(
        "Killed node to next step, by a restart",
        f"{n(ours['kill_s']['median'], '.1f')} s (a killed worker in place "
        f"{n(recovery['ours_in_place']['kill_s']['median'], '.1f')} s); "
        f"{n(ours['steps_redone']['max'])} steps redone",
        f"Ray Train alone {n(alone['kill_s']['median'], '.0f')} s, "
        f"{n(alone['steps_redone']['median'])} steps",
        "same file",
    )
    chaos = load("chaos")
    quiet = "same final hash" if chaos["hash_equals_quiet_run"] else "another final hash"
    redone = sum(phase["steps_redone"] for phase in chaos["phases"])
    way = "in place" if chaos["in_place"] else "by restarts"
    yield row(
        f"Share of time spent on new steps, {way}, one fault per 120 s / 30 s",
        f"{' / '.join(share(phase['goodput']) for phase in chaos['phases'])}; {quiet}, "
        f"{n(redone)} steps redone",
        "undisturbed run",
        file_of("chaos"),
    )
    shares = [r["share"] for r in load("vault_cost")["rows"]]
    yield row(
        "CPU time of snapshots, 0.1 to 25 M parameters",
        f"{n(100 * min(shares), '.1f')} to {n(100 * max(shares), '.1f')} % of training",
        f"target {share(load('vault_cost')['target_share'])}",
        file_of("vault_cost"),
    )
    yield row(
        "Reproducible mode, 2 workers",
        f"{n(load('reproducible_cost')['ratios']['default']['median'], '.2f')} × the step time",
        "ordinary mode",
        file_of("reproducible_cost"),
    )
    tuned = {name: cell["median"] for name, cell in load("tuned_against_tuned")["cells"].items()}

    def reached(name: str) -> str:
        return n(tuned[name]["reached"].replace("/", " of "), "")

    def cpu(name: str) -> str:
        return f"{n(tuned[name]['cpu_seconds'], '.1f')} CPU s"

    yield row(
        "Fashion-MNIST (6,000 images) to 84 %, both tuned",
        f"{cpu('kfac/best')}, {n(tuned['kfac/best']['steps'])} steps, {reached('kfac/best')} seeds",
        f"SGD {cpu('sgd/best')}, {n(tuned['sgd/best']['steps'])} steps, {reached('sgd/best')}",
        file_of("tuned_against_tuned"),
    )
    yield row(
        "The same with the former defaults (a fixed KL clip)",
        f"{reached('kfac/default')} seeds",
        f"SGD {reached('sgd/default')}, {cpu('sgd/default')}",
        "same file",
    )
    judged = load("defaults")["summary"]["default, judged, 3 seeds"]
    yield row(
        "Defaults on the judged half of the problems (18), 3 seeds; bounds on the step were set "
        "after earlier judgings",
        f"training loss lower in {of(judged['train_better'], True)}, test loss within 2 % in "
        f"{of(judged['test_within_2_percent'], True)}, fewer steps to the target in "
        f"{of(judged['fewer_steps_to_target'], True)}, less CPU time in "
        f"{of(judged['less_cpu_to_target'], True)}",
        "the better of SGD 0.1/0.9 and AdamW 1e-3",
        file_of("defaults"),
        "2 %",
        "0.1/0.9",
        "1e-3",
    )
    formats = load("wire_formats")["rows"]
    full, small = pick(formats, wire_format="fp32"), pick(formats, wire_format="int8")
    sparse = [r for r in formats if r["wire_format"].startswith("top")]
    low, high = (f(r["accuracy_mean"] for r in sparse) for f in (min, max))

    def kilobytes(r: Mapping[str, Any]) -> str:
        return f"{n(r['gradient_bytes_per_step'] / 1000, '.1f')} kB"

    yield row(
        "Gradient bytes per step and rank: int8, top-1 %",
        f"{kilobytes(small)}, {kilobytes(sparse[0])} (accuracy {share(small['accuracy_mean'])}, "
        f"{n(100 * low, '.0f')} to {share(high)})",
        f"fp32 {kilobytes(full)}, {share(full['accuracy_mean'])}",
        file_of("wire_formats"),
        "fp32",
    )
    reading = load("data")["ratios_per_cpu_second"]
    photos = [each["measured"] for name, each in reading.items() if name.endswith("ours / PIL")]
    yield row(
        "Reading shards, samples per CPU second",
        f"{n(reading['raw: ours / DataLoader over PNG']['measured'], '.0f')} × (raw), "
        f"{n(min(photos), '.1f')} to {n(max(photos), '.1f')} × (JPEG)",
        "DataLoader over PNG, PIL",
        file_of("data"),
    )
    yield row(
        "Claims of the batch-size study (five policies)",
        verdicts("clusters10"),
        "",
        file_of("clusters10"),
    )
    yield row(
        "Claims of K-FAC against SGD over batch sizes",
        verdicts("kfac_vs_sgd"),
        "",
        file_of("kfac_vs_sgd"),
    )


def verdicts(study: str) -> str:
    """`4 of 5 hold, 1 fails`."""
    found = [claim["verdict"] for claim in load(study)["claims"]]
    counts = {verdict: found.count(verdict) for verdict in ("holds", "fails", "undecided")}
    parts = [f"{n(counts['holds'])} of {n(len(found))} hold"]
    if counts["fails"]:
        parts.append(f"{n(counts['fails'])} {'fails' if counts['fails'] == 1 else 'fail'}")
    if counts["undecided"]:
        parts.append(f"{n(counts['undecided'])} undecided")
    return ", ".join(parts)


def damping() -> Iterator[Row]:
    """Rules for the damping."""
    labels = {
        "**constant 1e-3**": "constant 1e-3",
        "`levenberg_marquardt` from 1e-3": "levenberg_marquardt 1e-3",
        "`levenberg_marquardt` from 1e-1": "levenberg_marquardt 1e-1",
        "`warmup` from 1e-1 to 1e-3 in 50 steps": "warmup 1e-1 to 1e-3, 50 steps",
        "0.1 of the mean eigenvalue of each layer's A ⊗ G, no absolute part": (
            "0.1 x mean eigenvalue by layer (prototype)"
        ),
        "0.01 of it": "0.01 x mean eigenvalue by layer (prototype)",
        "constant 1e-3, factors averaged from I (`ema_init: identity`)": (
            "constant 1e-3, ema_init identity"
        ),
        "`levenberg_marquardt` from 1e-3 with `trust_region: fixed`, kl_clip 1e-3": (
            "levenberg_marquardt 1e-3, trust_region fixed, kl_clip 1e-3"
        ),
    }
    columns = ("train_better", "test_within_2_percent", "less_cpu_to_target", "ended_above_start")
    for label, name in labels.items():
        found = load("damping_rules")["summary"][name]
        bold = "**" if label.startswith("**") else ""
        cells = (f"{bold}{of(found[column], True)}{bold}" for column in columns)
        yield Row("docs/damping.md", label, tuple(cells))


def variants() -> Iterator[Row]:
    """Cost of decompositions, and other curvature."""
    document = "docs/variants.md"
    for r in load("wide_layers")["decomposition"]:
        cells = [_significant(r["whole_s"])]
        for rank in ("rank_64", "rank_256"):
            part = r[rank]
            cells.append(f"{_significant(part['cold_s'])} / {_significant(part['warm_s'])}")
            missed = (n(100 * part[f"missed_{when}"], ".1g") for when in ("cold", "warm"))
            cells.append(" / ".join(f"{value} %" for value in missed))
        yield Row(document, f"{r['width']:,}", tuple(cells))
    found = load("defaults_variants")["summary"]
    for label, name, rival in (
        ("`eigen`", "default", None),
        ("`ekfac`", "ekfac", "default"),
        ("`one_sided`", "one_sided", "default"),
        ("`eigen`, rare", "rare", None),
        ("`ekfac`, rare", "ekfac_rare", "rare"),
    ):
        each, against = found[name], "–"
        if rival is not None:
            better = (n(each[f"{split}_better_than_{rival}"]) for split in ("train", "test"))
            against = " / ".join(better)
        ratio = each["cpu_per_step_over_default"]
        yield Row(
            document,
            label,
            (
                n(each["train_better_than_baseline"]),
                n(each["test_within_2_percent_of_baseline"]),
                against,
                n(ratio, "g" if ratio == 1 else ".2f"),
            ),
        )


def _significant(value: float) -> str:
    return n(value, ".2f" if value < 1 else ".1f")


def planning() -> Iterator[Row]:
    """How good predictions are."""
    document = "docs/planning.md"
    models = load("planner_accuracy")["by_model"]
    names = {
        "mlp": "MLP, 4 layers",
        "small_cnn": "CNN, 15,000 parameters",
        "vit": "ViT, 2 blocks of width 64",
    }

    def bounds(part: Mapping[str, float], sign: str = "+") -> str:
        low, high = (100 * part[key] for key in ("lowest", "highest"))
        return _zero(f"{n(low, '.0f')} to {n(high, f'{sign}.0f')} %")

    def chosen(part: Mapping[str, Any]) -> str:
        text = f"{n(part['within_10_percent'])} of {n(part['n'])}"
        missed = part["within_10_percent"] < part["n"]
        return f"{text} (worst {share(part['highest'])} above)" if missed else text

    for name, m in models.items():
        cases = n(m["cases"])
        yield Row(
            document,
            names[name],
            (
                f"{n(m['time_within_20_percent'])} of {cases} ({bounds(m['time_error'])})",
                f"{n(m['memory_within_5_percent'])} of {cases} ({bounds(m['memory_error'])})",
                f"{n(m['pairs_in_the_right_order'])} of {n(m['pairs'])}",
                chosen(m["chosen_fraction_over_best_measured"]),
            ),
        )
    labels = ("SGD, 90 epochs, 128 images per GPU", "K-FAC 1/64, 55 epochs", "K-FAC 1/2, 55 epochs")
    setups = load("planner_figures")["budget"]
    for label, setup in zip(labels, (setups[0], *_kfac_setups(setups)), strict=True):
        ours = f"{n(setup['minutes'], '.0f')} min"
        theirs = f"{n(setup['published_minutes'], '.0f')} min"
        if setup is setups[0]:
            theirs += " (did not converge)"
        else:
            ours = f"{n(setup['local_batch'])} images, {ours}"
            theirs = f"{n(setup['published_local_batch'])} images, {theirs}"
        yield Row(document, label, (ours, theirs))


def studies() -> Iterator[Row]:
    """Published trends."""
    document = "docs/studies.md"
    runs = load("robust_spectra")["runs"]
    for kind in ("plain", "robust"):
        for size in (64, 1024):
            chosen = [v for k, v in runs.items() if k.startswith(f"{kind} | {size} | ")]
            ends = [run["epochs"][-1] for run in chosen]
            largest = mean(end["largest"] for end in ends)
            cells = (
                n(largest, ".2f"),
                n(mean(sum(end["top"]) for end in ends), ".1f"),
                share(mean(-end["smallest"] / end["largest"] for end in ends), 1),
                share(mean(run["end"]["attacked_accuracy"] for run in chosen), 1),
            )
            yield Row(document, f"{kind}, B = {size:,}", cells)
    ends = load("dist_newton")["claims"]["end"]
    for title, activation in (("tanh", "tanh"), ("ReLU", "relu")):
        for rate in ("0.3", "1"):
            found = ends[f"{activation} | {rate}"]
            merged = (
                " / ".join(n(found[f"{kind} m={m}"], ".3f") for m in (2, 4, 8))
                for kind in ("paper", "split")
            )
            yield Row(
                document,
                f"{title}, rate {rate}",
                (n(found["sgd"], ".3f"), n(found["sgd 2"], ".3f"), *merged),
            )
    schedules = load("schedules")
    for name, row in schedules["cost table, B = 1024"].items():
        eigenvalue = row.get("cpu ms per eigenvalue")
        yield Row(
            document,
            name,
            (
                n(row["updates"], ",.0f"),
                n(row["cpu ms per update"], ".1f"),
                n(eigenvalue, ".0f") if eigenvalue else "–",
                n(row["total cpu s"], ".1f"),
                f"{n(row['speed-up'], '.1f')} ×",
                share(row["accuracy"], 1),
            ),
        )
    for size, row in schedules["large batch, accuracy by seed"].items():
        label = f"accuracy, B = {int(size):,}"
        yield Row(document, label, tuple(share(mean(v), 1) for v in row.values()))
    for task, row in load("workloads")["summary"].items():
        cells = (_epochs(found) for found in row.values())
        yield Row(document, f"`{task}`", tuple(cells))


def _epochs(found: Mapping[str, Any]) -> str:
    """The median of epochs to a target, and how many seeds reached it."""
    reached = [each for each in found["epochs_to_target"] if each is not None]
    middle = "–" if found["median"] is None else n(found["median"], ".2f")
    return f"{middle} ({n(len(reached))} of {n(len(found['epochs_to_target']))})"


def _zero(text: str) -> str:
    return text.replace("-0 ", "0 ")


def _kfac_setups(setups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [s for s in setups if "1/64" in s["method"] or "1/2" in s["method"]]


def elastic() -> Iterator[Row]:
    """Spot nodes."""
    replayed = load("spot_replay")["virtual"]
    for label, key in (
        ("elastic, in place", "ours"),
        ("plain Ray Train, by the model", "plain_ray_train_model"),
    ):
        row = replayed[key]
        cells = (share(row["of_oracle"], 1), n(row["price"], ".2f"))
        yield Row("docs/elastic.md", label, cells)
    price = n(replayed["on_demand"]["price"], ".2f")
    yield Row("docs/elastic.md", "on-demand nodes", ("all of it", price))


def texts() -> Iterator[tuple[str, str]]:
    """(document, words with their numbers)."""
    rows = load("vault_cost")["rows"]
    largest = max(rows, key=lambda r: r["parameters"])
    yield (
        "README.md",
        f"redone ({n(largest['interval_s'], '.0f')} s at {n(largest['parameters'] / 1e6, '.0f')} M "
        "parameters)",
    )
    words = pick(load("wide_layers")["quality"], problem="next word, head with 2000 outputs")
    yield (
        "docs/damping.md",
        f"loss\n{n(words['whole']['loss'], '.2f')} against SGD's {n(words['sgd'], '.2f')}",
    )


GIVEN: dict[str, dict[str, str]] = {
    "README.md": {
        "about 6 GB": "size of an installation, docs/install.md",
        "paired 95 % interval": "definition",
        "30,000 × 64": "setting",
    },
    "docs/damping.md": {
        "1 % of the mean eigenvalue": "definition",
        "× 1000, × 0.001": "setting",
        "lr × 10": "setting",
        "test loss within 2 %": "definition",
        "Short runs at large batch": "single runs of an earlier state; their files were not kept",
        "1024: 75 % at 13, 80 % at 18": "as above",
        "batch 256: 83 %": "as above",
        "85 % at 48": "as above",
        "46 % at 29, 48 % at 32": "as above",
        "10 to 40 % more CPU time": "single runs of an earlier state; their files were not kept",
    },
    "docs/install.md": {
        "5.2 GB without extras, 6.0 GB": "measured once with the command that stands beside it",
    },
    "docs/planning.md": {
        "40 % of the data": "definition",
        "70 % of its memory rate": "definition",
        "gains 5 %": "definition",
    },
    "docs/variants.md": {"within 2 % of it": "definition"},
}
"""Numbers with units that are no results of a benchmark: words around each, and why."""

COMMANDS: dict[str, str] = {
    "changes_in_place": "python benchmarks/elastic/changes_in_place.py",
    "chaos": "make chaos",
    "clusters10": "elastic-kfac compare benchmarks/studies/clusters10.yaml",
    "damping_rules": "python benchmarks/defaults/run.py (candidates.yaml)",
    "data": "python benchmarks/data/bench_data.py",
    "defaults": "python benchmarks/defaults/run.py",
    "defaults_variants": "python benchmarks/defaults/run.py (ekfac, one_sided, rare)",
    "dist_newton": "python benchmarks/studies/dist_newton.py",
    "elastic_recovery": "python benchmarks/elastic_recovery.py",
    "fisher": "python benchmarks/studies/fisher.py",
    "hessian_cost": "python benchmarks/hessian_cost.py",
    "in_place_gaps": "python benchmarks/in_place_gaps.py",
    "kfac_step": "python benchmarks/kfac_step.py",
    "kfac_vs_sgd": "elastic-kfac compare benchmarks/studies/kfac_vs_sgd.yaml",
    "membership_schedules": "pytest -m soak tests/unit/training/test_membership_schedules.py",
    "momentum_placement": "python benchmarks/defaults/run.py (momentum_before)",
    "plan_time": "python benchmarks/plan_time.py",
    "planner_accuracy": "python benchmarks/planner/accuracy.py",
    "planner_decomposers": "python benchmarks/planner/decomposers.py",
    "planner_figures": "python benchmarks/planner/figures.py",
    "recipes": "python benchmarks/studies/recipes.py",
    "reproducible_cost": "python benchmarks/reproducible_cost.py",
    "robust_spectra": "python benchmarks/studies/robust_spectra.py",
    "row_log_cost": "python benchmarks/row_log_cost.py",
    "schedules": "python benchmarks/studies/schedules.py",
    "slow_rank": "python benchmarks/elastic/slow_rank.py",
    "spot_replay": "python benchmarks/elastic/spot_replay.py",
    "start_up": "python benchmarks/start_up.py --against PLATFORM_OF_ANOTHER_CHECKOUT",
    "story": "python benchmarks/elastic/story.py",
    "suggested": "python benchmarks/suggested.py",
    "telemetry_cost": "python benchmarks/telemetry_cost.py",
    "time_to_accuracy": "python benchmarks/time_to_accuracy/run.py --data FOLDER",
    "tuned_against_tuned": "python benchmarks/tuned_against_tuned.py",
    "vault_cost": "python benchmarks/vault_cost.py",
    "wide_layers": "python benchmarks/wide_layers.py",
    "wire_formats": "python benchmarks/studies/wire_formats.py",
    "workloads": "python benchmarks/workloads.py",
}
"""What wrote each file."""


def rows() -> list[Row]:
    """Every row."""
    return [*readme(), *damping(), *variants(), *planning(), *elastic(), *studies()]


def unfounded(row: Row) -> list[str]:
    """Digits in the cells of a row that come from no file."""
    text = " | ".join(cell for cell in row.cells if not cell.startswith("["))
    for setting in row.given:
        text = text.replace(setting, "")
    return re.findall(r"(?<![\w-])\d[\d.,]*", _MARK.sub("", text))


def orphans(document: str, text: str, covered: list[str]) -> list[str]:
    """Numbers with units in a document that are neither `covered` nor given."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    for piece in sorted([*covered, *GIVEN.get(document, {})], key=len, reverse=True):
        text = text.replace(piece, "")
    rest = [line for line in text.splitlines() if not line.startswith(("#", "|---"))]
    return [f"{m[0]} in: {line.strip()[:90]}" for line in rest for m in MEASURED.finditer(line)]


def labels_only(row: Row) -> str:
    """The cell that names a row, whose numbers are settings."""
    return f"| {row.label} |"


def documents() -> list[str]:
    """Documents with numbers; the reference of the configuration is generated elsewhere."""
    names = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    return [name for name in names if name not in ("docs/configuration.md", "docs/benchmarks.md")]


def overview(dates: Mapping[str, str]) -> str:
    """docs/benchmarks.md; `dates` by file, for those that record none."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/claims.py --write`. `make verify-claims` computes every measured",
        "number in README and docs from these files and fails on one that is stale, missing or without a",
        "file; `make bench-smoke` runs every benchmark at a tiny size. n counts the repetitions (seeds,",
        "steps, changes) behind a number; the date is that of the file.",
        "",
        "| file | command | machine | n | date | versions |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        found = load(path.stem)
        link = f"[{path.stem}](../{RESULTS}/{path.name})"
        lines.append(
            f"| {link} | `{COMMANDS[path.stem]}` | {_machine(found)} | {_repetitions(found)} | "
            f"{found.get('date') or dates.get(path.stem, 'today')} | {_versions(found)} |"
        )
    return "\n".join(lines) + "\n"


def dates_in(page: str) -> dict[str, str]:
    """The dates that docs/benchmarks.md has."""
    return dict(re.findall(r"^\| \[(\w+)\].* \| (\d{4}-\d\d-\d\d) \|", page, re.MULTILINE))


def dates_of_commits() -> dict[str, str]:
    """When each result was last committed; today for one that has changed since."""
    found = {}
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%cs", "--", str(path)]
        changed = ["git", "-C", str(ROOT), "status", "--porcelain", "--", str(path)]
        date = "" if _said(changed) else _said(command)
        found[path.stem] = date or datetime.date.today().isoformat()
    return found


def _said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _repetitions(found: Mapping[str, Any]) -> str:
    """`3`, or `3 to 30` where numbers of a file have different ones."""
    counts = set(_counts(found))
    runs = found.get("runs")
    if not counts and isinstance(runs, list):
        counts = {len(runs)}
    elif not counts and isinstance(runs, dict):  # Named by problem, method, seed, …
        parts = [{p for p in key.split(" | ") if p.isdecimal()} for key in runs]
        counts = {len(set().union(*parts))}
    if not counts:
        return "not recorded"
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _counts(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for part in value:
            yield from _counts(part)
    elif isinstance(value, dict):
        named = next((key for key in ("n", "seeds", "rounds") if key in value), None)
        if named is not None and isinstance(value[named], int):
            yield value[named]
        for key, part in value.items():
            if key == "interval" and isinstance(part, dict) and "count" in part:
                yield part["count"]
            elif key != "p99":  # Of single steps.
                yield from _counts(part)


def _machine(found: Mapping[str, Any]) -> str:
    for key in ("machine", "hardware", "provenance"):
        if part := found.get(key):
            return _listed(part)
    return str(found.get("basis", "not recorded"))


def _listed(part: Any) -> str:
    if isinstance(part, str):
        return part
    known = ("cpu", "device", "processor", "system", "cores", "cpus", "threads")
    shown = [
        f"{part[key]} {key}" if isinstance(part[key], int) else str(part[key])
        for key in known
        if key in part
    ]
    return ", ".join(shown) or "not recorded"


def _versions(found: Mapping[str, Any]) -> str:
    part = found.get("versions") or found.get("provenance", {}).get("versions") or found
    shown = [f"{key} {part[key]}" for key in ("torch", "ray") if isinstance(part.get(key), str)]
    return ", ".join(shown) or "not recorded"


def problems(read: Callable[[str], str]) -> list[str]:
    """Everything that is wrong; `read` gives the text of a document."""
    found: list[str] = []
    covered: dict[str, list[str]] = {name: [] for name in documents()}
    for row in rows():
        found += [
            f"{row.document}: {digits} in the row {row.label!r} comes from no file"
            for digits in unfounded(row)
        ]
        if row.line not in read(row.document):
            found.append(f"{row.document}: stale or missing: {row.line}")
        covered[row.document] += [row.line, labels_only(row)]
    for document, words in texts():
        if _plain(words) not in read(document):
            found.append(f"{document}: stale or missing: {_plain(words)!r}")
        covered[document].append(_plain(words))
    for document, pieces in covered.items():
        lines = orphans(document, read(document), pieces)
        found += [f"{document}: a number without a file: {line}" for line in lines]
        text = read(document)
        found += [
            f"{document}: GIVEN lists what is not there: {p!r}"
            for p in GIVEN.get(document, {})
            if p not in text
        ]
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        if path.stem not in COMMANDS:
            found.append(f"{RESULTS}/{path.name}: no command in COMMANDS wrote it")
    if not any("no command" in line for line in found):
        page = read("docs/benchmarks.md")
        if page != overview(dates_in(page)):
            found.append("docs/benchmarks.md is stale")
    return found


def write() -> None:
    """Replaces the rows in the documents."""
    for row in rows():
        path = ROOT / row.document
        text = path.read_text(encoding="utf-8")
        pattern = re.compile(rf"^{re.escape(labels_only(row))}.*$", re.MULTILINE)
        same = pattern.findall(text)
        if len(same) != 1:
            sys.exit(f"{row.document} has {len(same)} rows {row.label!r}")
        path.write_text(pattern.sub(lambda _, line=row.line: line, text), encoding="utf-8")
    (ROOT / "docs" / "benchmarks.md").write_text(overview(dates_of_commits()), encoding="utf-8")


def main() -> int:
    """Returns 1 if a number is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the rows into the documents")
    if parser.parse_args().write:
        write()
    try:
        found = problems(lambda name: (ROOT / name).read_text(encoding="utf-8"))
    except (KeyError, StopIteration, FileNotFoundError) as error:
        found = [f"a result file lacks what a document states: {error!r}"]
    print("\n".join(found) or f"{len(rows())} rows and their documents agree with {RESULTS}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
