"""The grammar of the command line: one table of commands, one of options."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from elastic_kfac import __version__
from elastic_kfac.errors import UsageError

PROGRAM = "elastic-kfac"


def _checked(
    option: str, allowed: str, convert: Callable[[str], Any], example: str | None = None
) -> Callable[[str], Any]:
    """A converter whose ValueError becomes one line with what is allowed."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            change = None if example is None else f"for example {option} {example}"
            raise UsageError(
                f"bad value for {option}", given=text, allowed=allowed, change=change
            ) from None

    return parse


def _whole(text: str, low: int = 1, high: int = 999_999) -> int:
    if not re.fullmatch(r"\d{1,6}", text) or not low <= int(text) <= high:
        raise ValueError
    return int(text)


def _digits(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,11}", text):
        raise ValueError
    return int(text)


def _step_and(text: str, low: int) -> tuple[int, int]:
    step, _, value = text.partition(":")
    return _whole(step), _whole(value, low)


def _world_sizes(text: str) -> tuple[int, ...]:
    return tuple(map(_whole, text.split(",")))


def _minutes(text: str) -> float:
    if not 0 < float(text) <= 1440:
        raise ValueError
    return float(text)


def _positive(text: str, least: float = 1e-6) -> float:
    value = float(text)
    if not least <= value <= 1e9:  # nor what is no number
        raise ValueError
    return value


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_whole(part, high=1_000_000) for part in text.split("x"))


def _samples(text: str) -> int | str:
    return text if text == "all" else _whole(text)


def _run_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise ValueError
    return text


def _amount(option: str, *, zero: bool = False) -> Callable[[str], Any]:
    if zero:
        return _checked(option, "a number from 0", lambda text: _positive(text, 0.0))
    return _checked(option, "a number above 0", _positive)


def _number(option: str, convert: Callable[[str], Any] = _whole) -> Callable[[str], Any]:
    return _checked(option, "whole numbers from 1", convert)


NAME = _checked(
    "--name", "up to 100 letters, digits, '.', '_' and '-', the first a letter or digit", _run_name
)
KILLS = _checked(
    "--kill-at", "STEP:RANK with step >= 1 and rank >= 0", lambda text: _step_and(text, 0), "60:1"
)
RESIZES = _checked(
    "--resize-at",
    "STEP:NODES with step >= 1 and nodes >= 1",
    lambda text: _step_and(text, 1),
    "60:1",
)
SIZES = _checked("--world-size", "whole numbers from 1, separated by commas", _world_sizes, "1,2,5")
SAMPLES = _checked("--samples", "a whole number from 1, or all", _samples)
IMAGES = _checked("--images", "a number from 1 to 256", lambda text: _whole(text, 1, 256))


def _of(text: str, **options: Any) -> dict[str, Any]:
    default = options.get("default")
    if isinstance(default, int | float | str):
        text = f"{text} (default: {default:{'g' if isinstance(default, float) else ''}})"
    return {"help": text, **options}


def _repeated(text: str, **options: Any) -> dict[str, Any]:
    return {"help": f"{text} (repeatable)", "action": "append", "default": [], **options}


# Every argument; a command may replace one.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "CONFIG": _of("configuration (YAML), or the name of one that comes along, e.g. digits"),
    "NAMES": _of("section or key (default: all)", metavar="SECTION[.KEY]", nargs="*"),
    "RUN": _of("folder of a run, or its name below --storage"),
    "SPACE": _of("search space (YAML), e.g. tune_spaces/smoke.yaml"),
    "STUDY": _of("study (YAML), e.g. benchmarks/studies/clusters10.yaml"),
    "URI": _of("a shard set, or the root of several splits"),
    "--address": _of(
        "Ray cluster: auto, or HOST:PORT of its head (default: start a local cluster)"
    ),
    "--attack": _of("also evaluate attacked samples", choices=("fgsm", "pgd", "l2")),
    "--bad-records": _of(
        "images that cannot be decoded: stop, skip them, or skip and list them in quarantine.jsonl",
        choices=("raise", "skip", "quarantine"),
        default="raise",
    ),
    "--budget-s": _of(
        "stop after about SECONDS and list what is missing",
        type=float,
        default=120.0,
        metavar="SECONDS",
    ),
    "--checkpoint": _of("step of the checkpoint (default: the newest)", type=int, metavar="STEP"),
    "--contact-sheet": _of("also draw samples of every class to this file", metavar="PNG"),
    "--epoch": _of("use the last checkpoint up to epoch E", type=float, metavar="E"),
    "--epsilon": _of(
        "count singular values above EPSILON times the largest", type=float, default=1e-6
    ),
    "--factor": _of("C in loss + C·√(variance/n)", type=float, default=1.0, metavar="C"),
    "--gbit-per-s": _of(
        "bandwidth between workers", type=_amount("--gbit-per-s"), default=10.0, metavar="GBIT"
    ),
    "--images": _of(
        "images whose unrolled patches are analysed", type=IMAGES, default=64, metavar="N"
    ),
    "--json": _of("print JSON", action="store_true"),
    "--kill-at": _repeated(
        "local cluster only: SIGKILL worker RANK when STEP is committed",
        type=KILLS,
        metavar="STEP:RANK",
    ),
    "--latency-us": _of(
        "latency of a message between workers",
        type=_amount("--latency-us", zero=True),
        default=50.0,
        metavar="MICROSECONDS",
    ),
    "--local": _of("train in this process, as one worker and without Ray", action="store_true"),
    "--markdown": _of("print docs/configuration.md", action="store_true"),
    "--max-bad-records": _of(
        "bad images to skip in a split before stopping",
        type=_number("--max-bad-records"),
        default=1000,
        metavar="N",
    ),
    "--max-image-pixels": _of(
        "refuse images with more pixels",
        type=_checked("--max-image-pixels", "a whole number from 1", _digits),
        default=178_956_970,
        metavar="N",
    ),
    "--memory-gib": _of(
        "memory limit for vectors (default: the free memory)", type=float, metavar="GIB"
    ),
    "--name": _of(
        "name of the run; an existing run is continued (default: from the file's name)", type=NAME
    ),
    "--parallelism": _of(
        "cells to train at the same time (default: the file's)",
        type=_number("--parallelism"),
        metavar="N",
    ),
    "--quick": _of("check only that every shard exists and its size", action="store_true"),
    "--radius": _of(
        "radius of the attack in units of model inputs (default: the run's)", type=float
    ),
    "--resize-at": _repeated(
        "local cluster only: resize it to NODES nodes when STEP is committed",
        type=RESIZES,
        metavar="STEP:NODES",
    ),
    "--samples": _of("samples to analyse, or all", type=SAMPLES, default=1024, metavar="N"),
    "--seed": _of("seed of samples, start vectors and draws", type=int, default=0),
    "--seeds": _of(
        "override the number of seeds in the file", type=_number("--seeds"), metavar="N"
    ),
    "--set": _repeated(
        "override one key; `elastic-kfac config` lists them",
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
    ),
    "--shards": _of(
        "current root of the shard sets (default: where the run recorded them)", metavar="URI"
    ),
    "--source": _of(
        "digits | clusters10[:SEED] | stdlib_text[:LENGTH] | digit_scenes:masks|boxes | "
        "sklearn:diabetes|breast_cancer|wine | parquet:PATH | imagefolder:PATH | ilsvrc:DIR | "
        "torchvision:NAME[:ROOT] | text:PATH[?OPTIONS] | table:PATH?targets=NAME | masks:DIR | "
        "coco:PATH | python:PACKAGE.MODULE:FACTORY; options and samples of each: docs/tasks.md",
        required=True,
    ),
    "--split": _of("split to analyse (default: the training split)"),
    "--steps": _of("steps of pgd and l2 (default: the run's)", type=int),
    "--storage": _of("folder or URI that holds the runs", default="./runs"),
    "--top-k": _of(
        "largest eigenvalues by magnitude to compute", type=int, default=20, metavar="K"
    ),
    "--world-size": _of(
        "one or more numbers of workers", type=SIZES, required=True, metavar="N[,N...]"
    ),
}


class Command(NamedTuple):
    """A subcommand."""

    function: str
    """`module:function` below elastic_kfac.cli."""
    help: str
    arguments: str
    """Names in ARGUMENTS."""
    own: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    """Arguments of this command alone."""


ON_A_CHECKPOINT = "RUN --storage --shards --checkpoint --epoch"
GROUPS = {
    "shards": "Write, verify and describe Arrow shards.",
    "probe": "Diagnose a run's checkpoint.",
}
COMMANDS: dict[str, Command] = {
    "shards make": Command(
        "shards:make",
        "Write a data source as Arrow shards.",
        "--source --bad-records --max-bad-records --max-image-pixels",
        {
            "--out": _of("folder, s3:// or gs://", required=True, metavar="URI"),
            "--split": _of("split to write (default: every split of the source)"),
            "--address": _of(
                "Ray cluster that shares the work (default: RAY_ADDRESS, or this process alone)"
            ),
        },
    ),
    "shards verify": Command(
        "shards:verify",
        "Read every byte and check it against the manifest.",
        "URI --quick --max-image-pixels",
    ),
    "shards describe": Command(
        "shards:describe",
        "Print the manifests of a shard set as JSON.",
        "URI --contact-sheet --max-image-pixels",
    ),
    "train": Command(
        "train:train",
        "Train elastically under Ray Train.",
        "CONFIG --set --name --storage --address --local --resize-at --kill-at",
    ),
    "tune": Command(
        "tune:tune",
        "Search for the configuration that reaches a target fastest.",
        "SPACE --set --name --storage --address",
    ),
    "suggest": Command(
        "suggest:suggest",
        "Try lr, damping and intervals on this model and data, and write a configuration.",
        "CONFIG --set --name --storage",
        {
            "--minutes": _of(
                "time for all trials",
                type=_checked("--minutes", "a number above 0, up to 1440", _minutes, "5"),
                default=5.0,
                metavar="MINUTES",
            ),
            "--name": _of("name of the folder (default: from the file's name)", type=NAME),
        },
    ),
    "compare": Command(
        "compare:compare",
        "Compare methods over batch sizes and seeds.",
        "STUDY --set --name --storage --address --seeds --parallelism",
    ),
    "evaluate": Command(
        "runs:evaluate",
        "Compute loss and metrics of a run's newest checkpoint.",
        "RUN --storage --shards --attack --radius --steps --json",
        {
            "--split": _of("split to evaluate on (default: data.eval_split)"),
            "--by-class": _of("also print the numbers of every class", action="store_true"),
        },
    ),
    "export": Command(
        "runs:export",
        "Write a run's weights as safetensors.",
        "RUN --storage --checkpoint",
        {"--out": _of("file to write (default: RUN/model.safetensors)", metavar="FILE")},
    ),
    "curvature": Command(
        "curvature:curvature",
        "Write a checkpoint's factors, eigenbases and eigenvalues as safetensors.",
        "RUN --storage --shards --checkpoint",
        {"--out": _of("file to write (default: RUN/curvature.safetensors)", metavar="FILE")},
    ),
    "plan": Command(
        "plan:plan",
        "Predict step time, traffic and memory at given numbers of workers, and suggest a plan.",
        "CONFIG --set --world-size --memory-gib --gbit-per-s --latency-us --json",
        {
            "--memory-gib": _of(
                "device memory that a suggestion must fit (default: no limit)",
                type=_amount("--memory-gib"),
                metavar="GIB",
            ),
            "--links": _of(
                "run with plan.calibrate=true whose measured links to use", metavar="RUN"
            ),
            "--device": _of(
                "estimate for cpu, v100, a100 or h100 instead of measuring this machine",
                metavar="NAME",
            ),
            "--input-shape": _of(
                "shape of a sample, e.g. 3x224x224 (default: of the shards or the configuration)",
                type=_checked(
                    "--input-shape", "whole numbers from 1, joined by x", _shape, "3x224x224"
                ),
                metavar="SHAPE",
            ),
            "--classes": _of(
                "outputs of the model, where there are no shards (default: as published, or 1000)",
                type=_number("--classes"),
                metavar="N",
            ),
            "--layers": _of("also print where every layer goes", action="store_true"),
        },
    ),
    "audit": Command(
        "runs:audit",
        "Verify that every sample was used exactly once.",
        "RUN --storage --shards --json",
    ),
    "report": Command(
        "runs:report",
        "Write report.html of a run or a search.",
        "RUN --storage --json",
        {"--out": _of("file to write (default: RUN/report.html)", metavar="FILE")},
    ),
    "track": Command(
        "runs:track",
        "Send the metrics of an earlier run to trackers.",
        "RUN --storage --set",
        {"--to": _repeated("tracker", choices=("tensorboard", "wandb", "mlflow", "jsonl"))},
    ),
    "analyze": Command(
        "analyze:analyze",
        "Analyse the curvature of the loss at a run's checkpoint.",
        f"{ON_A_CHECKPOINT} --top-k --samples --budget-s --memory-gib --split --seed",
    ),
    "probe lowrank": Command(
        "analyze:lowrank",
        "Test whether low-rank approximation would compress a run's matrices.",
        f"{ON_A_CHECKPOINT} --images --epsilon",
    ),
    "probe bias-variance": Command(
        "analyze:bias_variance",
        "Compute the loss and its variance over samples on both splits.",
        f"{ON_A_CHECKPOINT} --samples --factor",
    ),
    "config": Command(
        "configuration:config", "Explain every configuration key.", "NAMES --markdown"
    ),
    "models": Command(
        "configuration:models",
        "List the built-in models with their parameters, or explain one.",
        "",
        {"MODEL": _of("name of a model (default: all)", nargs="?")},
    ),
    "init": Command(
        "project:init",
        "Write a project of your own: configuration, search space, model and dataset.",
        "",
        {
            "NAME": _of("folder to create"),
            "--config": _of(
                "write only this configuration that comes along, e.g. digits", metavar="CONFIG"
            ),
        },
    ),
    "completion": Command(
        "project:completion",
        "Print the completion script of a shell, or docs/cli.md.",
        "",
        {"SHELL": _of("shell to complete in", choices=("bash", "zsh", "tcsh", "fish", "markdown"))},
    ),
    "doctor": Command(
        "doctor:doctor",
        "Check this machine and suggest fixes.",
        "--storage --json",
        {"--address": _of("Ray cluster to check (default: RAY_ADDRESS if set)")},
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` where argparse would print a page and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.replace("argument ", "", 1), change=f"see `{self.prog} --help`")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses an argument list; `command` of the result names the function to call.

    Raises:
        UsageError: For an unknown subcommand or option (with the nearest known one), a missing
            argument, or a value of the wrong form.
    """
    _refuse_unknown_words(argv)
    parsed = build_parser().parse_args(argv)
    for name, value in vars(parsed).items():
        # What an unset variable of a shell script leaves; as a folder it would be the root.
        if value == "":
            option = f"--{name.replace('_', '-')}"
            named = any(word.partition("=")[0] == option for word in argv)
            raise UsageError(f"{option if named else name.upper()} is empty", given='""')
    return parsed


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    root = _Parser(
        prog=PROGRAM,
        description="Second-order (K-FAC) training on clusters that grow and shrink.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    children = {"": root.add_subparsers(metavar="SUBCOMMAND", required=True)}
    for path, command in COMMANDS.items():
        group, _, name = path.rpartition(" ")
        if group not in children:
            parent = children[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            children[group] = parent.add_subparsers(metavar="SUBCOMMAND", required=True)
        child = children[group].add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False
        )
        child.set_defaults(command=f"elastic_kfac.cli.{command.function}")
        for flag, options in options_of(command).items():
            positional = {} if flag.startswith("-") else {"metavar": flag}
            child.add_argument(flag.lower(), **{**positional, **options})
    return root


def _refuse_unknown_words(argv: Sequence[str]) -> None:
    # Before argparse looks: it would report what a misspelt option leaves missing, not the option.
    path = ""
    for word in argv:
        program = f"{PROGRAM} {path}".rstrip()
        if word == "--":
            break
        if word.startswith("--") or re.fullmatch(r"-[A-Za-z]", word):
            name = word.partition("=")[0]
            known = _options(path)
            if name not in known:
                raise UsageError(
                    f"{program} has no option {name}",
                    allowed=", ".join(known[1:]),
                    change=_suggestion(name, known),
                )
            if name in ("-h", "--help", "--version"):
                return
        elif path not in COMMANDS:
            known = _children(path)
            if word not in known:
                raise UsageError(
                    f"{program} has no subcommand {word!r}",
                    allowed=", ".join(known),
                    change=_suggestion(word, known),
                )
            path = f"{path} {word}".lstrip()
    if path not in COMMANDS:
        program = f"{PROGRAM} {path}".rstrip()
        raise UsageError(
            f"{program} needs a subcommand",
            allowed=", ".join(_children(path)),
            change=f"see `{program} --help`",
        )


def _options(path: str) -> list[str]:
    if path not in COMMANDS:
        return ["-h", "--help", *([] if path else ["--version"])]
    flags = options_of(COMMANDS[path])
    return ["-h", "--help", *(flag for flag in flags if flag.startswith("-"))]


def options_of(command: Command) -> dict[str, dict[str, Any]]:
    """Every argument of a command with what argparse is given for it."""
    return {**_shared(command), **command.own}


def _shared(command: Command) -> dict[str, dict[str, Any]]:
    return {flag: ARGUMENTS[flag] for flag in command.arguments.split()}


def _children(path: str) -> list[str]:
    below = [name.removeprefix(path).split() for name in COMMANDS if name.startswith(path)]
    return list(dict.fromkeys(words[0] for words in below))


def _suggestion(word: str, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else None
