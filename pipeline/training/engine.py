"""The DeepSpeed engine: starting the ranks, building it around a trainee, full weights out of it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.attention import Attention
from pipeline.models.modeling_trimline import FeedForward
from pipeline.training.nesterov import Nesterov
from pipeline.training.settings import TrainSettings

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=1)
"""Ranks wait so long for the first, which alone scores, measures and writes down. DeepSpeed gives it ten minutes; a rank that dies ends the others
through the launcher."""


def start() -> torch.device:
    """Joins torch.distributed (NCCL with CUDA, else gloo) and returns this rank's device. Does nothing the second time.

    Started by the DeepSpeed launcher or by srun, the five variables of `RENDEZVOUS` are set; with none of them this
    process is alone and sets them itself, so that DeepSpeed does not look for MPI.
    Raises UserError where only some are set.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    elif missing:
        raise UserError(f"environment: {', '.join(missing)} not set; start the ranks with the deepspeed launcher, or set {', '.join(RENDEZVOUS)}")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # a line for each of DeepSpeed's collectives
    warnings.filterwarnings("ignore", "barrier", category=UserWarning, module="torch.distributed")  # of a rank alone, which DeepSpeed binds to no GPU
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        if not cuda:  # DeepSpeed would compile a shared-memory all-reduce, for over a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=PATIENCE)
    return device


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what DeepSpeed prints to stdout inside the block."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def build(trainee: nn.Module, config: dict[str, Any], settings: TrainSettings) -> Any:
    """A `deepspeed.DeepSpeedEngine` around the trainee, with the recipe's optimiser; weights are those of rank 0.

    config: from `deepspeed_config.render`. Weight decay is on tensors of two or more dimensions only.
    """
    import deepspeed

    trained = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "nesterov":
        optimizer = Nesterov(groups, lr=settings.lr, momentum=settings.momentum)
    else:
        fused = "offload_optimizer" not in config.get("zero_optimization", {})  # on CPUs too, where it is six times as fast
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
    if config.get("zero_optimization", {}).get("stage") == 3:  # they use their layers' weights themselves, those of open units
        deepspeed.utils.set_z3_leaf_modules(trainee, [Attention, FeedForward], raise_if_not_found=False)
    with quiet():
        engine, *_ = deepspeed.initialize(model=trainee, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def recompute_activations(trainee: nn.Module) -> None:
    """Lets every network in the trainee, its model and its objective's own, compute activations again in the backward pass."""
    for module in trainee.modules():
        enable = getattr(module, "activation_checkpointing_enable", None)  # the name since transformers 5
        enable = enable or getattr(module, "gradient_checkpointing_enable", None)
        if enable is not None:
            enable()


def precision(config: dict[str, Any]) -> str:
    """`bf16` or `fp32`: what the multiplications are done in."""
    half = config.get("bf16", {}).get("enabled") or config.get("torch_autocast", {}).get("enabled")
    return "bf16" if half else "fp32"


def zero_stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def step(engine: Any) -> Tensor:
    """One optimiser step after the last micro-batch's backward. Returns the gradient norm before clipping, a scalar on the device."""
    norm = None
    if zero_stage(engine) == 0 and not engine.bfloat16_enabled():  # DeepSpeed clips here without telling the norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return torch.as_tensor(norm, device=engine.device).detach().double()


def full_weights(engine: Any, model: nn.Module) -> dict[str, Tensor] | None:
    """On rank 0 the state dict of `model` (a part of the trainee): fp32 master weights on the CPU; None on the others.

    Every rank must call it. One tensor at a time is whole on the device, so memory suffices wherever training ran.
    """
    from deepspeed import comm
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    first = comm.get_rank() == 0
    names = list(model.state_dict(keep_vars=True))
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            with GatheredParameters([parameter], enabled=full is None and hasattr(parameter, "ds_id")):
                full = parameter if full is None else full
                seen[id(parameter)] = full.detach().float().cpu().clone() if first else torch.empty(0)
        found[name] = seen[id(parameter)]
    found |= {name: buffer.detach().cpu().clone() for name, buffer in persistent_buffers(model).items()}
    return {name: found[name] for name in names} if first else None


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state dict, by name."""
    names = set(module.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name in names}


def close(engine: Any) -> None:
    """Frees the engine, so that the same process can build another. The ranks stay joined."""
    engine.destroy()
