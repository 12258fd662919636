"""Random damage to files and random command lines: the right answer, or one line and exit code 2.

A failure prints its seed; `ELASTIC_KFAC_FUZZ=SEED/NUMBER` repeats that try. `make soak` tries thousands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from elastic_kfac.cli import main
from elastic_kfac.cli.arguments import ARGUMENTS, COMMANDS

CONFIG = """
data: {shards: data/digits, source: digits}
model: {name: mlp, arguments: {hidden: [8]}}
train: {epochs: 3, global_batch_size: 512, eval_every_epochs: 1}
kfac: {enabled: true, inverse_update_steps: 2, factor_update_steps: 1}
elastic: {max_workers: 1, snapshot_interval_s: 0.001}
"""
LINES = {
    "verify": "shards verify data/digits",
    "quick": "shards verify data/digits --quick",
    "describe": "shards describe data/digits",
    "sheet": "shards describe data/digits --contact-sheet sheet.png",
    "make": "shards make --source digits --out data/digits",
    "audit": "audit runs/r",
    "evaluate": "evaluate runs/r",
    "export": "export runs/r --out out.safetensors",
    "report": "report runs/r",
    "bias-variance": "probe bias-variance runs/r --samples 32",
    "low-rank": "probe lowrank runs/r --images 2",
    "analyze": "analyze runs/r --top-k 1 --samples 16 --budget-s 0.5",
    "plan": "plan c.yaml --world-size 1,2",
    "train": "train c.yaml --local --name r",
}
RARE = {"low-rank": 0.1, "plan": 0.05, "train": 0.1, "report": 0.2, "bias-variance": 0.3}
WEIGHTS = [{**RARE, "analyze": 0.05, "sheet": 0.2}.get(name, 1.0) for name in LINES]
JUNK: tuple[Any, ...] = (None, 17, -1, 0, "x", "", [], {}, 1e308, True, "../x", [[]], 2**70)
FREE = ("report", "plan", "train", "analyze", "low-rank")
"""Commands whose output depends on the time, or shows whatever the rows hold."""
SEED, _, ONE = os.environ.get("ELASTIC_KFAC_FUZZ", "").partition("/")


class Stage(NamedTuple):
    """An undamaged folder, its files, what each command may print, and the exported tensors."""

    root: Path
    files: list[str]
    outputs: dict[str, set[str]]
    tensors: dict[str, torch.Tensor]


def call(words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def steady(text: str) -> str:
    """Output without what differs from call to call."""
    return re.sub(r"in \d[\d.]* s|/\S*(?=/data)| \(already existed\)", "", text)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    base = tmp_path_factory.mktemp("fuzz")
    (base / "pristine").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        patch.chdir(base / "pristine")
        Path("c.yaml").write_text(CONFIG)
        code, _, problem = call(LINES["train"].split())
        assert code == 0, problem
        Path("runs/r/shards.json").unlink()  # It names this folder, not the copies.
        files = [
            str(path)
            for path in sorted(Path().rglob("*"))
            if path.is_file() and path.stat().st_size
        ]
        shutil.copytree(base / "pristine", base / "answers")
        patch.chdir(base / "answers")
        outputs = {name: {steady(call(line.split())[1])} for name, line in LINES.items()}
        tensors = load_file("out.safetensors")
        # What may be answered when newer checkpoints are damaged, with a warning.
        for newest in sorted(Path("runs/r/checkpoints").iterdir(), reverse=True)[:-1]:
            shutil.rmtree(newest)
            for name in ("evaluate", "bias-variance"):
                outputs[name].add(steady(call(LINES[name].split())[1]))
        yield Stage(base / "pristine", files, outputs, tensors)


def damage(path: Path, draw: random.Random) -> str:
    """Damages a file; returns how."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(
        ["cut", "flip", "flip", "empty", "delete", "folder", "junk", "encoding", "append", "link"]
        + ["value"] * 6 * (path.suffix in (".json", ".jsonl", ".yaml"))
    )
    if kind == "cut":
        content = content[: draw.randrange(len(content) + 1)]
    elif kind == "flip":
        for _ in range(draw.choice([1, 1, 4, 64])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "empty":
        content.clear()
    elif kind in ("delete", "folder", "link"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        if kind == "link":
            path.symlink_to("nothing")
        return kind
    elif kind == "junk":
        content = bytearray(draw.choice([b"17", b"[]", b"null", b"{}", b"\0" * 9, b"[" * 9000]))
    elif kind == "encoding":
        content = bytearray(content.decode("latin-1").encode(draw.choice(["utf-16", "utf-32"])))
    elif kind == "append":
        content += draw.choice([b"\xff", b"17\n", b"{}\n", draw.randbytes(99), b"}"])
    elif kind == "value":
        content = bytearray(changed_value(content.decode(), path.suffix, draw).encode())
    path.write_bytes(content)
    return kind


def changed_value(text: str, suffix: str, draw: random.Random) -> str:
    """A document in which one value is another, one key has another name, or one is gone."""
    lines = text.splitlines() if suffix == ".jsonl" else [text]
    at = draw.randrange(len(lines)) if lines else 0
    if suffix == ".yaml":
        found = list(re.finditer(r"(?m)(?<=: )\S.*$", text))
        where = draw.choice(found)
        return text[: where.start()] + json.dumps(draw.choice(JUNK)) + text[where.end() :]
    document = json.loads(lines[at]) if lines else {}
    places = [(document, key) for key in (document if isinstance(document, dict) else {})]
    for parent, key in places:
        child = parent[key]
        if isinstance(child, dict | list):
            places += [
                (child, each) for each in (child if isinstance(child, dict) else range(len(child)))
            ]
    if places:
        parent, key = draw.choice(places)
        if isinstance(parent, dict) and draw.random() < 0.3:
            value = parent.pop(key)
            if draw.random() < 0.5:
                parent[f"{key}_"] = value
        else:
            parent[key] = draw.choice(JUNK)
    lines[at : at + 1] = [json.dumps(document, indent=1 if suffix == ".json" else None)]
    return "\n".join(lines)


def judge(code: int, err: str, allowed: tuple[int, ...]) -> str | None:
    """What is wrong with how a command ended."""
    lines = [
        line
        for line in err.splitlines()
        if not line.startswith(("warning: ", "elastic-kfac: note"))
    ]
    if code not in allowed:
        return f"exit code {code}: {err}"
    if code == 2 and (len(lines) != 1 or not lines[0].startswith("elastic-kfac: error: ")):
        return f"not one line: {err}"
    if len(err) > 2000:
        return f"a long line: {err[:200]}"
    return None


def one_try(number: int, seed: str, stage: Stage, place: Path) -> str | None:
    """Damages one file and runs one command; what is wrong with the answer, None if nothing is."""
    draw = random.Random(f"{seed}/{number}")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(stage.root, place)
    os.chdir(place)
    name = draw.choices(list(LINES), WEIGHTS)[0]
    relevant = [f for f in stage.files if ("runs" in f) or name not in ("report", "audit")]
    if LINES[name].startswith("shards"):
        relevant = [f for f in stage.files if f.startswith("data")]
    file = draw.choice(relevant)
    how = damage(Path(file), draw)
    where = f"ELASTIC_KFAC_FUZZ={seed}/{number}: {how} {file}, then {LINES[name]}"
    try:
        code, out, err = call(LINES[name].split())
    except Exception as error:
        import traceback

        return f"{where}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"
    failed = (0, 1, 2) if name in ("audit", "train") else (0, 2)
    if (wrong := judge(code, err, failed)) is not None:
        return f"{where}: {wrong}"
    is_config = file.endswith(".yaml")  # Another valid value is another run.
    if code == 0 and name not in FREE and not is_config:
        if steady(out) not in stage.outputs[name]:
            return f"{where}: wrong answer: {out} {err}"
        if name == "export":
            found = load_file("out.safetensors")
            same = found.keys() == stage.tensors.keys()
            if not same or not all(torch.equal(found[n], stage.tensors[n]) for n in found):
                return f"{where}: exported other tensors"
    if name == "make" and code == 0:
        for split in ("train", "test"):
            file = f"data/digits/{split}/manifest.json"
            if Path(file).read_bytes() != (stage.root / file).read_bytes():
                return f"{where}: another manifest"
    return None


def tries(count: int, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = SEED or str(random.SystemRandom().randrange(10**6))
    print(f"ELASTIC_KFAC_FUZZ={seed}")
    monkeypatch.chdir(tmp_path)  # Restored at the end.
    monkeypatch.setenv("XDG_CACHE_HOME", str(stage.root.parent / "cache"))
    found = []
    for number in [int(ONE)] if ONE else range(count):
        if (wrong := one_try(number, seed, stage, tmp_path / "place")) is not None:
            found.append(wrong)
    assert not found, f"{len(found)} of {count}:\n" + "\n\n".join(found[:20])


def test_damaged_files_are_noticed(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries(40, stage, tmp_path, monkeypatch)


def test_files_that_are_nested_without_end_are_noticed(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in [f for f in stage.files if f.endswith((".json", ".jsonl"))]:
        place = tmp_path / file.replace("/", "-")
        shutil.copytree(stage.root, place)
        monkeypatch.chdir(place)
        Path(file).write_bytes(b"[" * 9000)
        for name in ("quick", "evaluate", "audit"):
            code, _, err = call(LINES[name].split())
            wrong = judge(code, err, (0, 1, 2) if name == "audit" else (0, 2))
            assert wrong is None, f"{file}, {name}: {wrong}"


@pytest.mark.soak
def test_damaged_files_are_noticed_in_thousands_of_tries(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries(5000, stage, tmp_path, monkeypatch)


VALUES = (
    *(
        "",
        "-1",
        "0",
        "1",
        "1e999",
        "nan",
        "inf",
        "x",
        "a b",
        "1,2",
        "1:2",
        "../..",
        "/dev/null",
        "/",
    ),
    *(
        ".",
        "{}",
        "[1",
        "null",
        "9" * 30,
        "s3://",
        "s3:/x",
        "file://x",
        "http://x",
        "ü…",
        "~nobody/x",
    ),
    *(
        "--",
        "-h1",
        "kfac.damping=",
        "kfac=1",
        "train.epochs=1:30",
        "a.b.c=1",
        "data.shards=[1]",
        "%",
        "\\",
    ),
    *(
        "model.arguments={a: *b}",
        "train.seed=2e0",
        "kfac.damping={rule: x}",
        "data.source=zip:x",
        "\n",
    ),
)
NO_CLUSTER = [path for path in COMMANDS if path not in ("train", "tune", "compare", "doctor")]


def random_line(draw: random.Random) -> list[str]:
    """A command with its arguments, some of them missing, doubled, foreign or with a wrong value."""
    path = draw.choice([*NO_CLUSTER, "train --local"])
    command = COMMANDS[path.split(" --")[0]]
    flags = {name: ARGUMENTS.get(name, {}) for name in command.arguments.split()} | command.own
    words = path.split()
    for flag, options in flags.items():
        if draw.random() < (0.9 if not flag.startswith("-") or options.get("required") else 0.3):
            right = {"RUN": "runs/r", "CONFIG": "c.yaml", "URI": "data/digits"}.get(flag, "1")
            right = {"--source": "digits", "--out": "o", "--set": "train.seed=1"}.get(flag, right)
            value = right if draw.random() < 0.6 else draw.choice(VALUES)
            takes = [] if options.get("action") == "store_true" else [value]
            words += [*([flag] if flag.startswith("-") else []), *takes]
    if draw.random() < 0.2:
        words.insert(draw.randrange(len(words) + 1), draw.choice([*VALUES, "--nothing", "--help"]))
    return words


@pytest.mark.parametrize("count", [pytest.param(30), pytest.param(200, marks=pytest.mark.soak)])
def test_random_command_lines_end_in_one_line(
    count: int, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = SEED or str(random.SystemRandom().randrange(10**6))
    print(f"ELASTIC_KFAC_FUZZ={seed}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(stage.root.parent / "cache"))
    found = []
    for number in [int(ONE)] if ONE else range(count):
        draw = random.Random(f"{seed}/{number}")
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(stage.root, place)
        monkeypatch.chdir(place)
        words = random_line(draw)
        if "--address" in words:
            continue  # Looks for a cluster.
        where = f"ELASTIC_KFAC_FUZZ={seed}/{number}: {words}"
        try:
            code, _, err = call(words)
        except Exception as error:
            import traceback

            found.append(f"{where}: {error!r}\n{traceback.format_exc(limit=-4)}")
            continue
        if (wrong := judge(code, err, (0, 1, 2) if "train" in words else (0, 2))) is not None:
            found.append(f"{where}: {wrong}")
    assert not found, f"{len(found)} of {count}:\n" + "\n\n".join(found[:20])
