"""Options of KFAC mean the same with pydantic and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy
import pytest

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
import warnings
warnings.simplefilter("ignore")
from elastic_kfac import KFAC
from elastic_kfac.config import kfac, section
from elastic_kfac.errors import ConfigError
from elastic_kfac.kfac.options import make_options
assert (section.BaseModel.__module__ == "elastic_kfac.config.stand_in") == (sys.argv[1] == "without")
answers = []
for case in json.loads(sys.stdin.read()):
    try:
        made = make_options(None, eval(case))
        names = kfac.ScriptOptions.model_fields
        answers.append({name: repr(getattr(made, name)) for name in names})
    except ConfigError as error:
        answers.append(error.line())
answers.append(KFAC.__doc__)
answers.append(list(KFAC.__signature__.parameters))
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
    for case, mine, theirs in zip((*CASES, "docs", "signature"), given, expected, strict=True):
        assert mine == theirs, case
    refused = [answer for answer in given[:-2] if isinstance(answer, str)]
    assert 25 <= len(refused) <= len(CASES) - 10


def test_numbers_of_numpy_count_as_pythons() -> None:
    options = make_options(None, {"damping": numpy.float32(0.5)})
    assert value_at(options, "damping", 0) == 0.5
    with pytest.raises(ConfigError, match="damping is out of range"):
        make_options(None, {"damping": numpy.float32(-0.5)})
