"""Stochastic gradient descent with Nesterov's momentum, kept as DeepSpeed can move it to another number of ranks."""

from __future__ import annotations

from typing import Any

import torch


class Nesterov(torch.optim.Optimizer):
    """b <- momentum b + g;  w <- (1 - lr weight_decay) w - lr (g + momentum b).

    The form of PyTorch's SGD (Sutskever et al. 2013) and, though written otherwise, of fairseq's `nag`, whose decoupled weight decay it has.
    DeepSpeed's universal checkpoints know the names of Adam's moments alone: b goes by the first, and by the second too, as one tensor.
    """

    def __init__(self, params: Any, lr: float, momentum: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
                state["step"] += 1
                buffer = state["exp_avg_sq"] = state["exp_avg"]
                buffer.mul_(momentum).add_(parameter.grad)
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(parameter.grad.add(buffer, alpha=momentum), alpha=-lr)
