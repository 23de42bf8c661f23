"""The `coterie` command: one command per public function, same options, no logic.

A command is a file of `verbs/`: its docstring is the command's help, the public function of its name has the options,
and `show(result, asked)` yields the lines that a person reads. Only the file of the command that is asked for is
imported. Exit codes: 0 done; 1 a defect of ours; 2 refused; 3 `verify` found a fault; 130 interrupted.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

import coterie
from coterie.errors import CoterieError, printable
from coterie.options import Help, flag_of, help_of, typed


def _show_version(asked: bool) -> None:
    if asked:
        _say(f"coterie {coterie.__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
ORDER = """
    inspect prune stun sparsify quantize merge condense recover drop collect compare analyze apply pack unpack status
    generate bench verify eval report push
""".split()  # of the help; what it does not name comes last


def application(asked: str | None) -> typer.Typer:
    """All commands with their help; the one that is asked for also with its options."""
    app = typer.Typer(
        name="coterie",
        help="Makes mixture-of-experts language models small and cheap to run: checkpoint in, smaller checkpoint out.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in commands():
        app.command(name, help=_docstring(coterie.VERBS[name]))(_callback(name) if name == asked else _nothing)
    return app


def _options(version: Version = False) -> None:
    """What is asked of no command."""


def commands() -> list[str]:
    """Every verb, in the order of the help."""
    return sorted(coterie.VERBS, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _docstring(file: Path) -> str:
    """The docstring of a file, which is not imported for it."""
    return file.read_text(encoding="utf-8").split('"""')[1]


def _nothing() -> None:
    """Stands for a command that was not asked for."""


def _callback(name: str) -> Callable[..., None]:
    """What typer calls with the options of a verb, and reads them from."""
    verb: Callable[..., Any] = getattr(coterie, name)
    parameters = inspect.signature(verb).parameters
    shown = {n: (p, found) for n, p in parameters.items() if (found := help_of(p))}
    flipped = {n for n, (p, _) in shown.items() if p.default is True}

    def callback(json_: bool, quiet: bool = False, **asked: Any) -> None:
        given = {n: not asked[_flag(n)] if n in flipped else _typed(asked[n], found) for n, (_, found) in shown.items()}
        with _progress(name, quiet or json_) as on_progress:
            told = {"on_progress": on_progress, "on_text": (lambda _: None) if json_ else _say_at_once}
            try:
                with typed():
                    result = verb(**given, **{n: value for n, value in told.items() if n in parameters})
            except KeyboardInterrupt as stop:
                raise Interrupted("resume" in parameters and _is_kept(given)) from stop
        _print(name, result, given, json_)

    options = [_option(n if n not in flipped else _flag(n), p, found) for n, (p, found) in shown.items()]
    options.append(Parameter("json_", Parameter.KEYWORD_ONLY, default=False, annotation=Json))
    if "on_progress" in parameters:
        options.append(Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet))
    callback.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    callback.__annotations__ = {option.name: option.annotation for option in options}
    return callback


class Interrupted(Exception):
    """A command that was stopped by Ctrl-C, and whether what it finished is kept for --resume."""

    def __init__(self, kept: bool) -> None:
        self.kept = kept


def _is_kept(given: Mapping[str, Any]) -> bool:
    """Whether a run that can be gone on with stands beside what was to be written."""
    from coterie.storage.folders import Folders, partial_of

    out = next((Path(given[name]) for name in ("out", "stats", "dense") if given.get(name)), None)
    return out is not None and any(partial_of(place).is_dir() for place in (out, Folders(out).dense))


def _flag(name: str) -> str:
    """What turns off an option that is on unless asked otherwise."""
    return f"no_{name}"


def _typed(value: Any, shown: Help) -> Any:
    return sys.stdin.read().removesuffix("\n") if shown.stdin and value == "-" else value


def _option(name: str, parameter: Parameter, shown: Help) -> Parameter:
    """A public function's parameter as typer has it: positional ones are arguments, unless they have flags."""
    kind = shown.given or parameter.annotation.__origin__
    default = None if parameter.default == () else False if parameter.default is True else parameter.default
    info: Any = typer.Option(*(shown.flags or (flag_of(name),)), metavar=shown.metavar, help=shown.text)
    if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD and not shown.flags:
        info = typer.Argument(metavar=shown.metavar, help=shown.text)
    annotation: Any = Annotated[kind | None if default is None else kind, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _print(name: str, result: Any, asked: Mapping[str, object], as_json: bool) -> None:
    """Notes on standard error; the result as JSON, or as its verb shows it. Exits with 3 where that has `ok: false`."""
    report = getattr(result, "report", result)
    for note in report.get("warnings" if report is not result else "notes", ()):
        _say(f"note: {note}", err=True)
    if as_json:
        _print_json(result if report is result else result.as_dict())
    else:
        for line in importlib.import_module(f"coterie.verbs.{coterie.VERBS[name].stem}").show(result, asked):
            _say(line)
    if report.get("ok") is False:
        raise typer.Exit(3)


def _say(line: str, *, err: bool = False) -> None:
    """Prints a line. Names come from files: what a terminal would obey is spelled out."""
    typer.echo(printable(line), err=err)


def _say_at_once(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Outside strings JSON has no such characters, and inside them it may spell out any.
    sys.stdout.write("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text) + "\n")


@contextmanager
def _progress(name: str, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """What tells how far a command is, on standard error; says nothing when asked not to."""
    if quiet:
        yield lambda stage, done, total: None
        return
    from coterie.pages.progress import shown

    with shown(name, sys.stderr.isatty(), lambda line: _say(line, err=True)) as on_progress:
        yield on_progress


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits with its code; a refusal is one line on standard error, or JSON on standard output."""
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING, stream=sys.stderr)
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        app = application(next((word for word in words or _completed() if not word.startswith("-")), None))
        code = typer.main.get_command(app).main(words, prog_name="coterie", standalone_mode=False)
        if code == 130:  # what some versions of typer make of Ctrl-C, and others an Abort
            _interrupted()
        sys.exit(code if isinstance(code, int) else 0)
    except CoterieError as error:
        _refuse(error, as_json)
    except Interrupted as stop:
        _interrupted(words if stop.kept else None)
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        # typer's errors come from click or from its own copy of it, by version: known by what they can do.
        if type(error).__name__ == "Abort":
            _interrupted()
        if not hasattr(error, "format_message"):
            raise  # a defect of ours: the traceback is what we want to see, and Python exits with 1
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            sys.exit(2)
        _refuse(error.format_message(), as_json)


def _interrupted(again: list[str] | None = None) -> None:
    """again: the words of a command that can be gone on with."""
    if again:
        command = shlex.join(
            ["coterie", *(word for word in again if word not in ("--resume", "--overwrite")), "--resume"]
        )
        _say(f"interrupted; what is finished is kept, and this goes on: {command}", err=True)
    else:
        _say("interrupted; nothing was finished that could be kept", err=True)
    sys.exit(130)


def _completed() -> list[str]:
    """The words after `coterie` that a shell wants to complete, as typer's scripts hand them over; else none."""
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()[1:]


def _refuse(error: object, as_json: bool) -> None:
    line = " ".join(str(error).split())
    if as_json:
        _print_json({"error": line})
    else:
        _say(f"error: {line}", err=True)
    sys.exit(2)
