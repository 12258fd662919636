"""From an argument list to an exit code: 0 success, 1 the run failed, 2 bad usage, 130 Ctrl-C."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from elastic_kfac.cli.arguments import PROGRAM, parse_arguments
from elastic_kfac.cli.provenance import announce, is_ray_job
from elastic_kfac.errors import ElasticKfacError

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code.

    Errors of this package become one line on stderr; anything else is a defect and keeps its
    traceback.
    """
    try:
        if is_ray_job(os.environ):
            announce()
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        module_name, _, function_name = arguments.command.partition(":")
        command = getattr(importlib.import_module(module_name), function_name)
        code: int = command(arguments)
        sys.stdout.flush()
        if argv is None and function_name == "doctor":
            # Everything is printed and nothing is held; an orderly exit of torch and Ray takes seconds.
            os._exit(code)
        return code
    except ElasticKfacError as error:
        print(f"{PROGRAM}: error: {error.line()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone; without this Python complains again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as finished:  # argparse after --help and --version
        return finished.code if isinstance(finished.code, int) else 0


def main_of_job(command: str) -> int:
    """`main` for the entry point of `ray job submit`, whose own words are those after `command`."""
    return main(job_arguments(command, sys.argv[1:], os.environ))


def job_arguments(command: str, argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The argument list of a job: in a Ray job `--address auto`, unless an address is given."""
    given = any(word.partition("=")[0] == "--address" for word in argv)
    address = ["--address", "auto"] if is_ray_job(environment) and not given else []
    return [*command.split(), *argv, *address]
