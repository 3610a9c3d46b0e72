"""The command line: its commands, and how errors leave it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from dsv4 import __version__
from dsv4.cli._output import print_json
from dsv4.cli.bench import bench
from dsv4.cli.compile import compile_kernels
from dsv4.cli.convert import convert
from dsv4.cli.doctor import doctor
from dsv4.cli.generate import generate
from dsv4.cli.inspect import inspect
from dsv4.cli.verify import verify
from dsv4.errors import Dsv4Error

# Newer typers carry their own copy of click and export of its errors only this one, whose base all usage errors have.
_UsageError = cast(type[Exception], typer.BadParameter.__base__)


class _OneLineErrors(TyperGroup):
    """Errors that dsv4 or the system raise on purpose become one line on stderr; defects keep their traceback.

    Exit codes: 1 for an error, 2 for a command line that makes no sense, 130 for Ctrl-C. With ``--json``, stdout gets
    ``{"error": "..."}``.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except (Dsv4Error, OSError) as error:
            _fail(error, 1, as_json="--json" in args)
        except typer.Abort:
            sys.exit(130)
        except _UsageError as error:
            _fail(error, 2, as_json="--json" in args)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, code: int, *, as_json: bool) -> NoReturn:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    line = " ".join(text.split())
    if as_json:
        print_json({"error": line})
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


app = typer.Typer(
    name="dsv4",
    cls=_OneLineErrors,
    help="NVFP4 mixture-of-experts inference for DeepSeek-V4-class models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(doctor)
app.command()(bench)
app.command()(convert)
app.command()(inspect)
app.command()(verify)
app.command("compile")(compile_kernels)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass
