"""`elastic-kfac config` and `models`: every configuration key, every built-in model."""

from __future__ import annotations

import argparse
import inspect
import shutil
import textwrap

from elastic_kfac.config.run import shown
from elastic_kfac.errors import UsageError


def config(arguments: argparse.Namespace) -> int:
    """Prints the named sections or keys, or all of them."""
    from elastic_kfac.config.describe import as_markdown, as_text

    if arguments.markdown and arguments.names:
        raise UsageError(
            "--markdown prints all sections",
            given=" ".join(arguments.names),
            change="drop the names or --markdown",
        )
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    text = as_markdown() if arguments.markdown else as_text(arguments.names, columns)
    print(text.rstrip("\n"))
    return 0


def models(arguments: argparse.Namespace) -> int:
    """Prints the built-in models with the parameters of their published use, or explains one."""
    import torch

    from elastic_kfac.zoo import MODELS

    if arguments.model is None:
        print(f"{'model.name':<30}{'parameters':>13}  {'outputs, input':<18}  description")
        for name, model in sorted(MODELS.items()):
            with torch.device("meta"):
                built = model.factory(model.num_outputs, model.input_shape, **model.arguments)
            count = sum(parameter.numel() for parameter in built.parameters())
            use = f"{model.num_outputs}, {'x'.join(map(str, model.input_shape))}"
            text = textwrap.shorten(model.factory.__doc__ or "", 70, placeholder=" ...")
            print(f"{name:<30}{count:>13,}  {use:<18}  {text}")
        return 0
    if arguments.model not in MODELS:
        raise UsageError("unknown model", given=arguments.model, allowed=", ".join(sorted(MODELS)))
    factory = MODELS[arguments.model].factory
    found = inspect.signature(factory).parameters.values()
    keys = [f"{p.name} ({shown(p.default)})" for p in found if p.kind is p.KEYWORD_ONLY]
    if any(p.kind is p.VAR_KEYWORD for p in found):
        keys.append("those of torchvision's function")
    print(" ".join((factory.__doc__ or "").split()))
    print(f"model.arguments (default): {', '.join(keys) or 'none'}")
    return 0
