"""Ray's token authentication: who has no token is told so in one line, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray.exceptions import AuthenticationError

from elastic_kfac.cluster.connection import connect
from elastic_kfac.cluster.local_cluster import authentication_mode
from elastic_kfac.errors import UsageError

TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a token, and an environment that says nothing of one."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_local_cluster_asks_for_a_token_only_where_the_user_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert authentication_mode() == "disabled"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert authentication_mode() == "disabled"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert authentication_mode() == "token"


def test_local_cluster_without_the_token_it_should_ask_for_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UsageError, match=r"no token .* given: RAY_AUTH_MODE=token; .*generate"):
        authentication_mode()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    assert authentication_mode() == "token"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (AuthenticationError("Token auth is on but there is none"), "asks for a token"),
        (RuntimeError("rpc failed: Unauthenticated: InvalidAuthToken"), "asks for a token"),
        (RuntimeError("Version mismatch"), "cannot connect to a Ray cluster: Version mismatch"),
    ],
)
def test_refused_connection_is_one_line(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UsageError, match=says) as caught:
        connect("auto")
    assert "\n" not in caught.value.line()
