"""Preemption on a real head: SIGTERM as Kubernetes sends it, and a drain that is over too soon."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from elastic_kfac.observability.metric_names import metric
from elastic_kfac.runs.audit import audit_run
from support.head_run import PATIENCE_S, await_group, events, started_job
from support.metrics import prometheus_name
from support.ray_head import RayHead, joined_node, ray_head, until

NOTICE_S = 600
"""Plenty, so that a busy machine hands over in time as well."""


def value(head: RayHead, column: str) -> float | None:
    """The newest value of a run's metric, as Prometheus would read it."""
    name = re.escape(prometheus_name(metric(column)))
    found = re.search(rf'^{name}\{{[^}}]*run="run"[^}}]*\}} (\S+)$', head.scrape(), re.MULTILINE)
    return float(found[1]) if found else None


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_preempted_nodes_hand_over_and_a_notice_too_short_loses_no_committed_step(
    tmp_path: Path,
) -> None:
    with ray_head(num_cpus=1) as head:
        notice = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(NOTICE_S)}
        with joined_node(head, variables=notice) as node:
            folder = started_job(head, tmp_path)
            await_group(head, folder, 2)
            node.send_signal(signal.SIGTERM)
            # With nothing left to do the node goes by itself, long before its time is over.
            node.wait(timeout=PATIENCE_S)
        await_group(head, folder, 2, 1)

        (noticed,) = events(folder, "preemption")
        assert 0 < noticed["notice_s"] <= NOTICE_S
        (change,) = events(folder, "resize", "recovery")
        assert (change["kind"], change["steps_redone"]) == ("resize", 0)
        assert "being drained" in change["reason"]
        assert 0 <= change["hand_over_s"] < noticed["notice_s"]
        assert until(lambda: value(head, "preemptions") == 1, 60)
        assert value(head, "notice_s") == pytest.approx(noticed["notice_s"])
        # It ends later than the notice is given, and so it may be exported later.
        assert until(lambda: value(head, "hand_over_s") is not None, 60)
        assert value(head, "hand_over_s") == pytest.approx(change["hand_over_s"])
        assert value(head, "steps_redone") == 0

        with joined_node(head) as node:
            await_group(head, folder, 2, 1, 2)
            listed = head.ray("list", "nodes", "--format", "json", "--filter", "state=ALIVE")
            (node_id,) = (
                entry["node_id"]
                for entry in json.loads(listed.stdout[listed.stdout.index("[") :])
                if not entry["is_head_node"]
            )
            reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
            drained = head.ray(
                *("drain-node", "--address", head.address, "--node-id", node_id, *reason),
                *("--deadline-remaining-seconds", "1"),
            )
            assert drained.returncode == 0, drained.stdout + drained.stderr
            os.killpg(node.pid, signal.SIGKILL)
            await_group(head, folder, 2, 1, 2, 1)
        said = [line["message"] for line in head.log_of_actor("RunCoordinator(run)")]
        head.ray("job", "stop", "run")

    result = folder.result()
    assert result is not None
    assert (result["status"], result["world_sizes"]) == ("interrupted", [2, 1, 2, 1])
    # The dashboard shows states and changes with the run's actor.
    kinds = [line.partition(":")[0] for line in said]
    assert kinds.count("preemption") >= 1
    assert kinds.count("resize") + kinds.count("recovery") == 3
    # Whoever stays does not drain.
    assert {"starting", "running"} <= set(kinds)
    steps = [row["step"] for row in folder.metrics() if "loss" in row]
    assert steps == list(range(1, result["steps"] + 1))
    assert audit_run(folder).problems == ()
    last = events(folder, "resize", "recovery")[-1]
    print(f"handed over in {change['hand_over_s']} s of {noticed['notice_s']} s; too short: {last}")
