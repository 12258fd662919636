"""`make audit` with the real pip-audit: against a service of our own, and against none."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from support.ray_head import ROOT, free_ports

ADVISORY = {
    "id": "PYSEC-0000-1",
    "modified": "2026-01-01T00:00:00Z",
    "summary": "made up for this test",
    "affected": [
        {
            "package": {"name": "ray", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}


class Osv(BaseHTTPRequestHandler):
    """Answers as the OSV service does; one package has an advisory."""

    asked: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.asked.add(name)
        body = json.dumps({"vulns": [ADVISORY]} if name == "ray" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return None


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
    server.shutdown()
    server.server_close()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "audit", f"AUDIT_OPTIONS=--service osv --osv-url {url}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.tools
@pytest.mark.timeout(900)
def test_audit_asks_about_every_pin_and_names_what_is_found(service: str) -> None:
    done = audit(service)
    assert "ray 2.60.0: PYSEC-0000-1, fixed in 99.0: made up for this test" in done.stdout, done
    pinned = Path(ROOT / "constraints.txt").read_text(encoding="utf-8").count("==")
    assert f"{pinned} of {pinned} pinned versions audited by osv: 1 known" in done.stdout
    assert len(Osv.asked) == pinned
    assert done.returncode != 0


@pytest.mark.tools
@pytest.mark.timeout(900)
def test_audit_without_a_service_says_so_in_one_line() -> None:
    done = audit(f"http://127.0.0.1:{free_ports(1)[0]}/v1/query")
    assert done.returncode != 0
    assert "osv gives no answer here" in done.stderr
    assert "nothing was audited" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
