"""From an argument list to an exit code: 0 success, 1 the run failed, 2 bad usage, 130 Ctrl-C."""

from __future__ import annotations

import atexit
import contextlib
import errno
import getpass
import importlib
import os
import pwd
import stat
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from elastic_kfac.cli.arguments import PROGRAM, parse_arguments
from elastic_kfac.cli.extras import missing_extra
from elastic_kfac.cli.provenance import announce, is_ray_job
from elastic_kfac.errors import ElasticKfacError, UsageError

EXIT_INTERRUPTED = 130
ENVIRONMENT_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EBADF),
}
"""What is wrong with a disk, a permission or a path, and no defect of this package."""

_python_format = warnings.formatwarning


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code; without `argv`, as a program, ends the process."""
    if argv is None:
        warnings.formatwarning = format_warning
        # A model may be built several times.
        warnings.simplefilter("once", UserWarning, append=True)
    code = _run(argv)
    if argv is None:
        end_process(code)
    return code


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning of this package as one line without the place in its source."""
    # One that KFAC gives about its caller's model names this program's start as the caller.
    if Path(filename).is_relative_to(Path(__file__).parents[1]) or filename == sys.argv[0]:
        return f"{PROGRAM}: warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)


def end_process(code: int) -> NoReturn:
    """Ends this process without the destructors of native libraries.

    With torch and Arrow loaded, a native thread now and then aborts a process that is done: "terminate
    called without an active exception", exit code 134. Which thread it is was not found.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def _run(argv: Sequence[str] | None) -> int:
    """Runs one subcommand.

    Errors of this package become one line on stderr; anything else is a defect and keeps its
    traceback.
    """
    try:
        settle_streams()
        settle_user()
        settle_folder()
        settle_modules()
        if is_ray_job(os.environ):
            announce()
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        module_name, _, function_name = arguments.command.partition(":")
        command = getattr(importlib.import_module(module_name), function_name)
        code: int = command(arguments)
        sys.stdout.flush()
        return code
    except ElasticKfacError as error:
        _complain(f"error: {error.line()}")
        return error.exit_code
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        _complain(f"error: {missing.line()}")
        return missing.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # The reader (`| head`) has gone.
        _discard_output()
        return 0
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        where = "the standard output" if error.filename is None else error.filename
        _complain(f"error: {error.strerror}; given: {where}; make room, or name another place")
        if error.filename is None:
            _discard_output()
        return 2
    except SystemExit as finished:  # argparse after --help and --version
        return finished.code if isinstance(finished.code, int) else 0


def settle_streams() -> None:
    """Opens closed standard streams and lets the others write any text."""
    # Python has None for a closed descriptor; the next file to be opened would take its number, and
    # whatever a library prints would go into that file.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # Somebody's own stream.
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def settle_folder() -> None:
    """Raises UsageError if the current folder is gone: relative paths mean nothing then."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            f"the current folder cannot be used: {error.strerror}", change="change to another one"
        ) from None


def settle_modules() -> None:
    """Makes modules in the current folder importable, as `python -m` does; Ray's workers have it too.

    It comes last on the path: a person's `random.py` must not hide a library.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def settle_user() -> None:
    """Gives a user without a home or a name, as containers run them, both for this process tree.

    Ray and torch look for them, and a cache needs a place that can be written.
    """
    home = os.environ.get("HOME", "")
    if not home or not os.access(home, os.W_OK):
        with contextlib.suppress(KeyError):
            home = home or pwd.getpwuid(os.getuid()).pw_dir
        if not home or not os.access(home, os.W_OK):
            given = f"HOME={home}, not writable" if home else "no HOME"
            home = str(_private_folder())
            _complain(f"note: {given}; caches go to {home}")
        os.environ["HOME"] = home
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def _private_folder() -> Path:
    """This user's folder below the temporary one, the same in every command."""
    folder = Path(tempfile.gettempdir(), f"elastic-kfac-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid == os.getuid() and found.st_mode == stat.S_IFDIR | 0o700:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))  # Somebody else was first.


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def _discard_output() -> None:
    # What is buffered cannot be written; without this Python complains again while it exits.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main_of_job(command: str) -> NoReturn:
    """`main` for the entry point of `ray job submit`, whose own words are those after `command`."""
    end_process(main(job_arguments(command, sys.argv[1:], os.environ)))


def job_arguments(command: str, argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The argument list of a job: in a Ray job `--address auto`, unless an address is given."""
    given = any(word.partition("=")[0] == "--address" for word in argv)
    address = ["--address", "auto"] if is_ray_job(environment) and not given else []
    return [*command.split(), *argv, *address]
