"""SimAM against the authors' code, and by hand."""

from __future__ import annotations

import pytest
import torch

from plugin_core.methods.simam import SimAM

# What networks/attentions/simam_module.py of github.com/ZjjConan/SimAM computes of X below, in the
# last map of the last image, and its gradient for the weights below; by e_lambda.
GOLDEN = {
    1e-4: (
        [-0.6839602, -0.5931209, -0.4215849, -0.2175038, 0.0089926, 0.2770621],
        [0.6312592, 0.6011461, 0.5268181, 0.4897387, 0.5795541, 0.7972867],
        0.2797583,
    ),
    0.1: (
        [-0.6677760, -0.5831593, -0.4194852, -0.2174152, 0.0088634, 0.2665523],
        [0.6130292, 0.5914236, 0.5357320, 0.5078994, 0.5738538, 0.7413650],
        0.2081357,
    ),
}
X = (torch.arange(36.0).reshape(2, 3, 2, 3) * 0.37).sin()
WEIGHTS = torch.arange(36.0).reshape(2, 3, 2, 3) / 36


@pytest.mark.parametrize("e_lambda", GOLDEN)
def test_values_and_gradients_are_the_authors(e_lambda):
    x = X.clone().requires_grad_()
    y = SimAM(e_lambda=e_lambda)(x)
    (gradient,) = torch.autograd.grad((y * WEIGHTS).sum(), x)
    values, slopes, total = GOLDEN[e_lambda]
    torch.testing.assert_close(y[1, 2].flatten(), torch.tensor(values), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient[1, 2].flatten(), torch.tensor(slopes), atol=1e-5, rtol=0)
    assert y.sum().item() == pytest.approx(total, abs=1e-5)


def test_a_channel_without_variance_is_scaled_by_the_sigmoid_of_a_half():
    x = torch.full((1, 2, 3, 4), -2.0)
    torch.testing.assert_close(SimAM()(x), x * torch.sigmoid(torch.tensor(0.5)))
    torch.testing.assert_close(SimAM()(x[..., :1, :1]), x[..., :1, :1] * 0.6224593)


@pytest.mark.parametrize("e_lambda", [0, -1.0, "small"])
def test_wrong_lambda_is_named(e_lambda):
    with pytest.raises(ValueError, match=f"^e_lambda must be positive, got {e_lambda!r}$"):
        SimAM(8, e_lambda)
