"""The command as a user types it: in a process of its own or, where that proves nothing more, in this one."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))


def environment(**extra):
    """This one's variables, none of a user's own settings among them, for output that does not vary."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CALTECH_HPO_")}
    return kept | {"NO_COLOR": "1", "COLUMNS": "120"} | extra


def call(*arguments, cwd, timeout=240, **extra):
    """Runs the installed command; returns the finished process."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=cwd, env=environment(**extra), timeout=timeout,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def here(*arguments, cwd, **extra):
    """As `call`, without a new process, where that would prove no more: its imports take seconds."""
    from caltech_hpo.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    command = [COMMAND, *map(str, arguments)]
    before, collected, code = signal.getsignal(signal.SIGTERM), gc.get_threshold(), 0
    try:
        with (
            contextlib.chdir(cwd), mock.patch.dict(os.environ, environment(**extra), clear=True),
            mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):  # fmt: skip
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        signal.signal(signal.SIGTERM, before)
        gc.set_threshold(*collected)
    said = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(command, code, *said)


def answer(*arguments, cwd, run=call, **extra):
    """The JSON document of a command that must succeed; stdout must hold nothing else."""
    done = run(*arguments, "--json", cwd=cwd, **extra)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(running, words):
    """Reads the process's stderr up to a line with these words; returns the line."""
    for line in running.stderr:
        if words in line:
            return line
    raise AssertionError(f"{words} never came")


def killed(*arguments, cwd, words="epoch 5/"):
    """Kills the command's own process once it has said `words`; its worker has saved where it was."""
    with subprocess.Popen(
        [COMMAND, *map(str, arguments)], cwd=cwd, env=environment(), stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    ) as running:  # fmt: skip
        wait_for(running, words)
        children = psutil.Process(running.pid).children(recursive=True)
        running.kill()
        running.stderr.read()
    for child in children:
        child.wait(timeout=30)
    assert list((Path(cwd) / "storage").rglob("*.checkpoint"))
