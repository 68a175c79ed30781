"""One thread at a time for a model that scores."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rmfast.packed import patching
from rmfast.packed.models import keeping_modes

# by object: a lock that was an attribute could be neither copied nor pickled
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKING = threading.Lock()


def lock_of(owner: Any) -> threading.RLock:
    """The lock of a scorer or a model."""
    with _LOCKING:
        return _LOCKS.setdefault(owner, threading.RLock())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, without gradients, then back in the modes it was in.

    One thread at a time: these modes are the model's, and so are rotary frequencies that depend on
    the rows that ran before.
    """
    with lock_of(patching.attached(model) or model), keeping_modes(model):
        model.eval()
        with torch.inference_mode():
            yield
