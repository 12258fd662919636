"""The result of a run in words: one sentence, and one screen for the terminal."""

from __future__ import annotations

from elastic_kfac.observability.quality import is_worse, quality_of, shown_quality, worded
from elastic_kfac.runs.history import Row, Run, number


def headline(run: Run) -> str:
    """One sentence: what was reached, how fast, on how many workers, at what cost."""
    parts = [_outcome(run)]
    sizes = " → ".join(map(str, run.world_sizes))
    if sizes:
        workers = "worker" if sizes == "1" else "workers"
        parts.append(f"on {sizes} {workers}")
    sentence = " ".join(parts)
    if run.events and len(run.world_sizes) > 1:
        count = len(run.world_sizes) - 1
        changes = "1 change" if count == 1 else f"{count} changes"
        redone = _count(run.steps_redone, "step was redone", "steps were redone")
        sentence += f"; {changes} of the world size cost {duration(run.downtime_s)}, {redone}"
    return sentence + "."


def _outcome(run: Run) -> str:
    best, target, reached = run.best_value, run.target_value, run.time_to_target_s
    name = run.metric
    words = "" if best is None else worded(name, best)
    if run.result is None:
        text = f"Running or crashed: step {run.last_step:,} after {duration(run.wall_time_s)}"
        return text + (f", {words} so far" if words else "")
    if run.result.get("error"):
        return f"Failed at step {run.last_step:,} ({str(run.result['error']).rstrip('.')})"
    if not run.finished:
        return f"Ended as “{run.result.get('status', 'unknown')}” at step {run.last_step:,}" + (
            f" with {words}" if words else ""
        )
    if run.divergence is not None:
        begin, end = run.divergence
        text = (
            f"Diverged: the training loss is {end:.4g} at the end and was {begin:.4g} at the start"
        )
        if best is None:
            return text
        label = quality_of(name).label
        return text + f" (best test {label} {shown_quality(name, best)} on the way)"
    if best is None:
        return f"Finished {run.last_step:,} steps in {duration(run.wall_time_s)}"
    last, shown = run.last_value, shown_quality(name, best)
    fell = (
        last is not None
        and is_worse(last, best, run.direction)
        and shown_quality(name, last) != shown
    )
    ended = f", but ended at {shown_quality(name, last)}" if fell and last is not None else ""
    if target is None:
        return f"Reached {words} in {duration(run.wall_time_s)}{ended}"
    if reached is None:
        return f"Missed the target of {worded(name, target)} with {shown}{ended}"
    ended = f", at the end {shown_quality(name, last)}" if fell and last is not None else ""
    if last is not None and is_worse(last, target, run.direction):
        ended += ", below the target" if run.direction == "max" else ", above the target"
    return f"Reached {worded(name, target)} in {duration(reached)} (best {shown}{ended})"


def advice(run: Run) -> str:
    """Which settings to change in a run that diverged."""
    kfac = run.config.get("kfac", {})
    if not kfac.get("enabled", True):
        return "lower optimizer.lr"
    if kfac.get("trust_region") == "adaptive":
        return "raise kfac.damping tenfold; kfac.trust_region=adaptive makes optimizer.lr matter little"
    return (
        "leave out kfac.kl_clip (kfac.trust_region=adaptive), or lower optimizer.lr and kfac.kl_clip "
        "and raise kfac.damping, tenfold each"
    )


def clip_text(run: Run) -> str:
    """What the bound on steps did to the learning rate; empty where that is nothing to change."""
    # Of all attempts: `clipped_share` counts since the last start of the process. Of a step that was made
    # twice the second counts.
    found = {row["step"]: number(row, "kl_clip_scale") for row in run.steps if "step" in row}
    scales = sorted(scale for scale in found.values() if scale is not None)
    if not scales:
        return ""
    part = sum(scale < 1.0 for scale in scales) / len(scales)
    logged = "" if len(scales) == run.last_step else f" {len(scales):,} logged"
    share = f"{part:.0%} of the{logged} steps were shortened"
    if run.config.get("kfac", {}).get("trust_region") != "fixed" or part < 0.95:
        return share
    if scales[len(scales) // 2] < 0.01:
        return (
            share + ", most of them more than 100 times: lower optimizer.lr or raise kfac.damping"
        )
    return share + ", so that optimizer.lr had no effect: lower it or raise kfac.kl_clip"


def summary_text(run: Run) -> str:
    """The end of a run on one screen."""
    result = run.result or {}
    epochs = number(result, "epochs")
    lines = [headline(run), ""]
    steps = f"{run.last_step:,}"
    if epochs is not None:
        steps += f" ({epochs:g} epochs, {int(number(result, 'samples_committed') or 0):,} samples)"
    lines.append(f"  steps       {steps}")
    lines.append(
        f"  time        {duration(run.wall_time_s)}"
        + (f", of which {duration(run.downtime_s)} without steps" if run.downtime_s else "")
    )
    for pause in run.pauses:
        away = (
            "" if pause.away_s is None else f" after {duration(pause.away_s)}, which no time counts"
        )
        lines.append(f"  continued   at step {pause.step:,}{away}")
    for event in run.changes[:8]:
        lines.append("  " + describe_event(event))
    if len(run.changes) > 8:
        lines.append(f"  … and {len(run.changes) - 8} more in events.jsonl")
    if clip := clip_text(run):
        lines.append(f"  clip        {clip}")
    if run.divergence is not None:
        lines.append(f"  change      {advice(run)}")
    if result.get("final_state_sha256"):
        lines.append(f"  state       sha256 {result['final_state_sha256']}")
    return "\n".join(lines)


def describe_event(event: Row) -> str:
    """One event as one line of text."""
    before, after = event.get("from_world_size"), event.get("to_world_size")
    sizes = f" {before} → {after}" if before is not None and after is not None else ""
    line = f"{event.get('kind', 'event')!s:<11} step {event.get('step', '?')}:{sizes}"
    if event.get("reason"):
        line += f" ({event['reason']})"
    if (downtime := number(event, "downtime_s")) is not None:
        line += f", {duration(downtime)} without steps"
    if (redone := number(event, "steps_redone")) is not None:
        line += f", {_count(int(redone), 'step redone', 'steps redone')}"
    if moved := moved_text(event):
        line += f", {moved}"
    return line


def moved_text(event: Row) -> str:
    """How ranks got the state after a change: `state kept, 1.2 MiB moved`; empty if not recorded."""
    moved = number(event, "moved_bytes")
    if moved is None:
        return ""
    way = "kept" if event.get("way") == "resize" else "restored"
    return f"state {way}, {moved / 2**20:,.1f} MiB moved"


def duration(seconds: float) -> str:
    """Seconds as people read them: `0.41 s`, `12.3 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _count(count: int, one: str, many: str) -> str:
    return f"{'no' if count == 0 else f'{count:,}'} {one if count <= 1 else many}"
