import errno
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import moescope
from moescope import cli
from moescope.cli import main
from moescope.errors import MissingExtra, NoSuchLayer
from moescope.reporting.options import format_option, layers_option

RUN_LIGHT = """
import sys
import moescope
from moescope.cli import main
main(["--help"], standalone_mode=False)
heavy = {"torch", "transformers", "matplotlib", "numba", "pyarrow", "pandas", "xarray", "scipy"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""


@pytest.fixture
def probe(monkeypatch):
    """Run a function of the test's as the command ``info``."""

    def run(body, *before):
        command = click.command("info")(body)
        monkeypatch.setattr(type(cli.main), "get_command", lambda group, ctx, name: command)
        return CliRunner().invoke(cli.main, [*before, "info"])

    return run


def test_help_lists_every_command_with_its_line():
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    for name, line in cli.COMMANDS.items():
        assert f"{name} {line}" in words


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_opens_its_help_with_the_line_of_the_table(name):
    result = CliRunner().invoke(cli.main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f" {cli.COMMANDS[name]} " in " ".join(result.stdout.split())


def test_importing_moescope_and_asking_for_help_load_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", RUN_LIGHT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_error_of_ours_is_two_lines_on_stderr_and_exit_1(probe):
    def fail():
        raise NoSuchLayer("pile.moe", "has no layer 99", "it has layers 0 to 31")

    result = probe(fail)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error[no-such-layer]: pile.moe: has no layer 99\nhint: it has layers 0 to 31\n"


def test_a_path_in_an_error_does_not_drive_the_terminal(probe):
    def fail():
        raise NoSuchLayer("\x1b[2Jpile\u202e.moe", "has no layer 99")

    assert probe(fail).stderr == "error[no-such-layer]: ␛[2Jpile⟨U+202E⟩.moe: has no layer 99\n"


def test_debug_adds_the_traceback(probe):
    def fail():
        raise NoSuchLayer("pile.moe", "has no layer 99")

    result = probe(fail, "--debug")
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.endswith("\nerror[no-such-layer]: pile.moe: has no layer 99\n")


def test_an_interrupt_is_one_line_and_exit_130(probe):
    def interrupt():
        raise KeyboardInterrupt

    result = probe(interrupt)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_a_full_disk_is_named_whoever_meets_it(probe):
    def fill():
        raise OSError(errno.ENOSPC, "No space left on device", "report/index.html")

    result = probe(fill)
    assert (result.exit_code, result.stderr) == (
        1,
        "error[disk-full]: report/index.html: no space left on device\n",
    )


def test_a_file_we_may_not_read_is_one_line(probe):
    def refuse():
        raise PermissionError(errno.EACCES, "Permission denied", "pile.moe/trace.json")

    result = probe(refuse)
    assert (result.exit_code, result.stderr) == (1, "error[error]: pile.moe/trace.json: permission denied\n")


def test_a_bug_of_ours_is_not_hidden(probe):
    def crash():
        raise ZeroDivisionError("ours")

    assert isinstance(probe(crash).exception, ZeroDivisionError)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line_on_stderr_without_our_source(probe):
    def warn():
        warnings.warn("val.jsonl: line 3: not JSON", stacklevel=2)
        click.echo("data")

    result = probe(warn)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "data\n", "warning: val.jsonl: line 3: not JSON\n")


def test_an_unknown_command_is_a_fault_of_the_command_line():
    result = CliRunner().invoke(cli.main, ["shars"])
    assert result.exit_code == 2
    assert "No such command 'shars'" in result.stderr


ENDLESS = """
import click
from moescope.cli import main
rows = click.Command("info", callback=lambda: [print("row") for _ in range(99999)])
type(main).get_command = lambda group, ctx, name: rows
main(["info"])
"""


def test_a_reader_that_leaves_the_pipe_ends_us_quietly():
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$0" | head -n 1', ENDLESS], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("row\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ENDLESS], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "error[disk-full]: output: no space left on device\n")


def test_version_is_the_package_s():
    result = CliRunner().invoke(cli.main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"moescope {moescope.__version__}\n")


@pytest.mark.parametrize(
    ("given", "layers"), [("0,15,31", (0, 15, 31)), (" 3 , 1,3", (1, 3)), ("7", (7,)), ("0-3,2 - 4", (0, 1, 2, 3, 4))]
)
def test_layers_are_numbers_and_ranges_with_commas(given, layers):
    seen = []
    command = click.command()(layers_option(lambda layers: seen.append(layers)))
    assert CliRunner().invoke(command, ["--layers", given]).exit_code == 0
    assert CliRunner().invoke(command, ["--layer", given]).exit_code == 0
    assert CliRunner().invoke(command, []).exit_code == 0
    assert seen == [layers, layers, None]


@pytest.mark.parametrize("given", ["", "a", "1,,2", "-1", "1.5", "²", "4-1", "0-99999999", "1-2-3"])
def test_anything_else_is_not_a_list_of_layers(given):
    command = click.command()(layers_option(lambda layers: None))
    result = CliRunner().invoke(command, ["--layers", given])
    assert result.exit_code == 2
    assert f"expected numbers or ranges, such as 0,15,20-31; found {given!r}." in result.stderr


def test_the_format_is_text_unless_said():
    command = click.command()(format_option(lambda format: click.echo(format)))
    assert CliRunner().invoke(command, []).stdout == "text\n"
    assert CliRunner().invoke(command, ["--format", "csv"]).stdout == "csv\n"
    assert CliRunner().invoke(command, ["--format", "xml"]).exit_code == 2


def test_a_near_miss_of_a_command_is_suggested() -> None:
    assert "No such command 'shars'. Did you mean 'shares'?" in CliRunner().invoke(main, ["shars", "x"]).stderr
    assert "Did you mean" not in CliRunner().invoke(main, ["xyzzy"]).stderr


def test_a_name_whose_extra_is_missing_is_there_and_says_so_when_it_is_used(monkeypatch) -> None:
    def missing(module: str, *, extra: str) -> None:
        raise MissingExtra(module, "is not installed", f"pip install 'moescope[{extra}]'")

    for name in [name for name in sys.modules if name.startswith("moescope.watching")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("moescope.errors.require", missing)
    stand_in = moescope.RoutingCallback
    assert stand_in.__name__ == "RoutingCallback"
    with pytest.raises(ImportError, match="is not installed"):
        stand_in()


def test_the_defaults_of_record_need_no_callback_since_demo_passes_them_on() -> None:
    command = cli.main.get_command(click.Context(cli.main), "record")
    ctx = click.Context(command)
    for param in command.params:
        if isinstance(default := param.get_default(ctx), (int, float, str)):
            assert param.process_value(ctx, default) == param.type_cast_value(ctx, default), param.name
