"""The reward head kernel against its definition."""

import pytest
import torch

from rmfast import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 63, 123, 199, 1024, 1025])
@pytest.mark.parametrize("labels", [1, 5])
def test_forward(width, labels, dtype, device):
    from rmfast.kernels import reward_head as kernel

    torch.manual_seed(0)
    hidden = torch.randn(17, 2 * width).to(dtype)[:, ::2].to(device)  # rows are not contiguous
    weight = torch.randn(width, labels).to(dtype).T.to(device)
    index = torch.tensor([16, 3, 3, 0], device=device)
    for bias in (None, torch.randn(labels, device=device)):
        got = kernel.reward_head(hidden, index, weight, bias)
        assert got.dtype == torch.float32
        exact = reference.reward_head(
            hidden.double(), index, weight.double(), bias.double() if bias is not None else None
        )
        # `width` products of unit variance summed in fp32: within `width` units of 2**-24
        assert (got - exact).abs().max() <= max(width, 8) * 2.0**-24 * 4
