"""The command line: parses, calls the library and prints.

The commands of subjects are made by ``cli/subjects.py`` from what their modules in ``reporting/subjects/`` say; of the
others ``cli/<name>.py`` holds one ``command`` each. `COMMANDS` names them all with their line of help, and they are
imported only when they are run, so ``moescope --help`` is quick and needs no extra. stdout is data; all else goes to
stderr. Exit codes: 0 done, 1 the data or the run is at fault, 2 the command line is, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import keyword
import sys
import traceback
import warnings
from difflib import get_close_matches
from typing import Any

import click

import moescope
from moescope.errors import DiskFull, MoescopeError
from moescope.plugins import installed_plugins
from moescope.reporting.printing import say
from moescope.reporting.subjects import COMPARISONS, MEASURES, SIMULATIONS, SUBJECTS

GROUPS = {
    "Record": {
        "record": "Run a model over a corpus and record its routing.",
        "import": "Make a trace of what another program recorded.",
        "verify": "Check every byte of a trace.",
        "demo": "Record the embedded model on the embedded corpus and write its report.",
    },
    "Look": {
        "info": "Show what a trace holds.",
        "text": "Show a document with its tokens coloured by expert.",
        "report": "Write everything as one offline HTML page, with figures and tables.",
        "sql": "Query a trace in SQL.",
    },
    "Measure": {name: line for name, line in {**MEASURES, **COMPARISONS}.items() if line},
    "Simulate": SIMULATIONS,
    "Export": {
        "export": "Write a trace in a format of other programs.",
        "placement": "Write a placement of the experts, fitted on a trace.",
    },
}
"""Commands with their line of help, as ``moescope --help`` lists them."""

COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


class _Commands(click.Group):
    """A group that knows its commands by name, imports them on use and turns errors into lines and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *self._of_plugins()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in SUBJECTS:
            from moescope.cli.subjects import command_of

            return command_of(cmd_name) if SUBJECTS[cmd_name] else None
        if cmd_name not in COMMANDS:
            return self._of_plugins().get(cmd_name)
        module = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = importlib.import_module(f"moescope.cli.{module}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = " or ".join(map(repr, get_close_matches(args[0], self.list_commands(ctx), 2)))
            raise click.UsageError(error.message + f" Did you mean {near}?" * bool(near), ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        plugins = {name: command.get_short_help_str(limit=200) for name, command in self._of_plugins().items()}
        for title, commands in {**GROUPS, "Plug-ins": plugins}.items():
            if commands:
                with formatter.section(title):
                    formatter.write_dl(list(commands.items()), col_max=16)

    def _of_plugins(self) -> dict[str, click.Command]:
        """Commands of other packages; asked for only where ours do not do, since it imports those packages."""
        if not installed_plugins():
            return {}
        from moescope.cli.subjects import plugin_command

        commands = {name: plugin_command(name) for name in installed_plugins() if name not in COMMANDS}
        return {name: command for name, command in commands.items() if command is not None}

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
            except MoescopeError as error:
                _stop(ctx, error.render(), 1)
            except KeyboardInterrupt:
                _stop(ctx, "interrupted", 130)
            except OSError as error:
                if error.errno == errno.EPIPE:  # the reader of a pipe has left: click ends quietly
                    raise
                subject = str(error.filename or "output")
                problem = (error.strerror or str(error)).lower()
                known = DiskFull if error.errno == errno.ENOSPC else MoescopeError
                _stop(ctx, known(subject, problem).render(), 1)


def _stop(ctx: click.Context, message: str, code: int) -> None:
    """Say on stderr what ended the command, after the traceback if ``--debug`` asks for it."""
    if ctx.params.get("debug"):
        traceback.print_exc()
    say(message, err=True)
    ctx.exit(code)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as a line for users; where in the code it arose is not theirs to know."""
    say(f"warning: {message}", err=True)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        say(f"moescope {moescope.__version__}")
        ctx.exit()


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
def main(debug: bool) -> None:
    """See where a Mixture-of-Experts language model sends its tokens, and what that is worth."""
