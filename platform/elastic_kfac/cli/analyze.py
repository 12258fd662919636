"""`analyze` and `probe`: the loss surface and the matrices of a run's checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from elastic_kfac.cli.runs import device_of, locate_run, open_run

if TYPE_CHECKING:
    from elastic_kfac.config import AnalysisConfig
    from elastic_kfac.runs.checkpoints import Restored

_ONE_SAMPLES = 50
_TRACE_DRAWS = 30
_DENSITY_DRAWS = 5
_LANDSCAPE_POINTS = 31


def analyze(arguments: argparse.Namespace) -> int:
    """Spectra, trace, density and loss along the dominant eigenvector of a checkpoint."""
    request = _request(
        top_k=arguments.top_k,
        samples=arguments.samples,
        one_samples=_ONE_SAMPLES,
        trace_draws=_TRACE_DRAWS,
        density_draws=_DENSITY_DRAWS,
        landscape_points=_LANDSCAPE_POINTS,
        budget_s=arguments.budget_s,
        memory_gib=arguments.memory_gib,
        seed=arguments.seed,
    )
    with _restored(arguments) as here:
        from elastic_kfac.runs.checkpoint_analysis import analyse_checkpoint

        found = analyse_checkpoint(
            here, request, split=arguments.split, say=lambda line: print(line, flush=True)
        )
    return _finish(arguments, found, table(found))


def lowrank(arguments: argparse.Namespace) -> int:
    """Ranks of a checkpoint's matrices, compared with a kernel matrix."""
    with _restored(arguments) as here:
        from elastic_kfac.runs.checkpoint_analysis import probe_low_rank

        request = _request(samples=arguments.images, batch_size=256)
        found = probe_low_rank(here, request, epsilon=arguments.epsilon)
    return _finish(arguments, found, low_rank_table(found))


def bias_variance(arguments: argparse.Namespace) -> int:
    """Training loss + C·√(variance of the samples' losses / n), and the other split's loss."""
    with _restored(arguments) as here:
        from elastic_kfac.runs.checkpoint_analysis import measure_bias_variance

        request = _request(samples=arguments.samples)
        found = measure_bias_variance(here, request, factor=arguments.factor)
    return _finish(arguments, found, bias_variance_table(found))


def bias_variance_table(found: Mapping[str, Any]) -> Iterator[str]:
    """Both splits on one screen."""
    yield f"step {found['step']:,}, C = {found['factor']:g}"
    yield f"  {'split':<12} {'loss':>10} {'std':>10} {'samples':>9} {'loss + C·√(Var/n)':>19}"
    for name, row in found["splits"].items():
        yield (
            f"  {name:<12} {row['loss']:>10.4g} {row['variance'] ** 0.5:>10.4g} "
            f"{row['samples']:>9,} {row['bound']:>19.4g}"
        )


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """An analysis on one screen."""
    yield f"  loss {_short(found['loss'])}, gradient norm {_short(found['gradient_norm'])}"
    whole = found.get("spectrum")
    if whole:
        low, high = whole["smallest"], whole["largest"]
        yield f"  largest eigenvalue   {high:.4g}"
        yield f"  smallest eigenvalue  {low:.4g}{_saddle(low, high)}"
        top = " ".join(f"{value:.3g}" for value in whole["eigenvalues"])
        yield from _wrapped(f"  top {len(whole['eigenvalues'])} by magnitude", top)
    if last := found.get("last_layer"):
        top = " ".join(f"{value:.3g}" for value in last["eigenvalues"])
        yield from _wrapped("  last layer", top)
    if one := found.get("one_sample"):
        top = " ".join(f"{value:.3g}" for value in one["mean"])
        yield from _wrapped(f"  one sample (n={one['samples']})", top)
    if trace := found.get("trace"):
        error = trace["standard_error"]
        spread = "" if error is None else f" ± {error:.2g} ({trace['draws']} draws)"
        yield f"  trace                {_short(trace['mean'])}{spread}"
    for note in found["notes"]:
        yield f"  note: {note}"
    yield f"  took {found['time_s']:.1f} s"


def low_rank_table(found: Mapping[str, Any]) -> Iterator[str]:
    """A low-rank probe on one screen, with its verdicts."""
    yield (
        f"step {found['step']:,}: ranks at ε = {found['epsilon']:g} "
        f"({found['images']} images for the unrolled inputs)"
    )
    yield (
        f"  {'matrix':<28} {'size':>12} {'rank':>6} {'of full':>8} {'entries saved':>14} "
        f"{'products to amortise':>22}"
    )
    for row in (found["kernel"], *found["matrices"]):
        name = f"{row['kind']} {row['layer']}"
        back = row["products_to_amortise"]
        yield (
            f"  {name[:28]:<28} {str(row['rows']) + '×' + str(row['columns']):>12} "
            f"{row['rank']:>6} {row['share']:>8.0%} {max(row['saving'], 0):>14.0%} "
            f"{'never' if back is None else format(back, ',.0f'):>22}"
        )
    yield from low_rank_verdict(found["claims"])


def low_rank_verdict(claims: Mapping[str, bool]) -> Iterator[str]:
    """The three claims of the literature, and whether they hold for this run."""
    texts = {
        "kernel_blocks_have_low_rank": "kernel blocks have a rank far below their size",
        "network_matrices_do_not": "the network's matrices do not (at least half of full rank)",
        "compression_is_not_earned_back_in_a_step": "compression does not pay for itself within one step",
    }
    for key, text in texts.items():
        yield f"  {'holds' if claims[key] else 'FAILS'}: {text}"


@contextmanager
def _restored(arguments: argparse.Namespace) -> Iterator[Restored]:
    folder = open_run(locate_run(arguments.run, arguments.storage), arguments.shards)

    from elastic_kfac.runs.checkpoints import restored

    device = device_of(folder)
    with restored(folder, step=arguments.checkpoint, epoch=arguments.epoch, device=device) as here:
        yield here


def _finish(arguments: argparse.Namespace, found: Mapping[str, Any], lines: Iterable[str]) -> int:
    from elastic_kfac.reports.analysis import figures
    from elastic_kfac.reports.run_page import write_report

    print("\n".join(lines))
    uri = locate_run(arguments.run, arguments.storage)
    folder, written = open_run(uri), [found["file"]]
    for name, text in figures(found).items():
        file = f"{found['file'].removesuffix('.json')}-{name}.svg"
        folder.storage.write(file, text.encode())
        written.append(file)
    write_report(uri)
    print(f"Written to {uri}: {', '.join(written)}, report.html")
    return 0


def _saddle(low: float, high: float) -> str:
    if high <= 0:
        return "  (no direction curves upwards)"
    share = max(0.0, -low) / high
    # Rounding and the stopping rule make the smallest eigenvalue of a minimum slightly negative.
    verdict = "a saddle" if share > 0.1 else "not a saddle"
    return f"  ({share:.1%} of the largest: {verdict})"


def _wrapped(title: str, text: str, width: int = 96) -> Iterator[str]:
    import textwrap

    yield from textwrap.wrap(
        text, width, initial_indent=f"{title:<22} ", subsequent_indent=" " * 23
    )


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _request(**values: Any) -> AnalysisConfig:
    from elastic_kfac.config import parse_config

    if values["samples"] == "all":
        values["samples"] = None
    return parse_config({"analysis": values}).analysis
