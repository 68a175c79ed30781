"""The errors of rmfast that a user can do something about."""

from __future__ import annotations

from importlib import metadata


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def require_transformers(version: str, who: str = "rmfast") -> None:
    """Raise :class:`UserError` where an older version is installed; nothing is imported."""
    from packaging.version import Version

    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return  # the import itself will say so
    if Version(Version(found).base_version) < Version(version):
        raise UserError(
            f"{who} needs transformers {version} or newer, found {found}: "
            f"pip install 'transformers>={version}'"
        )


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the line, and says why."""


class RowError(DataError):
    """One row that cannot be scored.

    Attributes:
        reason: why, for people, without the row's number.
        kind: ``"overlong"`` for too many tokens, else ``"bad"``.
    """

    def __init__(self, reason: str, kind: str = "bad") -> None:
        super().__init__(reason)
        self.reason, self.kind = reason, kind

    def __reduce__(self) -> tuple:  # what other processes send has its kind
        return RowError, (self.reason, self.kind)
