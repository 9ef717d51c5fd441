"""The norm of triplet attention's gates: over one process, over several, or frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import two_processes
from torch import Tensor, nn

from plugin_core import TripletAttention

NORMS = ("BN", "SyncBN", "FrozenBN")


def gate_norms(attention: TripletAttention) -> list[nn.Module]:
    return [gate.conv.bn for gate in (attention.cw, attention.hc, attention.hw)]


@pytest.mark.parametrize("norm", ["GN", "bn", "", None])
def test_unknown_norm_is_named_with_those_that_exist(norm):
    with pytest.raises(ValueError, match="norm must be 'BN', 'SyncBN' or 'FrozenBN'") as error:
        TripletAttention(norm=norm)
    assert repr(norm) in str(error.value)


@pytest.mark.parametrize("norm", NORMS)
def test_state_dict_is_the_same_whatever_the_norm(norm):
    published = TripletAttention(kernel_size=3).state_dict()
    attention = TripletAttention(kernel_size=3, norm=norm)
    attention.load_state_dict(published, strict=True)
    assert attention.state_dict().keys() == published.keys()


def test_frozen_norm_uses_running_statistics_in_training_and_learns_nothing():
    attention = TripletAttention(kernel_size=3, norm="FrozenBN").train()
    for norm in gate_norms(attention):
        norm.running_mean.fill_(0.3)
        norm.running_var.fill_(2.0)
    x = torch.randn(2, 4, 5, 6)
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    y = attention(x)
    y.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in attention.state_dict().items())
    assert torch.equal(y, attention.eval()(x))
    learned = {name for name, p in attention.named_parameters() if p.grad is not None}
    assert learned == {f"{gate}.conv.conv.weight" for gate in ("cw", "hc", "hw")}


def test_synchronized_norm_in_one_process_is_batch_norm():
    plain, synchronized = (
        TripletAttention(kernel_size=3),
        TripletAttention(kernel_size=3, norm="SyncBN"),
    )
    synchronized.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(plain(x), synchronized(x))
    for a, b in zip(gate_norms(plain), gate_norms(synchronized), strict=True):
        assert torch.equal(a.running_var, b.running_var)


# ------------------------------------------------------------------------------------ two processes


def train_a_step(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """One step of SGD on the sum over x of a loss; the output and the gradient at x."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
    y = attention(x)
    (y**3).sum().backward()
    optimizer.step()
    assert x.grad is not None
    return y.detach(), x.grad


def joined_batch() -> Tensor:
    return torch.randn(5, 4, 5, 6, generator=torch.Generator().manual_seed(3))


SHARES = {"uneven": ([0, 1], [2, 3, 4]), "empty": ([0, 1, 2, 3, 4], [])}


def steps_of_process(rank: int) -> dict[str, dict[str, Any]]:
    steps = {}
    for name, shares in SHARES.items():
        torch.manual_seed(0)
        attention = TripletAttention(kernel_size=3, norm="SyncBN").train()
        model = nn.parallel.DistributedDataParallel(attention, broadcast_buffers=False)
        y, grad = train_a_step(model, joined_batch()[shares[rank]])
        steps[name] = {"y": y, "grad": grad, "state": attention.state_dict()}
    return steps


@pytest.fixture(scope="module")
def steps_of_both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return two_processes.run(steps_of_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", SHARES)
def test_two_processes_give_what_one_gives_on_the_joined_batch(name, steps_of_both):
    first, second = (steps[name] for steps in steps_of_both)
    torch.manual_seed(0)
    attention = TripletAttention(kernel_size=3).train()
    # DistributedDataParallel averages the gradients of the parameters over the processes.
    optimizer_scale = 0.5
    x = joined_batch().requires_grad_()
    y = attention(x)
    (y**3).sum().backward()
    with torch.no_grad():
        for parameter in attention.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * optimizer_scale * parameter.grad
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), y.detach())
    torch.testing.assert_close(torch.cat([first["grad"], second["grad"]]), x.grad)
    torch.testing.assert_close(first["state"], dict(attention.state_dict()))
    assert all(torch.equal(first["state"][k], second["state"][k]) for k in first["state"])
