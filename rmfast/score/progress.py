"""The progress bar of scoring."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(**options: Any) -> tqdm:
    """A bar on stderr, with tqdm's options; every 10 seconds where stderr is no terminal."""
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc="scoring", mininterval=pause, miniters=0, **options)
