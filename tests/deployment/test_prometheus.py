"""A real Prometheus scrapes a real head during a real run: the panels show something."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deployment.test_dashboards import panels
from elastic_kfac.observability.metric_names import METRICS, metric
from support.metrics import prometheus_name
from support.ray_head import RayHead, free_ports, ray_head, until

ONLY_AFTER_A_CHANGE = ("downtime_s", "moment_s", "notice_s", "hand_over_s")
ONLY_IN_FP16 = ("loss_scale",)
ONLY_WITH_A_GROWING_BATCH = ("wanted_workers",)
ONLY_WITH_EIGENVALUES = (
    "hessian_eigenvalue",
    "kfac_eigenvalue",
    "eigenvalue_correlation",
    "hessian_time_s",
    "hessian_s",
)
ONLY_WITH_ATTACKS = ("eval_adversarial_loss", "eval_adversarial_accuracy")
ONLY_AFTER_A_MERGE = ("merged_workers", "merge_newton_rank", "merge_sigma")
ONLY_WITH_A_SLOW_RANK = ("slow_rank_factor",)
OF_RAY_AFTER_A_CHANGE = {"ray_train_worker_group_shutdown_total_time_s"}
MAY_BE_EMPTY = OF_RAY_AFTER_A_CHANGE | {
    prometheus_name(metric(name))
    for name in (
        *ONLY_AFTER_A_CHANGE,
        *ONLY_IN_FP16,
        *ONLY_WITH_A_GROWING_BATCH,
        *ONLY_WITH_EIGENVALUES,
        *ONLY_WITH_ATTACKS,
        *ONLY_AFTER_A_MERGE,
        *ONLY_WITH_A_SLOW_RANK,
    )
}


def asked() -> dict[str, str]:
    """Every expression of a panel, with Grafana's variables filled in."""
    found = {}
    for board, panel in panels():
        for target in panel["targets"]:
            text = target["expr"].replace("$run", ".*").replace("$__rate_interval", "30s")
            found[f"{board}: {panel['title']} ({target['refId']})"] = text
    return found


def must_have_data(expression: str) -> bool:
    return not any(name in expression for name in MAY_BE_EMPTY)


@contextmanager
def prometheus(head: RayHead, folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes a head every few seconds; gives its address."""
    tool = shutil.which("prometheus")
    assert tool, "this test needs prometheus 2.42 or newer (Debian: prometheus)"
    target = head.metrics.removeprefix("http://").removesuffix("/metrics")
    settings = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(settings), encoding="utf-8")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    process = subprocess.Popen(
        [
            tool,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'series'}",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(60)


def has_data(address: str, expression: str) -> bool:
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=10) as reply:
            answer = json.loads(reply.read())
    except urllib.error.HTTPError as error:
        pytest.fail(f"{expression}: {error.read().decode()}")
    except OSError:
        return False  # It is still starting.
    assert answer["status"] == "success", answer
    return bool(answer["data"]["result"])


@pytest.mark.tools
@pytest.mark.timeout(900)
def test_every_panel_of_a_run_shows_data(tmp_path: Path) -> None:
    wanted = {place: text for place, text in asked().items() if must_have_data(text)}
    empty = set(wanted)
    # What Ray says once is there for longer than from one scrape to the next.
    slower = {"RAY_metrics_report_interval_ms": "4000"}
    with ray_head(variables=slower) as head, prometheus(head, tmp_path) as address:
        job = head.submit(
            "jobs/train.py",
            *("jobs/configs/digits.yaml", "--storage", str(tmp_path), "--name", "scraped"),
            *("--set", f"data.shards={tmp_path}/digits", "--set", "train.epochs=100000"),
            *("--set", "elastic.checkpoint_interval_s=2"),
            options=("--no-wait", "--submission-id", "scraped"),
        )
        assert job.returncode == 0, job.stderr

        def all_shown() -> bool:
            empty.difference_update({p for p in empty if has_data(address, wanted[p])})
            return not empty

        until(all_shown, 420)
        # A scrape that a busy machine was too slow for leaves a gap until the next one.
        states = 'count(ray_kfac_train_run_state{run="scraped"}) == 5'
        assert empty or until(lambda: has_data(address, states), 60)
        head.ray("job", "stop", "scraped")
    assert empty == set()


def test_few_expressions_may_be_empty() -> None:
    names = {prometheus_name(entry) for entry in METRICS}
    assert names | OF_RAY_AFTER_A_CHANGE > MAY_BE_EMPTY
    excused = [place for place, text in asked().items() if not must_have_data(text)]
    assert len(excused) == len(MAY_BE_EMPTY)
