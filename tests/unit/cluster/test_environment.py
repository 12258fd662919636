from __future__ import annotations

import os

import pytest

from elastic_kfac.cluster.ray.connection import environment


@pytest.mark.parametrize(("user_wins", "inside"), [(False, "ours"), (True, "theirs")])
def test_environment_is_put_back_and_who_wins_is_the_callers_choice(
    monkeypatch: pytest.MonkeyPatch, user_wins: bool, inside: str
) -> None:
    monkeypatch.setenv("ELASTIC_KFAC_SET", "theirs")
    monkeypatch.delenv("ELASTIC_KFAC_UNSET", raising=False)
    names = ("ELASTIC_KFAC_SET", "ELASTIC_KFAC_UNSET")
    with (
        pytest.raises(ZeroDivisionError),
        environment(dict.fromkeys(names, "ours"), user_wins=user_wins),
    ):
        assert [os.environ[name] for name in names] == [inside, "ours"]
        raise ZeroDivisionError
    assert [os.environ.get(name) for name in names] == ["theirs", None]
