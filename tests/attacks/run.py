"""Runs commands one by one, each in a fork of one warm process, under limits: what `test_attacks.py` talks to.

Reads a line of JSON per command, `{"argv", "folder", "seconds"}`; answers with one: `{"code", "out", "err", "rss"}`.
`code` is negative for a signal; `rss` is the fork's peak of resident bytes. `heavy` loads torch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

ADDRESSES = 3 << 30  # bytes that a command may map beyond what the warm process has
LARGEST_FILE = 256 << 20


def main() -> None:
    import typer

    import coterie.cli
    from coterie.reference_model import MODEL

    for module in ("apply", "pack", "compare"):
        getattr(coterie, module)
    typer.main.get_command = functools.cache(typer.main.get_command)
    warm = [["inspect", str(MODEL)], ["prune", str(MODEL), "OUT", "--dry-run"]]
    if "heavy" in sys.argv:
        import coterie.forward.stream
        import coterie.verbs.collect
        import coterie.verbs.eval

        assert coterie.forward.stream
        warm.append(["verify", str(MODEL), "--quiet"])
    for argv in warm:  # what is imported and cached now is not in every fork
        with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
            coterie.cli.main(argv)
    gc.freeze()  # a fork that collects garbage would copy every page
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), mapped + ADDRESSES)), flush=True)


def answer(command: dict[str, Any], addresses: int) -> dict[str, Any]:
    """Forks, runs, waits."""
    out, err = (os.memfd_create(name) for name in ("out", "err"))
    child = os.fork()
    if child == 0:
        try:
            _limit(command["seconds"], addresses)
            _run(command, out, err)
        finally:
            os._exit(70)
    _, status, usage = os.wait4(child, 0)
    found = [_content(descriptor) for descriptor in (out, err)]
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "out": found[0], "err": found[1], "rss": usage.ru_maxrss * 1024}


def _limit(seconds: int, addresses: int) -> None:
    signal.alarm(6 * seconds)  # of the clock: other work may share the processor
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(command: dict[str, Any], out: int, err: int) -> None:
    """The command as typed, with its exit code as Python would give it."""
    from coterie.cli import main as coterie

    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(command["folder"])
    code = 1
    try:
        coterie(command["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _content(descriptor: int) -> str:
    size = min(os.fstat(descriptor).st_size, 1 << 20)
    raw = os.pread(descriptor, size, 0)
    os.close(descriptor)
    return raw.decode("utf-8", "surrogateescape")


if __name__ == "__main__":
    main()
