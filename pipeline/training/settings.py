"""What `pretrain`, `finetune` and `prune` share: one optimisation under DeepSpeed."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting


class TrainSettings(Settings):
    """One optimisation. Batch sizes count rows: segments in pretraining, examples of a task."""

    batch_size: int = setting(32, "Rows of one optimiser step, over all ranks.", unit="rows", ge=1)
    micro_batch_size: int = setting(32, "Most rows of one forward pass on a rank; accumulation follows from it.", unit="rows", ge=1, result=False)
    lr: float = setting(5e-4, "Peak learning rate.", gt=0)
    min_lr_ratio: float = setting(0.0, "Final learning rate over the peak.", ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt", "wsd"] = setting(
        "linear",
        "Decay after warm-up; inverse_sqrt: with the square root of the steps over those of the warm-up;"
        " wsd: none until the last decay_ratio of the steps (warm-up, stable, decay).",
    )
    warmup_ratio: float = setting(0.06, "Share of the steps that the learning rate rises linearly.", ge=0, lt=1)
    decay_ratio: float = setting(0.2, "Share of the steps, the last ones, in which schedule wsd decays.", gt=0, le=1)
    time_budget: float | None = setting(
        None,
        "Training time, over restarts, without start-up and writing of checkpoints. Where it is used up before the steps are done, training ends;"
        " the schedule follows whichever is further, steps or time. So two runs are not the same bits. null: the steps alone count.",
        unit="minutes",
        gt=0,
    )
    warmup_from: float = setting(0.0, "Learning rate that the warm-up starts from, over the peak.", ge=0, le=1)
    optimizer: Literal["adamw", "nesterov"] = setting("adamw", "adamw, or nesterov: gradient descent with Nesterov's momentum.")
    momentum: float = setting(0.99, "Nesterov's momentum.", ge=0, lt=1)
    weight_decay: float = setting(0.01, "Decoupled weight decay, on matrices only.", ge=0)
    betas: tuple[float, float] = setting((0.9, 0.98), "AdamW moment decays.")
    eps: float = setting(1e-6, "AdamW epsilon.", gt=0)
    gradient_clipping: float = setting(1.0, "Largest global gradient norm; 0 never clips.", ge=0)
    activation_checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, about a third more time.", result=False)
    deepspeed: str = setting("zero1", "Name of a file in ds_configs/ or path of a DeepSpeed JSON: ZeRO stage, precision, offload.")
    ranks: int = setting(1, "Local ranks (one a GPU); on Slurm, nodes and tasks say it.", ge=1, result=False)
    log_every: int = setting(10, "Steps between lines of the log.", unit="steps", ge=1, result=False)
    checkpoint_every: int = setting(500, "Steps between checkpoints.", unit="steps", ge=1, result=False)
    keep_checkpoints: int = setting(2, "Newest checkpoints kept while training.", ge=1, result=False)

    @model_validator(mode="after")
    def _warms_up(self) -> TrainSettings:
        if self.schedule == "inverse_sqrt" and not self.warmup_ratio:
            raise ValueError("schedule inverse_sqrt falls by the steps of the warm-up: set warmup_ratio above 0")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"schedule wsd: warmup_ratio {self.warmup_ratio:g} and decay_ratio {self.decay_ratio:g} are more than all steps; lower one of them"
            )
        return self
