"""Docstrings are written with roles and literal blocks of reStructuredText; pages are Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")
LINK = r'<autoref identifier="\1" optional><code>\1</code></autoref>'


class Roles(griffe.Extension):
    """Make links of roles, and of ``::`` the end of a sentence."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(LINK, obj.docstring.value)
            text = re.sub(r"(?m)^ *::\n", "", text)
            obj.docstring.value = re.sub(r"(?m)::$", ":", text)
