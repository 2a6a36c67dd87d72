"""The commands of subjects: they open traces, print tables and save figures; what these are, the subject says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import click

from moescope.errors import MoescopeError, PluginFailed, require
from moescope.plugins import describe, guarded, installed_plugins
from moescope.reporting.numbers import count
from moescope.reporting.options import exclude_option, format_option
from moescope.reporting.printing import print_table, say
from moescope.reporting.subject import Drawing
from moescope.reporting.subjects import load
from moescope.reporting.wording import cover_notes
from moescope.trace import Trace, open_trace


def command_of(name: str) -> click.Command:
    """The command of a subject that has one."""
    show = load(name).command
    assert show is not None
    return exclude_option(format_option(click.command(name)(_run(show))))


def plugin_command(name: str) -> click.Command | None:
    """The command of a subject of another package; None, with a warning, if it fails, and if there is none."""
    with guarded(name):
        if load(name).command is not None:
            command = command_of(name)
            command.callback = _named(name, command.callback)
            return command
    return None


def _named(name: str, run: Callable[..., Any] | None) -> Callable[..., Any]:
    """Run a command of another package; what it fails with is said to be that package's."""
    assert run is not None

    @wraps(run)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (MoescopeError, click.ClickException, click.exceptions.Exit, OSError):
            raise
        except Exception as error:
            subject = describe(installed_plugins()[name])
            raise PluginFailed(subject, f"{type(error).__name__}: {error}", "`moescope --debug` shows where") from error

    return named


def _run(show: Callable[..., Any]) -> Callable[..., None]:
    @wraps(show)
    def run(format: str, exclude: tuple[str, ...], **arguments: Any) -> None:
        folder: Path | None = arguments.get("figures")
        for param in click.get_current_context().command.params:
            if isinstance(param, click.Argument):
                arguments[str(param.name)] = _opened(arguments[str(param.name)], exclude)
        given = [value if isinstance(value, tuple) else (value,) for value in arguments.values()]
        traces = [value for values in given for value in values if isinstance(value, Trace)]
        for trace in traces:
            _remind(trace)
        notes = dict.fromkeys(note for trace in traces for note in cover_notes(trace, arguments.get("layers")))
        printed = 0
        for shown in show(**arguments):
            if isinstance(shown, Drawing):
                _save(shown, folder)
            elif not printed or format in ("text", "latex"):  # the first table's values are all there are
                if printed:
                    say("")
                print_table(replace(shown, notes=(*shown.notes, *notes)), format)
                printed += 1

    vars(run)["__click_params__"] = list(vars(show)["__click_params__"])  # a copy, which click turns round
    return run


def _opened(paths: Path | tuple[Path, ...], exclude: tuple[str, ...]) -> Trace | tuple[Trace, ...]:
    if isinstance(paths, Path):
        return open_trace(paths, exclude=exclude)
    return tuple(open_trace(path, exclude=exclude) for path in paths)


def _remind(trace: Trace) -> None:
    """Say on stderr that the source of a trace had something odd, which its numbers then have, too."""
    if warnings := (trace.summary or {}).get("warnings"):
        say(f"note: {count(len(warnings), 'warning')} about this trace; see `moescope info {trace.path}`", err=True)


def _save(drawing: Drawing, folder: Path | None) -> None:
    """Draw as PNG, SVG and PDF, if a folder is given; it is made.

    Raises:
        MissingExtra: The extra `report` is not installed.
    """
    if folder is None:
        return
    require("matplotlib", extra="report")
    from moescope.reporting.figures.style import save

    folder.mkdir(parents=True, exist_ok=True)
    save(drawing.draw(), folder, drawing.file)
