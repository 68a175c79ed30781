"""Models on packed tries: all that needs transformers comes by here."""

import contextlib
from importlib import metadata

from rmfast.errors import UserError

with contextlib.suppress(metadata.PackageNotFoundError):  # the import itself will say so
    _found = metadata.version("transformers")
    if int(_found.partition(".")[0]) < 5:
        raise UserError(
            f"rmfast needs transformers 5.0 or newer, found {_found}: "
            "pip install 'transformers>=5.0'"
        )
