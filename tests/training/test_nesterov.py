from __future__ import annotations

import torch

from pipeline.training.nesterov import Nesterov


def steps(make, count=5):
    """A weight after each step down a bowl, the learning rate changing as schedules do."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer, path = make(weight), []
    for step in range(count):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        weight.grad = weight.detach() * torch.tensor([1.0, 0.5, 0.1])
        optimizer.step()
        path.append(weight.detach().clone())
    return torch.stack(path)


def fairseqs(momentum, decay, count=5):
    """fairseq's `nag` written out: its velocity holds the learning rate, corrected where that changes."""
    weight, velocity, old, path = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3), None, []
    for step in range(count):
        lr, gradient = 0.1 / (step + 1), weight * torch.tensor([1.0, 0.5, 0.1])
        correction = lr / (old or lr)
        weight = weight * (1 - lr * decay) + momentum**2 * correction * velocity - (1 + momentum) * lr * gradient
        velocity, old = momentum * correction * velocity - lr * gradient, lr
        path.append(weight)
    return torch.stack(path)


def test_steps_are_those_of_torchs_sgd():
    expected = steps(lambda weight: torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True))
    torch.testing.assert_close(steps(lambda weight: Nesterov([weight], lr=0.1, momentum=0.9)), expected)


def test_steps_are_those_of_fairseqs_nag_with_its_weight_decay():
    found = steps(lambda weight: Nesterov([{"params": [weight], "weight_decay": 0.3}], lr=0.1, momentum=0.9))
    torch.testing.assert_close(found, fairseqs(0.9, 0.3))
