"""The `pretrain.objective` section of a recipe: one settings class an objective, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.settings import Settings, setting


class ObjectiveSettings(Settings):
    """What every objective declares before anything runs."""

    needs: ClassVar[str] = "segments"
    """What the plan must provide: `segments`, or `groups` of two or more."""
    groups: ClassVar[tuple[str, ...]] = ("random", "consecutive", "bm25")
    """Of which kinds the plan's groups may be."""
    needs_places: ClassVar[bool] = False
    """Whether batches must say where in its document each token stands."""
    kind: ClassVar[str]
    """The model it trains: `encoder` or `decoder`."""
    head: ClassVar[Literal["mlm", "causal", "none"]] = "mlm"
    """What that model has on its body: `mlm`, `causal`, or `none`."""

    @property
    def needs_words(self) -> bool:
        """Whether batches must say which tokens are one word."""
        return False


class MaskingSettings(ObjectiveSettings):
    """Which tokens are hidden, and what stands in their place."""

    kind: ClassVar[str] = "encoder"
    name: str
    mask_rate: float = setting(0.15, "Share of tokens to hide and predict.", gt=0, lt=1)
    mask_token_rate: float = setting(0.8, "Share of those replaced by the mask token.", ge=0, le=1)
    random_token_rate: float = setting(0.1, "Share of those replaced by a random token; the rest stay.", ge=0, le=1)
    whole_word: bool = setting(False, "Hide whole words: all tokens of a word, or none.")

    @property
    def needs_words(self) -> bool:
        return self.whole_word


class MlmSettings(MaskingSettings):
    """Masked language modelling (Devlin et al. 2019)."""

    name: Literal["mlm"] = "mlm"


class GeneratorSettings(Settings):
    """The small encoder that fills in what was hidden, trained beside the model by its own masked language modelling.

    Its layers are as many as the model's, its width a third, with the model's position scheme; what is given here differs.
    """

    layers: int | None = setting(None, "Transformer blocks; default: as many as the model has.", ge=1)
    heads: int | None = setting(None, "Attention heads of the model's width each; default: a third of the model's.", ge=1)
    ffn: int | None = setting(None, "Width of the feed-forward block; default: as much smaller as the generator is narrower.", unit="neurons", ge=8)
    temperature: float = setting(1.0, "Temperature of the tokens drawn from it.", gt=0)

    def larger_than(self, layers: int, heads: int, ffn: int) -> str | None:
        """What is wrong where the generator has more than a model of these sizes; None where it has not."""
        found = {"layers": (self.layers, layers), "heads": (self.heads, heads), "ffn": (self.ffn, ffn)}
        larger = [f"{name} {own} (the model has {models})" for name, (own, models) in found.items() if own is not None and own > models]
        if not larger:
            return None
        return f"pretrain.objective.generator: {', '.join(larger)}: it must not be larger than the model; make it smaller, or leave these keys out"


class ReplacedTokenSettings(MaskingSettings):
    """What objectives with a generator share: every hidden token is a mask token when the generator sees it."""

    head: ClassVar[Literal["mlm", "causal", "none"]] = "none"
    mask_token_rate: float = setting(1.0, "Share of those replaced by the mask token.", ge=0, le=1)
    random_token_rate: float = setting(0.0, "Share of those replaced by a random token; the rest stay.", ge=0, le=1)
    generator: GeneratorSettings = setting(GeneratorSettings(), "The small encoder that fills in what was hidden.")
    chunk: int = setting(512, "Positions whose vocabulary is held at a time.", unit="positions", ge=1, result=False)


class ElectraSettings(ReplacedTokenSettings):
    """Is each token the original, or the generator's? (Clark et al. 2020)"""

    name: Literal["electra"] = "electra"
    weight: float = setting(50.0, "Weight of the discriminator's loss, the generator's being 1.", gt=0)


class MetaControllerSettings(ReplacedTokenSettings):
    """Which of k options is the original token? The generator, the meta-controller, makes the options (MC-BERT, Xu et al. 2020)."""

    head: ClassVar[Literal["mlm", "causal", "none"]] = "mlm"
    name: Literal["meta_controller"] = "meta_controller"
    options: int = setting(10, "k: options to choose from at each position, `the token shown is right` among them.", ge=2)
    duplicates: Literal["exclude", "keep"] = setting(
        "exclude", "Further copies of the true answer among the options: left out; keep: as in the paper's code, where they count as wrong."
    )
    weight: float = setting(50.0, "Weight of the choice's loss, the controller's being 1.", gt=0)


class StudentSettings(Settings):
    """A smaller dense student of a teacher's width, with its embeddings and head."""

    layers: int = setting(..., "Transformer blocks.", ge=1)
    heads: int = setting(..., "Attention heads of each, of the teacher's width of a head.", ge=1)
    ffn: int = setting(..., "Feed-forward neurons of each.", ge=1)
    initial: Literal["layers", "random"] = setting(
        "layers", "layers: from evenly spaced layers of the teacher, with their heads and neurons of largest weights; random: new layers."
    )


class DistillSettings(MaskingSettings):
    """What the teacher, `model.from`, makes of the text (general distillation: Sanh et al. 2019, Jiao et al. 2020)."""

    name: Literal["distill"] = "distill"
    student: StudentSettings | None = setting(None, "The student's shape. null: the teacher's own, as where it is pruned (pretrain.sparsity).")
    temperature: float = setting(2.0, "Temperature of the teacher's distributions.", gt=0)
    prediction: float = setting(1.0, "Weight of the teacher's distributions of hidden tokens.", ge=0)
    layers: float = setting(1.0, "Weight of the teacher's hidden states and embeddings.", ge=0)
    attention: float = setting(0.0, "Weight of the teacher's attention, scores before the softmax: each head learns the head it was.", ge=0)
    hard_labels: float = setting(0.0, "Weight of the cross-entropy with the tokens that were hidden.", ge=0)

    @model_validator(mode="after")
    def _learns(self) -> DistillSettings:
        if not (self.prediction or self.layers or self.attention):
            raise ValueError("prediction, layers and attention are 0, so nothing is learnt from the teacher; give one a weight, or use objective mlm")
        return self


class CausalSettings(ObjectiveSettings):
    """Next-token prediction."""

    kind: ClassVar[str] = "decoder"
    head: ClassVar[Literal["mlm", "causal", "none"]] = "causal"
    name: Literal["causal"] = "causal"
    chunk: int | None = setting(
        None,
        "Rows of vocabulary scores held at a time, computed again in the backward pass: less memory, and on a CPU less time. null: all.",
        unit="rows",
        ge=1,
        result=False,
    )


class TrimeSettings(ObjectiveSettings):
    """Next-token prediction with in-batch memory: the segment's own past (Zhong et al. 2022)."""

    kind: ClassVar[str] = "decoder"
    head: ClassVar[Literal["mlm", "causal", "none"]] = "causal"
    needs_places: ClassVar[bool] = True
    name: Literal["trimelm"] = "trimelm"
    ce_warmup_ratio: float = setting(0.05, "Share of the steps, the first ones, that learn by cross-entropy without memory.", ge=0, le=1)
    key_gradients: Literal["all", "own_segment"] = setting(
        "all", "Which queries teach a key: all that see it; own_segment: those of its own segment, as in the paper's code with a segment a GPU."
    )
    chunk: int | None = setting(
        512, "Rows of scores held at a time, as for causal, those of the memory too. null: all.", unit="rows", ge=1, result=False
    )


class TrimeLongSettings(TrimeSettings):
    """Next-token prediction with all earlier positions of a group of consecutive segments as memory (Zhong et al. 2022)."""

    needs: ClassVar[str] = "groups"
    groups: ClassVar[tuple[str, ...]] = ("consecutive",)
    name: Literal["trimelm_long"] = "trimelm_long"  # type: ignore[assignment]


class TrimeExtSettings(TrimeSettings):
    """Next-token prediction with every other segment of a group of similar ones as memory, besides the own past (Zhong et al. 2022)."""

    needs: ClassVar[str] = "groups"
    name: Literal["trimelm_ext"] = "trimelm_ext"  # type: ignore[assignment]
    local_dropped: float = setting(0.9, "Probability that a segment's own past is switched off, so that it learns from the others.", ge=0, le=1)


AnyObjective = Annotated[
    MlmSettings | DistillSettings | ElectraSettings | MetaControllerSettings | CausalSettings | TrimeSettings | TrimeLongSettings | TrimeExtSettings,
    Field(discriminator="name"),
]


class NotesSettings(Settings):
    """Taking notes on the fly (Wu et al. 2021): a rare word's contexts are noted down, and read where the word is met again."""

    frequency: tuple[int, int] = setting((100, 500), "Occurrences in the corpus of the words that have a note, from and to.", unit="occurrences")
    weight: float = setting(0.5, "lambda: share of the note in the input of a rare word's tokens; the rest is token and position.", ge=0, le=1)
    decay: float = setting(0.1, "gamma: how much of a note each new context replaces.", gt=0, le=1)
    window: int = setting(16, "k: tokens on either side of a word that its context is the mean of.", unit="tokens", ge=0)
    read_on_masked: bool = setting(False, "Read a note also where a token of its word is hidden, which tells what was hidden.")
    warm: bool = setting(False, "Read a note only once it was written; else it begins as noise.")
    norm: Literal["none", "embedding"] = setting("none", "embedding: a note is read with the length of the vector it is mixed with.")
