"""Options of KFAC mean the same with pydantic and without it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import numpy
import pytest

from elastic_kfac.config import stand_in
from elastic_kfac.errors import ConfigError
from elastic_kfac.kfac.options import make_options, value_at
from support.house import ROOT

CASES = (
    "dict()",
    "dict(damping=0.1, factor_update_steps=2, inverse_update_steps=4)",
    "dict(damping=1, kl_clip=None, bucket_mib=True)",
    "dict(damping='0.01', inverse_update_steps='20', colocate='off')",
    "dict(inverse_update_steps=20.0, grad_worker_frac='auto', stagger=True, precompute=1)",
    "dict(inverse_update_steps=7)",
    "dict(skip_layers=['head', 'x.*'], memory_budget_bytes=1e9, max_factor_dim=None)",
    "dict(damping={'schedule': 'warmup', 'start': 1.0, 'target': 0.1, 'steps': 10})",
    "dict(damping={'rule': 'levenberg_marquardt', 'initial': 0.5})",
    "dict(factor_decay={'schedule': 'milestones', 'start': 0.9, 'factor': 0.5, 'milestones': [3]})",
    "dict(damping=len)",
    "dict(factor_scale='kaisa')",
    "dict(damping=0)",
    "dict(damping=-1.5)",
    "dict(damping='much')",
    "dict(damping=float('nan'))",
    "dict(damping=None)",
    "dict(damping=[1])",
    "dict(damping={'schedule': 'other'})",
    "dict(damping={'schedule': 'warmup', 'start': 1.0})",
    "dict(damping={'rule': 'levenberg_marquardt', 'initial': 1e9})",
    "dict(factor_decay=1.0)",
    "dict(inverse_update_steps=0)",
    "dict(inverse_update_steps=2.5)",
    "dict(inverse_update_steps='often')",
    "dict(inverse_update_steps=2**70)",
    "dict(max_factor_dim=0)",
    "dict(max_factor_dim='wide')",
    "dict(grad_worker_frac=1.5)",
    "dict(grad_worker_frac='half')",
    "dict(method='newton')",
    "dict(method=3)",
    "dict(loss_reduction='max')",
    "dict(stagger='maybe')",
    "dict(colocate=2)",
    "dict(skip_layers='head')",
    "dict(skip_layers=[1])",
    "dict(precompute=True, method='inverse')",
    "dict(method='ekfac', loss_reduction='sum')",
    "dict(trust_region='adaptive', kl_clip=0.5)",
    "dict(factor_rank=8, stagger=True, refresh='adaptive')",
    "dict(dampng=0.1)",
)
ANSWERS = """
import json, sys
if sys.argv[1] == "without":
    for name in ("pydantic", "numpy", "yaml", "annotated_types", "packaging"):
        sys.modules[name] = None
from elastic_kfac.config import kfac, section
assert (section.BaseModel.__module__ == "elastic_kfac.config.stand_in") == (sys.argv[1] == "without")
fields = kfac.ScriptOptions.model_fields
answers = []
for case in json.loads(sys.stdin.read()):
    try:
        made = kfac.ScriptOptions.model_validate(eval(case))
        answers.append({name: repr(getattr(made, name)) for name in fields})
    except section.ValidationError as error:
        answers.append([[*p["loc"][:1], p["msg"]] for p in error.errors()])
answers.append([[name, repr(field.default), field.description] for name, field in fields.items()])
for value in (0.5, 0, "x", None):
    try:
        answers.append(kfac.RANGES["damping"].validate_python(value))
    except section.ValidationError as error:
        answers.append(error.errors()[0]["msg"])
print(json.dumps(answers))
"""


def answers(pydantic: str) -> list[object]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-c", ANSWERS, pydantic]
    text = json.dumps(CASES)
    done = subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


def test_options_are_the_same_with_pydantic_and_without() -> None:
    given, expected = answers("without"), answers("with")
    names = (*CASES, "fields", *("value at a step",) * 4)
    for case, mine, theirs in zip(names, given, expected, strict=True):
        assert mine == theirs, case
    refused = [answer for answer in given[: len(CASES)] if isinstance(answer, list)]
    assert 25 <= len(refused) <= len(CASES) - 10


def test_stand_in_copies_compares_and_refuses_changes() -> None:
    class Options(stand_in.BaseModel):
        rate: float = 0.1

    made = Options(rate=1)
    assert made == Options(rate=1.0) == copy.copy(made)
    assert made.model_copy(update={"rate": 2.0}).rate == 2.0 and made.rate == 1.0
    assert made != Options() and hash(made) == hash(Options(rate=1.0))
    assert repr(copy.deepcopy(made)) == "Options(rate=1.0)"
    with pytest.raises(stand_in.ValidationError, match="frozen"):
        made.rate = 3.0


def test_numbers_of_numpy_count_as_pythons() -> None:
    options = make_options(None, {"damping": numpy.float32(0.5)})
    assert value_at(options, "damping", 0) == 0.5
    with pytest.raises(ConfigError, match="damping is out of range"):
        make_options(None, {"damping": numpy.float32(-0.5)})
