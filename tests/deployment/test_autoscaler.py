"""Ray's own autoscaler makes the nodes that a run asks for, and replaces one that is lost."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.run_folder import RunFolder
from support.head_run import PATIENCE_S, events, steps_on
from support.ray_head import ROOT, SCRIPTS, RayHead, ray_head, until

CHANGES = ("start", "resize", "recovery")


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_autoscaler_makes_the_nodes_of_a_run_and_replaces_a_lost_one(tmp_path: Path) -> None:
    log = tmp_path / "driver.log"
    folder = RunFolder(tmp_path / "run")
    with ray_head(num_cpus=0, autoscaled_nodes=2) as head:
        command = [
            *(str(SCRIPTS / "elastic-kfac"), "train", "jobs/configs/digits.yaml"),
            *("--address", head.address, "--storage", str(tmp_path), "--name", "run"),
            *("--set", f"data.shards={tmp_path}/digits", "--set", "train.epochs=100000"),
        ]
        assert len(raylets_of(head)) == 1
        with log.open("wb") as output:
            driver = subprocess.Popen(
                command, cwd=ROOT, env=dict(head.environment), stdout=output, stderr=output
            )
        try:
            # The first node may be there before the second.
            whole = until(lambda: steps_on(folder, 2) or steps_on(folder, 1, 2), PATIENCE_S)
            assert whole, log.read_text()
            before = events(folder, *CHANGES)
            nodes = raylets_of(head)
            assert len(nodes) == 3
            # The newest; the head's is the first.
            os.kill(nodes[-1], signal.SIGKILL)
            again = until(lambda: grown_again(folder, since=len(before)), PATIENCE_S)
            assert again, log.read_text()
        finally:
            driver.send_signal(signal.SIGINT)
            code = driver.wait(PATIENCE_S)
    assert code == 130, log.read_text()
    changes = events(folder, *CHANGES)[len(before) :]
    # The other node may be there before the run goes on, or after.
    sizes = [(row["kind"], row["to_world_size"]) for row in changes]
    assert sizes in ([("recovery", 2)], [("recovery", 1), ("resize", 2)])
    assert {row["steps_redone"] for row in changes} == {0}
    assert audit_run(folder).problems == ()


def grown_again(folder: RunFolder, *, since: int) -> bool:
    """Whether, after so many changes, a group was lost and one of two workers steps."""
    rows = events(folder, *CHANGES)[since:]
    return bool(rows) and rows[-1]["to_world_size"] == 2


def raylets_of(head: RayHead) -> list[int]:
    """The processes of this head's nodes, the oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"/raylet") and f"--gcs-address={head.address}".encode() in words:
                found.append(int(entry.name))
    return sorted(found)
