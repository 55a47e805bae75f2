"""The tokenizer: trained from a specification, or taken as it is; always a directory that `AutoTokenizer.from_pretrained` loads.

SentencePiece models are kept as `spm.model` and rewritten for the `tokenizers` library, with the same ids for every text. Text is
text: `<s>` or `<mask>` written in a document is encoded letter by letter (`split_special_tokens`), not taken for a special token.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.corpus import words
from pipeline.corpus.settings import Specification
from pipeline.errors import UserError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
"""Special tokens of the tokenizers trained here; their places are their ids."""
ROLES = {
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "bos_token": ("<s>", "[CLS]"),
    "eos_token": ("</s>", "[SEP]"),
    "mask_token": ("<mask>", "[MASK]"),
}
"""Role -> names it goes by in SentencePiece models. bos is also cls, eos also sep."""

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BULK = "bulk_encoder"
"""Key of tokenizer_config.json: what gives the same ids as tokenizer.json, faster (SentencePiece's unigram by a factor of 6)."""
_QUANTUM = 1 / 64
"""Scores of unigram pieces are multiples of this. Sums of them are exact, in SentencePiece's 32-bit floating point up to 2**18 (about
100 kB of text) as in the 64 bits of `tokenizers`: rounding then never decides between two segmentations, and both give the same ids."""
_NEVER = -(2.0**14)
"""Score, in tokenizer.json, of pieces that text must not be cut into: `tokenizers`, other than SentencePiece, would find `<s>` or `<0x0A>`
written in a text. Any other segmentation is better, where there is one: every character of their names has a piece."""
_PART = 1 << 14
_CUT = re.compile(f"[^ {_SPACE}](?= )")
_LINE = 1 << 15
"""Characters. SentencePiece would drop longer training lines; they are cut."""
_KEPT = ("*.json", "*.txt", "*.model", "*.jinja")
_AWKWARD = ("a", "word", "two words", "Hello, world! 1234567890", "don't (stop) x=y_z", "naive cafe", "A sentence. Another one?")
"""Every taken SentencePiece model must agree on these besides a sample of the corpus."""


def load(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, without running code from it.

    Raises UserError when there is none, or it is not one of the `tokenizers` library.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever the reader of a missing or foreign file raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{directory}: not a tokenizer directory that AutoTokenizer loads: {reason}; give one with tokenizer.json") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{directory}: {type(tokenizer).__name__} has no fast form; save it with tokenizer.json first")
    return tokenizer


def train(specification: Specification, texts: Iterable[str], directory: Path) -> None:
    """Train on texts and write the directory, complete or not at all. The same texts give the same tokenizer.

    Raises UserError when the texts cannot fill the vocabulary, or the vocabulary cannot hold their characters.
    """
    with _whole(directory) as place:
        if specification.kind == "bytes":
            _save(_byte_backend(), dict(zip(ROLES, SPECIAL, strict=True)), place, "bytes")
            return
        if specification.kind == "words":
            _save(words.backend(texts, SPECIAL, specification.vocab_size), dict(zip(ROLES, SPECIAL, strict=True)), place, "words")
            return
        model = _train_sentencepiece(specification, texts)
        (place / "spm.model").write_bytes(model)
        backend, roles = _converted(model, directory)
        _save(backend, roles, place, "spm.model" if specification.kind == "unigram" else None)


def take(path: Path, directory: Path, sample: Iterable[str] = ()) -> None:
    """Take a SentencePiece .model, or a Hugging Face tokenizer directory as it is. sample: texts the two forms of a .model are compared on.

    Raises UserError for a file that is neither, a tokenizer without an end token, and a .model whose ids the rewritten form does not give.
    """
    with _whole(directory) as place:
        if path.is_dir():
            for file in sorted({file for pattern in _KEPT for file in path.glob(pattern)}):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, place / file.name)
            end_token(load(place), path)
            return
        model = path.read_bytes()
        backend, roles = _converted(model, path)
        _save(backend, roles, place)
        (place / "spm.model").write_bytes(model)
        _check_same_ids(model, load(place), itertools.chain(_AWKWARD, sample), path)


def end_token(tokenizer: PreTrainedTokenizerFast, place: str | Path) -> int:
    """The id that ends a document: `eos`, or `sep` where there is none."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise UserError(f"{place}: the tokenizer has neither an eos nor a sep token to end documents; add eos_token to tokenizer_config.json")
    return int(found)


class Encoder:
    """Bulk encoding for the store: no special tokens but the one that ends each document."""

    def __init__(self, directory: Path) -> None:
        tokenizer = load(directory)
        self.vocab_size = len(tokenizer)
        self._end = end_token(tokenizer, directory)
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bulk = tokenizer.init_kwargs.get(_BULK)
        self._words = {word: number for word, number in self._backend.get_vocab().items() if word not in SPECIAL} if self._bulk == "words" else {}
        self._sentencepiece = None
        if self._bulk == "spm.model" and (directory / self._bulk).is_file():  # an exported model's directory has tokenizer.json only
            import sentencepiece

            self._sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(directory / self._bulk))

    def encode(self, texts: Sequence[str]) -> Iterator[npt.NDArray[np.int64]]:
        """Ids [length] of each text, its end token last."""
        if self._sentencepiece is not None:
            parts = [_parts(text) for text in texts]
            encoded = iter(self._sentencepiece.encode([part for several in parts for part in several], num_threads=os.cpu_count()))
            found: Iterator[list[int]] = (list(itertools.chain.from_iterable(itertools.islice(encoded, len(several)))) for several in parts)
        elif self._bulk == "bytes":
            found = ([byte + len(SPECIAL) for byte in text.encode()] for text in texts)
        elif self._bulk == "words":
            found = (words.encode(text, self._words, SPECIAL.index("<unk>")) for text in texts)
        else:
            found = (encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False))
        for ids in found:
            yield np.array([*ids, self._end], dtype=np.int64)


def _parts(text: str) -> list[str]:
    """A text in parts of about _PART characters, cut before a space that follows another character: no piece runs over such a place."""
    cuts = [0]
    while (cut := _CUT.search(text, cuts[-1] + _PART)) is not None:
        cuts.append(cut.start() + 1)
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


# -- training ---------------------------------------------------------------------------------------------------------


def _train_sentencepiece(specification: Specification, texts: Iterable[str]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    pad, unk, bos, eos, mask = SPECIAL
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=specification.kind,
            vocab_size=specification.vocab_size,
            character_coverage=specification.character_coverage,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=pad,
            unk_piece=unk,
            bos_piece=bos,
            eos_piece=eos,
            control_symbols=[mask],
            required_chars="".join(sorted({*"".join(SPECIAL), *"<0x123456789ABCDEF>"})),  # see _NEVER
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _LINE,  # bytes
            shuffle_input_sentence=False,
            num_threads=8,  # the sums of EM, and so the pieces, depend on their number
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _too_large_or_small(specification, str(error)) from error
    return _quantised(model.getvalue()) if specification.kind == "unigram" else model.getvalue()


def _quantised(model: bytes) -> bytes:
    proto = _parsed(model)
    for piece in proto.pieces:
        piece.score = round(piece.score / _QUANTUM) * _QUANTUM
    return bytes(proto.SerializeToString())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Training sentences. Newlines stay out of the vocabulary (they are encoded as a byte), so lines are learnt from one by one."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE):
                yield line[start : start + _LINE]


def _too_large_or_small(specification: Specification, message: str) -> UserError:
    where = f"tokenize.vocab_size {specification.vocab_size}"
    if found := re.search(r"Vocabulary size too high.*<= (\d+)", message, re.DOTALL):
        return UserError(f"{where} is larger than the corpus allows: at most {found[1]}; set vocab_size: {found[1]} or less, or give more text")
    if found := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"{where} is smaller than the characters, bytes and special tokens it must hold: at least {found[1]};"
            f" set vocab_size above {found[1]}, or lower character_coverage in the specification"
        )
    return UserError(f"{where}: SentencePiece cannot train on this corpus: {message.strip() or 'no reason given'}; give more text")


# -- the same tokenizer for the `tokenizers` library ------------------------------------------------------------------


def _byte_backend() -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _converted(model: bytes, path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A SentencePiece model as a `tokenizers` backend, and the names of its special tokens by role."""
    from google.protobuf.message import DecodeError
    from tokenizers import AddedToken, Tokenizer, models

    try:
        proto = _parsed(model)
    except DecodeError:
        raise UserError(f"{path}: not a SentencePiece model; give the .model file that SentencePiece's trainer wrote") from None
    kinds = type(proto).SentencePiece
    pieces = [piece.piece for piece in proto.pieces]
    unknown = next((number for number, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN), None)
    if unknown is None:
        raise UserError(f"{path}: not a SentencePiece model with an unknown piece; give the .model file that SentencePiece's trainer wrote")
    fallback = bool(proto.trainer_spec.byte_fallback)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        found = [(piece.piece, piece.score if piece.type in (kinds.NORMAL, kinds.USER_DEFINED) else _NEVER) for piece in proto.pieces]
        backend = Tokenizer(models.Unigram(found, unknown, fallback))
    elif proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        ids = {piece: number for number, piece in enumerate(pieces)}
        mergeable = {piece.piece: piece.score for piece in proto.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)}
        backend = Tokenizer(models.BPE(ids, _merges(mergeable), unk_token=pieces[unknown], fuse_unk=True, byte_fallback=fallback))
    else:
        raise UserError(f"{path}: a SentencePiece model of words or characters; expected a unigram or bpe one")
    _set_spaces(backend, proto.normalizer_spec)
    named = {piece.piece for piece in proto.pieces if piece.type != kinds.NORMAL}
    roles = {role: next((name for name in names if name in named), names[0]) for role, names in ROLES.items()}
    roles["unk_token"] = pieces[unknown]
    for piece in proto.pieces:
        if piece.type == kinds.USER_DEFINED and piece.piece not in roles.values():
            backend.add_tokens([AddedToken(piece.piece, normalized=False)])
    return backend, roles


def _parsed(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto = messages.ModelProto()  # type: ignore[attr-defined]  # made when the module is imported
    proto.ParseFromString(model)
    return proto


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best piece first: SentencePiece's order, in which a pair is merged by what it makes."""
    found = []
    for piece, score in scores.items():
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        found += [(-score, left, right) for left, right in splits if left in scores and right in scores]
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]


def _set_spaces(backend: tokenizers.Tokenizer, spec: Any) -> None:
    """SentencePiece's normaliser, and its inverse."""
    from tokenizers import Regex, decoders, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else decoding)


def _check_same_ids(model: bytes, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], path: Path) -> None:
    """On every line of the texts. Two segmentations of the same score are the same choice: rounding decides between them."""
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for line in _lines(texts):
        expected, found = original.encode(line), tokenizer(line, add_special_tokens=False)["input_ids"]
        if expected != found and not _equally_likely(original, expected, found):
            at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), min(len(expected), len(found)))
            near = original.decode(expected[max(0, at - 8) : at + 8])
            raise UserError(
                f"{path}: this SentencePiece model cannot be rewritten for AutoTokenizer with the same ids: near {near!r} it gives"
                f" {expected[at : at + 5]}, the rewritten one {found[at : at + 5]}; train one from tokenizers/, or give a Hugging Face directory"
            )


def _equally_likely(original: Any, one: list[int], other: list[int]) -> bool:
    if not all(0 <= number < original.get_piece_size() for number in other):
        return False
    scores = [sum(original.get_score(number) for number in ids) for ids in (one, other)]
    same_text = "".join(map(original.id_to_piece, one)) == "".join(map(original.id_to_piece, other))
    return same_text and abs(scores[0] - scores[1]) < 1e-3


# -- the directory ----------------------------------------------------------------------------------------------------


def _save(backend: tokenizers.Tokenizer, roles: dict[str, str], directory: Path, bulk: str | None = None) -> None:
    """Write tokenizer.json and its configuration; `<s> text </s>`, pairs `<s> a </s> b </s>`. Roles the model lacks get new ids at the end."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in roles.values()])
    bos, eos = roles["bos_token"], roles["eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} $B {eos}",
        special_tokens=[(name, backend.token_to_id(name)) for name in (bos, eos)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token=bos,
        sep_token=eos,
        **roles,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **({_BULK: bulk} if bulk else {}),
    ).save_pretrained(directory)


@contextlib.contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its name at the end of the block, or vanishes."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield place
        place.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        place.rename(directory)
    finally:
        shutil.rmtree(place, ignore_errors=True)
