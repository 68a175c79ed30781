"""Docstrings are written with roles and literal blocks of reStructuredText; pages are Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Make links of roles, and plain indented blocks of those that ``::`` begins."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        rewrite(pkg)


def rewrite(found: griffe.Object) -> None:
    if found.docstring is not None:
        text = ROLE.sub(lambda role: link(role[1], found), found.docstring.value)
        text = re.sub(r"(?m)^ *::\n", "", text)
        found.docstring.value = re.sub(r"(?m)::$", ":", text)
    for member in found.members.values():
        if not member.is_alias:
            rewrite(member)


def link(name: str, place: griffe.Object) -> str:
    """A link where the name has a page, else the name."""
    try:
        target = place.resolve(name)
    except griffe.NameResolutionError:
        target = name
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
