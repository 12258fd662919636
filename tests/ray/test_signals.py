"""What Ctrl-C does to the driver."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from elastic_kfac.cluster.ray.connection import kept_signal_handlers
from elastic_kfac.runs.signals import StopSignals


def test_stop_signals_before_anything_runs_end_at_once() -> None:
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_stop_signals_deferred_note_two_and_end_at_the_third() -> None:
    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_signals_take_a_closed_terminal_as_a_request_except_under_nohup() -> None:
    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.reason == "SIGHUP"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_started_beside_a_cluster_outlive_a_closed_terminal() -> None:
    with StopSignals() as signals:
        signals.defer()
        with kept_signal_handlers(), subprocess.Popen(["sleep", "600"]) as child:
            child.send_signal(signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.5)
            child.kill()
        assert signals.reason == "SIGHUP"


def test_stop_signals_leave_the_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_kept_signal_handlers_undo_what_a_library_installs() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with kept_signal_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before
