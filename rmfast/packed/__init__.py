"""Models on packed tries: all that needs transformers comes by here."""

from rmfast.errors import require_transformers

require_transformers("5.0")
