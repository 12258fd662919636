"""Rules between keys, values out of range, and removed keys: each is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.config.reader import REMOVED
from elastic_kfac.config.run import RULES
from elastic_kfac.errors import ConfigError

LOCAL = {"kfac.enabled": False}
ABS = {"batch.policy": "abs", "batch.max_batch_size": 64, "train.global_batch_size": 32}
ABSA = {**ABS, "batch.policy": "absa", "adversarial.attack": "fgsm"}
VELOCITY = {"optimizer.name": "velocity_sgd", "optimizer.momentum_rule": "ratio0"}
POOL: dict[str, Any] = {"plan.decomposers": 1, "kfac.stagger": True}
BROKEN: list[tuple[str, dict[str, Any]]] = [
    (
        "train.sync_batch_norm_group needs train.sync_batch_norm=true",
        {"train.sync_batch_norm_group": 2},
    ),
    (
        "train.target_accuracy is short for train.target",
        {"train.target_accuracy": 0.5, "train.target": {"metric": "loss", "value": 1.0}},
    ),
    (
        "task.name other than classification needs train.loss=cross_entropy",
        {"task.name": "own:Task", "train.loss": "mse"},
    ),
    (
        "task.name other than classification needs train.label_smoothing=0",
        {"task.name": "own:Task", "train.label_smoothing": 0.1},
    ),
    (
        "task.name other than classification needs mixing.mixup=none",
        {"task.name": "own:Task", "mixing.mixup": "running"},
    ),
    (
        "optimizer.nesterov=true needs optimizer.momentum > 0",
        {"optimizer.nesterov": True, "optimizer.momentum": 0},
    ),
    (
        "optimizer.nesterov=true needs optimizer.name=sgd or sharded_kfac",
        {"optimizer.nesterov": True, "optimizer.name": "lars"},
    ),
    (
        "optimizer.momentum_rule other than constant needs optimizer.name=velocity_sgd or sharded_kfac",
        {"optimizer.momentum_rule": "ratio0"},
    ),
    (
        "optimizer.momentum_rule other than constant needs sharded.gather=weights",
        {**VELOCITY, "sharded.gather": "gradients"},
    ),
    (
        "optimizer.momentum_rule other than constant needs batch.policy=constant",
        {**VELOCITY, "batch.policy": "bl", "batch.max_batch_size": 256},
    ),
    (
        "optimizer.momentum_rule other than constant needs elastic.batch_policy=keep_global or abs",
        {**VELOCITY, "elastic.batch_policy": "keep_local"},
    ),
    (
        "kfac.overlap_reduction=true needs elastic.reproducible=false",
        {"kfac.overlap_reduction": True, "elastic.reproducible": True},
    ),
    (
        "kfac.overlap_reduction=true needs optimizer.name other than sharded_kfac",
        {"kfac.overlap_reduction": True, "optimizer.name": "sharded_kfac"},
    ),
    (
        "optimizer.name=sharded_kfac needs train.precision=fp32 or bf16",
        {"optimizer.name": "sharded_kfac", "train.precision": "fp16"},
    ),
    (
        "communication.algorithm other than native needs communication.wire_format=fp32",
        {"communication.algorithm": "ring", "communication.wire_format": "int8"},
    ),
    (
        "elastic.batch_policy=abs needs batch.policy=gg, abs, absa or warmup",
        {"elastic.batch_policy": "abs"},
    ),
    ("batch.policy other than constant needs batch.max_batch_size", {"batch.policy": "abs"}),
    (
        "batch.policy other than constant needs elastic.batch_policy=keep_global or abs",
        {**ABS, "elastic.batch_policy": "keep_local"},
    ),
    ("batch.policy=gg needs optimizer.lr_schedule=step", {**ABS, "batch.policy": "gg"}),
    (
        "batch.policy=gg needs optimizer.decay_epochs",
        {**ABS, "batch.policy": "gg", "optimizer.lr_schedule": "step"},
    ),
    (
        "batch.policy=fb needs optimizer.warmup_epochs=0",
        {**ABS, "batch.policy": "fb", "optimizer.warmup_epochs": 1},
    ),
    ("batch.policy=abs needs adversarial.attack=none", {**ABS, "adversarial.attack": "fgsm"}),
    (
        "batch.policy=absa needs adversarial.attack other than none",
        {**ABSA, "adversarial.attack": "none"},
    ),
    ("batch.policy=absa needs adversarial.fraction > 0", {**ABSA, "adversarial.fraction": 0}),
    (
        "adversarial.attack=fgsm needs adversarial.steps=1",
        {"adversarial.attack": "fgsm", "adversarial.steps": 3},
    ),
    (
        "adversarial.eval_attack=fgsm needs adversarial.eval_steps=1",
        {"adversarial.eval_attack": "fgsm", "adversarial.eval_steps": 3},
    ),
    *(
        (f"{mode} needs {need}", {**LOCAL, **on, **change})
        for mode, on in (
            ("elastic.merge=distnewton", {"elastic.merge": "distnewton"}),
            ("elastic.merge_every_steps > 1", {"elastic.merge_every_steps": 4}),
        )
        for need, change in (
            ("kfac.enabled=false", {"kfac.enabled": True}),
            ("optimizer.name other than sharded_kfac", {"optimizer.name": "sharded_kfac"}),
            ("train.precision=fp32 or bf16", {"train.precision": "fp16"}),
            ("train.sync_batch_norm=false", {"train.sync_batch_norm": True}),
            ("communication.algorithm=native", {"communication.algorithm": "ring"}),
            ("communication.wire_format=fp32", {"communication.wire_format": "int8"}),
        )
    ),
    *(
        (f"elastic.reproducible=true needs {need}", {"elastic.reproducible": True, **change})
        for need, change in (
            ("optimizer.name other than sharded_kfac", {"optimizer.name": "sharded_kfac"}),
            ("communication.algorithm=native", {"communication.algorithm": "ring"}),
            ("communication.wire_format=fp32", {"communication.wire_format": "int8"}),
            ("elastic.batch_policy=keep_global or abs", {"elastic.batch_policy": "keep_local"}),
            ("elastic.merge=average", {"elastic.merge": "distnewton", **LOCAL}),
            ("elastic.merge_every_steps=1", {"elastic.merge_every_steps": 4, **LOCAL}),
            ("batch.policy=constant, bl, fb, gg or warmup", ABS),
            ("adversarial.attack=none", {"adversarial.attack": "l2"}),
            ("mixing.mixup=none", {"mixing.mixup": "running"}),
            ("train.sync_batch_norm=false", {"train.sync_batch_norm": True}),
            ("elastic.max_workers of at most", {"elastic.max_workers": 9}),
            (
                "train.micro_batch_size of a whole",
                {"train.global_batch_size": 20, "train.micro_batch_size": 2},
            ),
        )
    ),
    ("train.micro_batch_size must be at most", {"train.micro_batch_size": 129}),
    ("elastic.min_workers must be at most elastic.max_workers", {"elastic.min_workers": 3}),
    ("elastic.logical_shards must be a power of two", {"elastic.logical_shards": 6}),
    (
        "optimizer.decay_start_epoch must be before",
        {"optimizer.lr_schedule": "polynomial", "optimizer.decay_start_epoch": 10},
    ),
    ("batch.max_batch_size must be at least", {**ABS, "batch.max_batch_size": 16}),
    (
        "batch.policy=warmup needs batch.stages",
        {**ABS, "batch.policy": "warmup", "batch.stages": ((1, 48), (2, 40))},
    ),
    ("batch.growth must enlarge", {**ABS, "batch.growth": 1.01}),
    ("batch.eigenvalue=kfac needs kfac.enabled=true", {**ABS, **LOCAL, "batch.eigenvalue": "kfac"}),
    (
        "batch.eigenvalue=kfac needs kfac.method other than one_sided",
        {**ABS, "batch.eigenvalue": "kfac", "kfac.method": "one_sided"},
    ),
    ("plan.retune=true needs kfac.enabled", {"plan.retune": True, "kfac.enabled": False}),
    ("plan.retune=true needs kfac.refresh", {"plan.retune": True, "kfac.refresh": "adaptive"}),
    (
        "plan.retune=true needs elastic.reproducible=false",
        {"plan.retune": True, "elastic.reproducible": True},
    ),
    ("plan.unequal_shares=true needs plan.calibrate", {"plan.unequal_shares": True}),
    (
        "plan.unequal_shares=true needs kfac.enabled",
        {"plan.unequal_shares": True, "plan.calibrate": True, "kfac.enabled": False},
    ),
    (
        "elastic.rebalance=true needs elastic.slow_factor",
        {"elastic.rebalance": True, "elastic.slow_factor": None},
    ),
    (
        "elastic.rebalance=true needs elastic.merge=average",
        {"elastic.rebalance": True, "elastic.merge": "distnewton", "kfac.enabled": False},
    ),
    (
        "elastic.rebalance=true needs elastic.merge_every_steps=1",
        {"elastic.rebalance": True, "elastic.merge_every_steps": 2, "kfac.enabled": False},
    ),
    (
        "elastic.rebalance=true needs mixing.mixup=none",
        {"elastic.rebalance": True, "mixing.mixup": "running"},
    ),
    (
        "kfac.momentum > 0 needs optimizer.momentum=0",
        {"kfac.momentum": 0.9, "optimizer.momentum": 0.9},
    ),
    ("plan.decomposers > 0 needs kfac.stagger=true", {"plan.decomposers": 1}),
    (
        "plan.decomposers > 0 needs kfac.enabled=true",
        {**POOL, "kfac.enabled": False},
    ),
    (
        "plan.decomposers needs statistics in some steps only",
        {**POOL, "kfac.factor_update_steps": 1},
    ),
    ("adversarial.data_range must be [low, high]", {"adversarial.data_range": (1.0, 0.0)}),
    (
        "the radius of fgsm and pgd must be at most",
        {
            "adversarial.attack": "fgsm",
            "adversarial.radius": 2.0,
            "adversarial.data_range": (0.0, 1.0),
        },
    ),
    (
        "optimizer.clip_grad_norm needs elastic.merge_every_steps=1",
        {"optimizer.clip_grad_norm": 1.0, "elastic.merge_every_steps": 2},
    ),
    (
        "optimizer.clip_grad_norm needs elastic.merge=average",
        {"optimizer.clip_grad_norm": 1.0, "elastic.merge": "distnewton"},
    ),
    (
        "optimizer.clip_grad_norm needs optimizer.name other than sharded_kfac",
        {"optimizer.clip_grad_norm": 1.0, "optimizer.name": "sharded_kfac"},
    ),
    (
        "optimizer.average_decay needs elastic.merge_every_steps=1",
        {"optimizer.average_decay": 0.9, "elastic.merge_every_steps": 2},
    ),
    (
        "optimizer.average_decay needs elastic.merge=average",
        {"optimizer.average_decay": 0.9, "elastic.merge": "distnewton"},
    ),
    (
        "optimizer.average_decay needs optimizer.name other than sharded_kfac",
        {"optimizer.average_decay": 0.9, "optimizer.name": "sharded_kfac"},
    ),
    (
        "kfac.damping with rule: levenberg_marquardt compares",
        {
            "optimizer.clip_grad_norm": 1.0,
            "kfac.damping": {"rule": "levenberg_marquardt", "initial": 0.1},
        },
    ),
    ("GPU in resources.per_worker needs", {"resources.per_worker": {"GPU": 1}}),
]


def configured(changes: dict[str, Any]) -> Config:
    return parse_config(apply_overrides({}, list(changes.items())))


@pytest.mark.parametrize(("text", "changes"), BROKEN)
def test_broken_rule_is_one_line_with_the_given_values(text: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(changes)
    line = refused.value.line()
    assert line.startswith(text) and "\n" not in line
    rule = next(rule for rule in RULES if rule.text.startswith(text))
    assert all(f"{key}=" in line.partition("given: ")[2] for key in rule.keys)


def test_every_rule_has_an_example_above() -> None:
    assert [r.text for r in RULES if not any(r.text.startswith(text) for text, _ in BROKEN)] == []


@pytest.mark.parametrize("stages", [(), ((2, 40), (1, 48)), ((1, 65),)])
def test_warmup_stages_out_of_order_or_above_the_maximum_are_refused(stages: object) -> None:
    with pytest.raises(ConfigError, match=r"batch\.stages"):
        configured({**ABS, "batch.policy": "warmup", "batch.stages": stages})


@pytest.mark.parametrize(
    "changes",
    [
        {"elastic.max_workers": 8, "elastic.reproducible": True},
        {"elastic.reproducible": True, "batch.policy": "bl", "batch.max_batch_size": 256},
        {"train.global_batch_size": 20, "train.micro_batch_size": 3, "elastic.reproducible": True},
        {**ABS, "elastic.batch_policy": "abs"},
        {**ABSA, "adversarial.steps": 1},
        {**VELOCITY},
        {**LOCAL, "elastic.merge": "distnewton"},
        {"optimizer.decay_start_epoch": 10},
        {"train.seed": 2**63 - 1, "train.epochs": 1e30},
    ],
)
def test_settings_at_the_edge_of_the_rules_are_accepted(changes: dict[str, Any]) -> None:
    configured(changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"kfac.damping": 0}, "bad value for kfac.damping; given: 0; allowed: greater than 0"),
        (
            {"mixing.alpha": 1.5},
            "bad value for mixing.alpha; given: 1.5; allowed: less than or equal to 1",
        ),
        (
            {"train.epochs": None},
            "bad value for train.epochs; given: null; allowed: a valid number",
        ),
        (
            {"batch.policy": "adabatch"},
            "bad value for batch.policy; given: 'adabatch'; allowed: 'constant', 'bl'",
        ),
        (
            {"kfac.grad_worker_frac": 3},
            "bad value for kfac.grad_worker_frac; given: 3; allowed: less than or equal to 1 or 'auto'",
        ),
        (
            {"kfac.kl_clip": -1, "kfac.damping": -1},
            "bad value for kfac.damping (and 1 more); given: -1; allowed: greater than 0",
        ),
        (
            {"optimizer.decay_epochs": [1, "x"]},
            "bad value for optimizer.decay_epochs.1; given: 'x'",
        ),
        (
            {"train.seed": 2**63},
            f"bad value for train.seed; given: {2**63}; allowed: whole numbers up to {2**63 - 1}",
        ),
        ({"kfac.dampin": 1}, "unknown key kfac.dampin in the configuration; allowed: bn_"),
        ({"kfca.damping": 1}, "unknown key kfca in the configuration; allowed: adversarial"),
    ],
)
def test_bad_value_or_key_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(changes)
    assert refused.value.line().startswith(line)


def test_misspelt_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean kfac\?"):
        configured({"kfca.damping": 1})
    with pytest.raises(ConfigError, match=r"did you mean optimizer.clip_grad_norm\?"):
        configured({"train.clip_grad_norm": 1.0})


@pytest.mark.parametrize("key", REMOVED)
def test_removed_key_is_refused_with_what_to_do(key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured({key: 1})
    assert refused.value.line() == f"{key} has been removed; {REMOVED[key]}"


@pytest.mark.parametrize(
    ("base", "value", "rule"),
    [
        ({}, 1e-3, "fixed"),  # the field's default, and yet given
        ({}, None, "none"),
        ({"kl_clip": 1e-4}, None, "none"),
        ({"kl_clip": None}, 1e-2, "fixed"),
    ],
)
def test_a_clip_given_over_a_complete_configuration_decides_the_bound(
    base: dict[str, Any], value: float | None, rule: str
) -> None:
    complete = parse_config({"kfac": base}).model_dump(mode="json")
    kfac = parse_config(apply_overrides(complete, [("kfac.kl_clip", value)])).kfac
    assert (kfac.trust_region, kfac.kl_clip) == (rule, value)
    again = parse_config(parse_config({"kfac": base}).model_dump(mode="json")).kfac
    assert again == parse_config({"kfac": base}).kfac


@pytest.mark.parametrize(
    ("given", "momentum"),
    [
        ({}, 0.7),
        ({"optimizer.name": "sharded_kfac"}, 0.7),
        ({"optimizer.momentum": 0.9}, 0.9),
        ({"kfac.enabled": False}, 0.9),
        ({"kfac.kl_clip": 1e-3}, 0.9),
        ({"optimizer.name": "adamw"}, 0.9),
    ],
)
def test_momentum_that_is_not_given_depends_on_what_it_stands_behind(
    given: dict[str, Any], momentum: float
) -> None:
    config = parse_config(apply_overrides({}, [*given.items()]))
    assert config.optimizer.momentum == momentum
    assert parse_config(config.model_dump(mode="json")) == config
    # Other values in its place find their own.
    other = apply_overrides(config.to_change(), [("optimizer.name", "lamb")])
    assert parse_config(other).optimizer.momentum == 0.9
