"""How a student is pruned (CoFi, Xia et al. 2022) and what it learns from its teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.settings import Settings, setting

Unit = Literal["attention", "feedforward", "heads", "neurons", "hidden"]


LayerMapping = Literal["free", "ordered", "fixed", "ordered_as_coded"]


class DistillationSettings(Settings):
    """The loss a student learns its teacher from."""

    teacher: str | None = setting(None, "Model directory to learn from: of the same task, labels and vocabulary. null: the fine-tuned model.")
    teacher_outputs: str | None = setting(
        None,
        "Black box: a file of a teacher's logits in place of the model, for each training example in the order of finetune's task.json. .npz:"
        ' `logits` [examples, labels]; .jsonl: a line {"logits": [..]} each.',
    )
    temperature: float = setting(2.0, "Temperature of the soft labels.", gt=0)
    prediction: float = setting(0.5, "Weight of the soft-label loss.", ge=0)
    layers: float = setting(0.5, "Weight of the layer-wise loss; 0: outputs alone.", ge=0)
    mapping: LayerMapping = setting(
        "ordered",
        "Which layer learns each of the teacher's four while masks are trained. ordered: the nearest alive, higher ones from higher; free: the"
        " nearest, maybe the same for all; fixed: evenly spaced ones; ordered_as_coded: as the official code has it.",
    )
    recovery_mapping: LayerMapping = setting(
        "fixed", "The same once units are removed. fixed: evenly spaced ones of the layers left; where they are fewer than four, of as many."
    )
    attention: float = setting(
        0.0, "Weight, in the recovery, of attention's scores before the softmax, which each head left learns from the head it was.", ge=0
    )
    hard_labels: float = setting(0.0, "Weight of the loss of the true labels.", ge=0)
    augment: int = setting(
        0,
        "So many copies of each training example, in which words give way to others like them, are learnt from too, as TinyBERT does: it may help a"
        " small student that else learns few examples by heart, and harm where such words change the label, as of grammar. Passes over the training"
        " split are so much longer.",
        ge=0,
    )
    record: float = setting(
        4.0,
        "What the teacher says of each training row is written down once, its hidden states in fp16, where it takes no more disk than this; else, or"
        " with `attention`, the teacher runs in every step.",
        unit="GiB",
        ge=0,
    )

    @model_validator(mode="after")
    def _learns(self) -> DistillationSettings:
        if not self.prediction + self.layers + self.hard_labels:
            raise ValueError("prediction, layers and hard_labels are all 0: nothing is learnt; give one of them a weight")
        if self.teacher_outputs and self.augment:
            raise ValueError(f"augment: {self.augment} has the teacher speak of new texts, of which teacher_outputs has nothing: set augment: 0")
        if self.teacher_outputs and self.teacher:
            raise ValueError("teacher and teacher_outputs are two teachers; give one")
        for name, what in (("layers", "hidden states"), ("attention", "attention")):
            if self.teacher_outputs and (weight := getattr(self, name)):
                raise ValueError(f"{name}: {weight:g} learns a teacher's {what}, which teacher_outputs does not have: set {name}: 0")
        return self


def _several(value: Any) -> Any:
    """One is a list of one, null an empty one."""
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


Share = Annotated[float, Field(gt=0, lt=1)]
SpeedUp = Annotated[float, Field(gt=1)]


class ShapeSettings(Settings):
    """A shape that every layer has."""

    layers: int = setting(..., "Layers to be left.", ge=1)
    heads: int = setting(..., "Heads of each.", ge=1)
    ffn: int = setting(..., "Feed-forward neurons of each.", ge=1)
    hidden: int | None = setting(None, "Dimensions of the residual stream. null: the model's.", ge=1)


class TimingSettings(Settings):
    """The batch whose time counts in a speed-up."""

    rows: int = setting(1, "Rows of the batch.", unit="rows", ge=1)
    length: int = setting(128, "Length of each row.", unit="tokens", ge=1)
    threads: int | None = setting(None, "CPU threads. null: PyTorch's.", ge=1)


class OneShotSettings(Settings):
    """Method one-shot: units are ranked once, by what the loss of the labels loses without them."""

    examples: int = setting(2048, "Training examples that importance is measured on.", unit="examples", ge=1)


class SparsitySettings(Settings):
    """What to remove, and how the masks get there."""

    target: Annotated[tuple[Share, ...], BeforeValidator(_several)] = setting(
        (0.6,),
        "Share of the encoder's prunable parameters to remove. Several: a model of each, the next target from the masked student of the one before.",
    )
    speed_up: Annotated[tuple[SpeedUp, ...], BeforeValidator(_several)] = setting(
        (), "In place of target: how many times faster the layers are to be on this machine, by a table measured first. Several: as of target."
    )
    timing: TimingSettings = setting(TimingSettings(), "The batch whose time counts in speed_up.")
    shape: ShapeSettings | None = setting(None, "In place of target: a shape that every layer has.")
    units: tuple[Unit, ...] = setting(("heads", "neurons"), "What the masks stand for.", min_length=1)
    head_share: float | None = setting(
        0.5,
        "Of what is kept, attention's share, the rest being feed-forward's: units compete with their like. null: whatever the masks come to, as in"
        " the paper, where all heads may go before any of them is missed.",
        ge=0,
        le=1,
    )
    prepruning_ratio: float = setting(0.05, "Share of the steps that only distil, before any mask moves.", ge=0, lt=1)
    warmup_ratio: float = setting(0.4, "Share of the steps over which the target rises from 0.", ge=0, lt=1)
    evaluate_every: float = setting(
        1.0, "Once the target is at its full, the student is scored on the development split this often, and the best is kept.", unit="epochs", gt=0
    )
    mask_lr: float = setting(0.05, "Learning rate of the masks' log alpha and of the Lagrange multipliers.", gt=0)
    gate_lr_ratio: float = setting(
        0.2,
        "Learning rate of the masks on whole layers, over mask_lr. At 1 such a mask travels as fast as each of the many in its layer and takes all"
        " of them with it, so that the layers fall first.",
        gt=0,
    )

    @model_validator(mode="after")
    def _one_goal(self) -> SparsitySettings:
        given = [name for name in ("target", "speed_up", "shape") if name in self.model_fields_set and getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are different things to reach; give one of them, and set what is inherited to null")
        for name, values in (("target", self.target), ("speed_up", self.speed_up)):
            if list(values) != sorted(set(values)) or (name == "target" and not values and not given):
                raise ValueError(f"{name} {list(values)}: give one or more, each above the one before, since each goes on from there")
        if len(set(self.units)) < len(self.units):
            raise ValueError(f"units {list(self.units)}: name each once")
        return self

    @model_validator(mode="after")
    def _leaves_steps(self) -> SparsitySettings:
        if self.prepruning_ratio + self.warmup_ratio >= 1:
            raise ValueError("prepruning_ratio + warmup_ratio must leave steps at the full target: keep their sum below 1")
        return self
