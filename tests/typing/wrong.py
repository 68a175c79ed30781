"""Mistakes of a user that mypy finds, each by the name in the comment beside it."""

from torch import Tensor, nn

import rmfast
from rmfast import losses


def mistakes(model: nn.Linear, scores: Tensor) -> None:
    rmfast.patch(model, pooling=1)  # arg-type
    name: str = rmfast.patch(model)  # assignment
    losses.bradley_terry(scores)  # call-arg
    count = rmfast.report(model).fallback  # attr-defined
    rmfast.Scorer(model, max_token=4096)  # call-arg
    print(name, count)
