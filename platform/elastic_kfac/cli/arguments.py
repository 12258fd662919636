"""The grammar of the command line: subcommands, options, and what is wrong with a mistyped one."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from elastic_kfac import __version__
from elastic_kfac.cli.analyze import ANALYZE, BIAS_VARIANCE, LOWRANK, add_options
from elastic_kfac.errors import UsageError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SOURCES = (
    "digits | clusters10[:SEED] | parquet:PATH | imagefolder:PATH | ilsvrc:DIR | "
    "torchvision:NAME[:ROOT]"
)


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` where argparse would print a page and exit."""

    def __init__(self, **keywords: object) -> None:
        super().__init__(allow_abbrev=False, **keywords)  # type: ignore[arg-type]
        self.options: list[str] = ["-h", "--help"]
        self.children: dict[str, Parser] = {}

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.replace("argument ", "", 1), change=f"see `{self.prog} --help`")

    def option(self, name: str, **keywords: object) -> None:
        """Adds an option and remembers its name for suggestions."""
        self.options.append(name)
        self.add_argument(name, **keywords)  # type: ignore[arg-type]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses an argument list; `command` of the result names the function to call.

    Raises:
        UsageError: For an unknown subcommand or option (with the nearest known one), a missing
            argument, or a value of the wrong form.
    """
    parser = _build_parser()
    _refuse_unknown_words(parser, argv)
    return parser.parse_args(argv)


def _refuse_unknown_words(parser: Parser, argv: Sequence[str]) -> None:
    # Before argparse looks: it would report what a misspelt option leaves missing, not the option.
    current = parser
    for word in argv:
        if word == "--":
            return
        if word.startswith("--") or re.fullmatch(r"-[A-Za-z]", word):
            name = word.split("=", 1)[0]
            if name not in current.options:
                raise UsageError(
                    f"{current.prog} has no option {name}",
                    allowed=", ".join(current.options[1:]),
                    change=_suggestion(name, current.options),
                )
            if name in ("-h", "--help", "--version"):
                return
        elif current.children:
            if word not in current.children:
                raise UsageError(
                    f"{current.prog} has no subcommand {word!r}",
                    allowed=", ".join(current.children),
                    change=_suggestion(word, list(current.children)),
                )
            current = current.children[word]
    if current.children:
        raise UsageError(
            f"{current.prog} needs a subcommand",
            allowed=", ".join(current.children),
            change=f"see `{current.prog} --help`",
        )


def _suggestion(word: str, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else None


def _build_parser() -> Parser:
    parser = Parser(
        prog="elastic-kfac",
        description="Second-order (K-FAC) training on clusters that grow and shrink.",
    )
    parser.options.append("--version")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    groups = parser.add_subparsers(metavar="SUBCOMMAND", required=True)

    def add(name: str, function: str, text: str) -> Parser:
        child: Parser = groups.add_parser(name, help=text, description=text)
        child.set_defaults(command=f"elastic_kfac.cli.{function}")
        parser.children[name] = child
        return child

    _add_shards(parser, groups)
    _add_train(add("train", "train:train", "Train elastically under Ray Train."))
    _add_tune(add("tune", "tune:tune", "Search for the fastest way to an accuracy."))

    _add_compare(add("compare", "compare:compare", "Compare methods over batch sizes and seeds."))

    evaluate = add("evaluate", "runs:evaluate", "Loss and accuracy of a run's newest checkpoint.")
    _add_run(evaluate)
    evaluate.option("--attack", choices=("fgsm", "pgd", "l2"), help="also count attacked samples")
    evaluate.option(
        "--radius", type=float, help="of the attack, in model inputs (default: the run's)"
    )
    evaluate.option("--steps", type=int, help="of pgd and l2 (default: the run's)")

    export = add("export", "runs:export", "Write a run's weights as safetensors.")
    _add_run(export)
    export.option("--out", help="file to write (default: RUN/model.safetensors)")

    plan = add("plan", "runs:plan", "Show who would compute what at given world sizes.")
    _add_config(plan)
    plan.option(
        "--world-size",
        type=_world_sizes,
        required=True,
        metavar="N[,N...]",
        help="one or more world sizes",
    )

    _add_run(add("audit", "runs:audit", "Prove that every sample was used exactly once."))
    _add_run(add("report", "runs:report", "Write report.html of a run or a search."))

    analyze = add("analyze", "analyze:analyze", "Curvature of the loss at a run's checkpoint.")
    _add_run(analyze)
    add_options(analyze, ANALYZE)
    _add_probe(parser, groups)

    doctor = add("doctor", "doctor:doctor", "Check this machine and say what to do.")
    doctor.option("--storage", default="./runs", help="run storage to check (default: ./runs)")
    doctor.option("--address", help="Ray cluster to check (default: RAY_ADDRESS if set)")
    return parser


def _add_shards(parser: Parser, groups: argparse._SubParsersAction[Parser]) -> None:
    shards = groups.add_parser("shards", help="Make, check and describe Arrow shards.")
    parser.children["shards"] = shards
    verbs = shards.add_subparsers(metavar="VERB", required=True)

    def add(name: str, text: str) -> Parser:
        child: Parser = verbs.add_parser(name, help=text, description=text)
        child.set_defaults(command=f"elastic_kfac.cli.shards:{name}")
        shards.children[name] = child
        return child

    make = add("make", "Write a data source as Arrow shards.")
    make.option("--source", required=True, help=SOURCES)
    make.option("--out", required=True, metavar="URI", help="folder, s3:// or gs://")
    make.option("--split", help="write only this split (default: all that the source has)")
    make.option(
        "--address",
        help="Ray cluster to share the work among (`auto` or host:port; default: RAY_ADDRESS if "
        "set, else this process alone)",
    )
    verify = add("verify", "Read every byte and check it against the manifest.")
    verify.option(
        "--quick", action="store_true", help="only check that every shard is there with its size"
    )
    describe = add("describe", "What a shard set holds.")
    describe.option(
        "--contact-sheet", metavar="PNG", help="also draw samples of every class to this file"
    )
    for verb in (verify, describe):
        verb.add_argument("uri", metavar="URI", help="root or one split of a shard set")


def _add_probe(parser: Parser, groups: argparse._SubParsersAction[Parser]) -> None:
    probe = groups.add_parser("probe", help="Small diagnostics of a run's checkpoint.")
    parser.children["probe"] = probe
    verbs = probe.add_subparsers(metavar="VERB", required=True)
    for name, function, options, text in (
        ("lowrank", "lowrank", LOWRANK, "Would low-rank approximation compress its matrices?"),
        ("bias-variance", "bias_variance", BIAS_VARIANCE, "Loss and spread over samples."),
    ):
        child: Parser = verbs.add_parser(name, help=text, description=text)
        child.set_defaults(command=f"elastic_kfac.cli.analyze:{function}")
        probe.children[name] = child
        _add_run(child)
        add_options(child, options)


def _add_train(train: Parser) -> None:
    _add_config(train)
    train.option("--name", type=_run_name, help="run name; an existing one is continued")
    train.option("--storage", default="./runs", help="folder or URI of runs (default: ./runs)")
    train.option(
        "--address", help="Ray cluster to use (`auto` or host:port); without it a local one starts"
    )
    train.option(
        "--resize-at",
        action="append",
        default=[],
        type=_pair("STEP:NODES", "--resize-at", smallest=(1, 1)),
        metavar="STEP:NODES",
        help="local cluster only: when STEP is committed, have NODES nodes (repeatable)",
    )
    train.option(
        "--kill-at",
        action="append",
        default=[],
        type=_pair("STEP:RANK", "--kill-at", smallest=(1, 0)),
        metavar="STEP:RANK",
        help="local cluster only: SIGKILL worker RANK when STEP is committed (repeatable)",
    )


def _add_tune(tune: Parser) -> None:
    tune.add_argument("space", metavar="SPACE", help="YAML file, e.g. tune_spaces/smoke.yaml")
    tune.option("--name", type=_run_name, help="name of the search; an existing one is continued")
    tune.option("--storage", default="./runs", help="folder of searches (default: ./runs)")
    tune.option(
        "--address", help="Ray cluster to use (`auto` or host:port); without it a local one starts"
    )
    _add_overrides(tune)


def _add_compare(compare: Parser) -> None:
    compare.add_argument(
        "study", metavar="STUDY", help="YAML file, e.g. benchmarks/studies/clusters10.yaml"
    )
    compare.option(
        "--name", type=_run_name, help="name of its folder (default: the file's); continues it"
    )
    compare.option("--storage", default="./runs", help="folder or URI of runs (default: ./runs)")
    compare.option(
        "--address", help="Ray cluster to use (`auto` or host:port); without it a local one starts"
    )
    compare.option("--seeds", type=_positive("--seeds"), help="so many seeds, not the file's")
    compare.option(
        "--parallelism", type=_positive("--parallelism"), help="so many cells at the same time"
    )
    _add_overrides(compare)


def _add_config(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, e.g. jobs/configs/digits.yaml")
    _add_overrides(parser)


def _add_overrides(parser: Parser) -> None:
    parser.option(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="replace one configuration value (repeatable)",
    )


def _add_run(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name below --storage")
    parser.option("--storage", default="./runs", help="folder of runs (default: ./runs)")


def _pair(form: str, option: str, smallest: tuple[int, int]) -> Callable[[str], tuple[int, int]]:
    def parse(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+):(\d+)", text)
        pair = (int(match[1]), int(match[2])) if match else (-1, -1)
        if pair[0] < smallest[0] or pair[1] < smallest[1]:
            names = form.lower().split(":")
            raise UsageError(
                f"bad value for {option}",
                given=text,
                allowed=f"{form} with {names[0]} >= {smallest[0]} and {names[1]} >= {smallest[1]}",
                change=f"for example {option} 60:1",
            )
        return pair

    return parse


def _positive(option: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[1-9]\d{0,5}", text):
            raise UsageError(f"bad value for {option}", given=text, allowed="whole numbers from 1")
        return int(text)

    return parse


def _world_sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d{0,5}", part) for part in parts):
        raise UsageError(
            "bad value for --world-size",
            given=text,
            allowed="whole numbers from 1, separated by commas",
            change="for example --world-size 1,2,5",
        )
    return tuple(int(part) for part in parts)


def _run_name(text: str) -> str:
    if not RUN_NAME.fullmatch(text):
        raise UsageError(
            "bad value for --name",
            given=text,
            allowed="letters, digits, '.', '_' and '-' (at most 100, the first a letter or digit)",
        )
    return text
