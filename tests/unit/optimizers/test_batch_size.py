"""Growth rules on scripted eigenvalues, against a second implementation of the published pseudo-code."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from elastic_kfac.errors import ConfigError, StateError
from elastic_kfac.optimizers.batch_size import (
    BatchDecision,
    BatchSizePolicy,
    HessianAdaptive,
    make_policy,
    wanted_workers,
)


def drive(policy: BatchSizePolicy, eigenvalues: list[float | None]) -> list[BatchDecision]:
    """The decision in force during each epoch."""
    seen = []
    for epoch, eigenvalue in enumerate(eigenvalues, start=1):
        seen.append(policy.at(epoch - 1))
        policy.end_epoch(epoch, eigenvalue)
    return seen


def pseudo_code(
    eigenvalues: list[float],
    *,
    b0: int,
    b_max: int,
    alpha: float,
    beta: float,
    kappa: int,
    gamma: float,
    omega: float,
    decay: set[int],
    rho: float,
) -> list[BatchDecision]:
    b, lr, gam = b0, 1.0, gamma
    reference, duration = None, 0
    seen = []
    for epoch, lam in enumerate(eigenvalues, start=1):
        seen.append(BatchDecision(b, lr, gam))

        def grow(b: int, lr: float, gam: float) -> tuple[int, float, float]:
            new = min(int(beta * b), b_max)
            return new, lr * new / b, 0.0 if new == b_max else gam / omega

        if b < b_max:
            duration += 1
            if reference is None:
                reference = lam
            elif lam <= reference / alpha:
                b, lr, gam = grow(b, lr, gam)
                reference, duration = lam, 0
            if duration >= kappa:
                b, lr, gam = grow(b, lr, gam)
                duration = 0
        if epoch in decay:
            lr *= rho
        if epoch >= len(eigenvalues) / 2:
            gam = 0.0
    return seen


@pytest.mark.parametrize("seed", range(30))
def test_absa_on_random_eigenvalues_follows_the_pseudo_code(seed: int) -> None:
    rng = random.Random(seed)
    eigenvalues = [10 * math.exp(rng.gauss(-0.15 * epoch, 0.4)) for epoch in range(40)]
    alpha, beta, kappa = rng.choice([1.5, 2.0, 4.0]), rng.choice([2, 3]), rng.choice([1, 3, 10])
    b_max = rng.choice([32, 200, 640, 5000, 10**9])
    expected = pseudo_code(
        eigenvalues,
        b0=32,
        b_max=b_max,
        alpha=alpha,
        beta=beta,
        kappa=kappa,
        gamma=0.2,
        omega=2.0,
        decay={10, 25},
        rho=0.2,
    )
    policy = make_policy(
        "absa",
        base_batch_size=32,
        max_batch_size=b_max,
        total_epochs=40,
        decay_epochs=(10, 25),
        eigenvalue_ratio=alpha,
        growth=beta,
        patience_epochs=kappa,
    )
    if b_max == 32:  # the pseudo-code never reaches "gam = 0 at the cap" when it starts there
        assert [d.batch_size for d in drive(policy, [*eigenvalues])] == [32] * 40
        return
    for ours, theirs in zip(drive(policy, [*eigenvalues]), expected, strict=True):
        assert ours.batch_size == theirs.batch_size
        assert ours.lr_multiplier == pytest.approx(theirs.lr_multiplier, rel=1e-12)
        assert ours.adversarial_fraction == pytest.approx(theirs.adversarial_fraction)


def test_abs_halving_eigenvalue_doubles_the_batch_each_epoch_up_to_the_cap() -> None:
    policy = make_policy("abs", base_batch_size=128, max_batch_size=1000)
    seen = drive(policy, [8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    assert [d.batch_size for d in seen] == [128, 128, 256, 512, 1000, 1000]
    assert not policy.needs_eigenvalue
    assert {d.lr_multiplier / d.batch_size for d in seen} == {1 / 128}


def test_abs_plateau_grows_after_the_duration_and_keeps_the_reference() -> None:
    policy = make_policy("abs", base_batch_size=8, max_batch_size=64, patience_epochs=3)
    assert isinstance(policy, HessianAdaptive)
    seen = drive(policy, [4.0] * 3 + [2.5, 2.0, 2.0, 2.0, 2.0])
    # Three epochs of 4.0 grow by duration; 2.5 is above half of the unchanged 4.0, 2.0 is not.
    assert [d.batch_size for d in seen] == [8, 8, 8, 16, 16, 32, 32, 32]
    assert policy.reference == 2.0


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_abs_epoch_without_eigenvalue_does_not_grow_but_counts(missing: float | None) -> None:
    policy = make_policy("abs", base_batch_size=8, max_batch_size=64, patience_epochs=3)
    assert isinstance(policy, HessianAdaptive)
    seen = drive(policy, [4.0, 4.0, missing, missing, 4.0, 4.0])
    assert [d.batch_size for d in seen] == [8, 8, 8, 8, 8, 16]
    assert (policy.missing, policy.reference) == (2, 4.0)


def test_abs_negative_eigenvalue_counts_by_size_and_is_noted() -> None:
    policy = make_policy("abs", base_batch_size=8, max_batch_size=64)
    assert isinstance(policy, HessianAdaptive)
    assert [d.batch_size for d in drive(policy, [4.0, -3.0, -2.0, 1.5])] == [8, 8, 8, 16]
    assert (policy.negative_curvature, policy.reference) == (2, 2.0)


def test_abs_zero_eigenvalue_is_flat() -> None:
    policy = make_policy("abs", base_batch_size=8, max_batch_size=64)
    assert [d.batch_size for d in drive(policy, [0.0, 0.0, 0.0])] == [8, 8, 16]


def test_abs_state_taken_at_any_epoch_continues_alike() -> None:
    eigenvalues: list[float | None] = [9.0, 5.0, 4.0, None, 4.0, 4.0, 1.0, 1.0, 0.4, -0.1]

    def fresh() -> BatchSizePolicy:
        return make_policy(
            "absa", base_batch_size=8, max_batch_size=256, total_epochs=30, patience_epochs=3
        )

    whole = fresh()
    expected = drive(whole, eigenvalues)
    for cut in range(len(eigenvalues)):
        first, second = fresh(), fresh()
        seen = drive(first, eigenvalues[:cut])
        second.load_state_dict(first.state_dict())
        for epoch in range(cut, len(eigenvalues)):
            seen.append(second.at(epoch))
            second.end_epoch(epoch + 1, eigenvalues[epoch])
            second.end_epoch(epoch + 1, 1e-9)  # told again after a restart: nothing happens
        assert seen == expected
        assert second.state_dict() == whole.state_dict()


def test_absa_fraction_halves_per_growth_and_ends_at_half_time_or_cap() -> None:
    policy = make_policy("absa", base_batch_size=8, max_batch_size=64, total_epochs=8)
    fractions = [d.adversarial_fraction for d in drive(policy, [8.0, 4.0, 4.0, 4.0, 4.0, 4.0])]
    assert fractions == [0.2, 0.2, 0.1, 0.1, 0.0, 0.0]
    policy = make_policy("absa", base_batch_size=8, max_batch_size=16, total_epochs=80)
    assert [d.adversarial_fraction for d in drive(policy, [8.0, 4.0, 4.0])] == [0.2, 0.2, 0.0]


def test_bl_keeps_rate_and_schedule_of_the_small_batch() -> None:
    policy = make_policy("bl", base_batch_size=32, max_batch_size=4096, decay_epochs=(2, 4))
    assert policy.at(1.99) == BatchDecision(4096, 1.0)
    assert policy.at(2.0) == BatchDecision(4096, 0.2)
    assert policy.at(9.0).lr_multiplier == pytest.approx(0.04)


def test_fb_ramps_from_one_to_the_batch_ratio_and_then_decays() -> None:
    policy = make_policy("fb", base_batch_size=32, max_batch_size=320, decay_epochs=(30,))
    multipliers = [policy.at(epoch).lr_multiplier for epoch in (0, 2.5, 5, 29, 30)]
    assert multipliers == pytest.approx([1, 5.5, 10, 10, 2])


def test_gg_grows_where_the_rate_would_decay_and_leaves_the_rest_to_the_rate() -> None:
    policy = make_policy("gg", base_batch_size=128, max_batch_size=10240, decay_epochs=(30, 60, 80))
    seen = [policy.at(epoch) for epoch in (0, 30, 60, 80)]
    assert [d.batch_size for d in seen] == [128, 640, 3200, 10240]
    # lr <- lr * rho * (b'/b), step by step.
    assert [d.lr_multiplier for d in seen] == pytest.approx([1, 1, 1, 0.2 * 10240 / 3200])


def test_warmup_keeps_rate_per_sample() -> None:
    policy = make_policy(
        "warmup", base_batch_size=64, max_batch_size=512, stages=((1, 128), (3, 512))
    )
    assert [policy.at(epoch).batch_size for epoch in (0, 1, 2.5, 3, 9)] == [64, 128, 128, 512, 512]
    assert policy.at(3).lr_multiplier == 8


@pytest.mark.parametrize(
    ("batch", "expected"), [(128, 1), (256, 1), (1024, 4), (1100, 4), (10**6, 6)]
)
def test_wanted_workers_follow_the_batch_between_the_limits(batch: int, expected: int) -> None:
    assert wanted_workers(batch, 256, max_workers=6) == expected


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("adaptive", {}, "bl, fb, gg, abs, absa"),
        ("abs", {"max_batch_size": 16}, "below the base batch"),
        ("abs", {"growth": 1.0}, "growth"),
        ("abs", {"growth": 1.01}, "leaves the base batch"),
        ("abs", {"eigenvalue_ratio": 0.5}, "eigenvalue_ratio"),
        ("abs", {"patience_epochs": 0}, "patience_epochs"),
        ("abs", {"adversarial_fraction": 0.1}, "use absa"),
        ("absa", {"adversarial_fraction": 1.5}, "0 to 1"),
        ("gg", {"stages": ()}, "do not fit"),
        ("gg", {"decay_factor": 0.0}, "decay_factor"),
        ("warmup", {"stages": ((0, 64), (2, 48))}, "never fall"),
    ],
)
def test_bad_policies_say_what_is_allowed(name: str, changes: dict[str, Any], says: str) -> None:
    options: dict[str, Any] = {"base_batch_size": 32, "max_batch_size": 512, **changes}
    with pytest.raises(ConfigError, match=says):
        make_policy(name, **options)


def test_state_of_another_policy_is_refused() -> None:
    policy = make_policy("abs", base_batch_size=32, max_batch_size=64)
    with pytest.raises(StateError, match="not the state"):
        policy.load_state_dict({"batch_size": 32})
    with pytest.raises(StateError, match="gg has no state"):
        make_policy("gg", base_batch_size=32, max_batch_size=64).load_state_dict({"batch_size": 1})
    saved = make_policy("abs", base_batch_size=128, max_batch_size=256).state_dict()
    with pytest.raises(StateError, match="32 to 64"):
        policy.load_state_dict(saved)
