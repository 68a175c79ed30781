"""From a dataclass of options to a command line."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from rmfast.arguments import Options, flag, kind_of
from rmfast.resume import interrupted

# an option may be written with _ for -, as RewardBench has them
SETTINGS = {"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 100}


def command(
    app: typer.Typer,
    name: str,
    options: type[Options],
    work: Callable[[Any], int | None],
    help: str,
    epilog: str | None = None,
    config: Any = None,
) -> None:
    """Add a command that makes ``options`` of its flags and hands them to ``work``.

    Args:
        config: an option, named ``config``, that reads defaults of the others from a file.
    """

    def run(**given: Any) -> int | None:
        given.pop("config", None)
        given |= {name: ",".join(x) for name, x in given.items() if isinstance(x, list)}
        return interruptible(name, lambda: work(options(**given)))

    fields = sorted(
        dataclasses.fields(options), key=lambda field: field.default is not dataclasses.MISSING
    )
    parameters = [parameter(options, field) for field in fields]
    if config is not None:
        kind = Annotated[str | None, config]
        parameters.append(keyword("config", None, kind))
    run.__signature__ = inspect.Signature(parameters)
    app.command(name, help=help, epilog=epilog, context_settings=SETTINGS)(run)


def interruptible(name: str, work: Callable[[], int | None]) -> int | None:
    """The exit code of a command's work; 130, and a line, where the user interrupts it."""
    try:
        return work()
    except KeyboardInterrupt:  # typer would say nothing
        return interrupted(name)


def parameter(options: type[Options], field: dataclasses.Field) -> inspect.Parameter:
    """A field as a parameter that typer reads."""
    kind, names = kind_of(options, field.name), (flag(field.name), *field.metadata.get("names", ()))
    default, how = field.default, {}
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        how["metavar"] = f"[{'|'.join(choices)}]"
        kind = str
    elif kind is bool:
        both = default is not False or field.metadata.get("both")
        names = (f"{names[0]}/--no-{names[0][2:]}",) if both else names
        how["metavar"] = ""
    else:
        how["metavar"] = field.metadata.get("metavar", field.name.upper())
        kind = list[str] if field.metadata.get("several") else kind
    declared = typer.Option(
        *names,
        help=field.metadata["help"],
        rich_help_panel=field.metadata.get("group"),
        show_default=default is not None and kind is not bool,
        **how,
    )
    required = default is dataclasses.MISSING
    kind = Annotated[kind if required else kind | None, declared]
    return keyword(field.name, ... if required else default, kind)


def keyword(name: str, default: Any, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
