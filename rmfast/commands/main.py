"""The command ``rmfast``. A subcommand imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    import typer

    from rmfast.commands import bench, run, train, work
    from rmfast.errors import DataError, UserError
except KeyboardInterrupt:  # no command has begun
    sys.exit(130)

app = typer.Typer(
    help="Hugging Face reward models train and score without running a token twice.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (work, train, run, bench):
    module.add(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (left out: the process's own); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(["rmfast", *argv[:1]]) if argv and not argv[0].startswith("-") else "rmfast"
    try:
        return app(argv, prog_name="rmfast", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except (UserError, DataError) as error:
        return fail(name, str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own: a wrong or missing option
            raise
        message = error.format_message()  # none where the help was printed
        return fail(name, f"{message} ({name} --help lists the options)") if message else 2


def fail(name: str, message: str) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def print_version(wanted: bool) -> None:
    if wanted:
        from rmfast import __version__

        print(f"rmfast {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and exit.",
        callback=print_version,
        is_eager=True,
    ),
) -> None:
    pass
