"""Words of text that is tokenised already, as WikiText is: what stands between spaces, and the end of each line as a word of its own.

The end of a line is the token `\\n` (what others write `<eos>`), one a line, empty lines too. `<unk>` in the text is the unknown word, and so are
the names of the other special tokens. Ids after the special tokens fall in frequency, as adaptive embeddings want them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

LINE = "\n"
_SPACE = r"\s\x1c-\x1f"  # what `str.split` splits at


def backend(texts: Iterable[str], special: Sequence[str], vocab_size: int | None) -> tokenizers.Tokenizer:
    """The tokenizer of all words of the texts, or of the most frequent that fill vocab_size; words equally frequent are in the order of their text.

    special: the special tokens, the first ids; `<unk>` is among them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    found: Counter[str] = Counter({LINE: 0})
    for text in texts:
        found.update(text.split())
        found[LINE] += text.count(LINE)
    for name in special:
        found.pop(name, None)
    ordered = sorted(found, key=lambda word: (-found[word], word))
    kept = ordered if vocab_size is None else ordered[: vocab_size - len(special)]
    vocabulary = {word: number for number, word in enumerate([*special, *kept])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    names = "|".join(name for name in special if name != "<unk>")
    made.normalizer = normalizers.Replace(Regex(f"(?<![^{_SPACE}])(?:{names})(?![^{_SPACE}])"), "<unk>")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LINE), "isolated"), pre_tokenizers.Split(Regex(r"[^\S\n]+|[\x1c-\x1f]+"), "removed")]
    )
    spaced = decoders.WordPiece(prefix=" ", cleanup=False)  # a space before every word: none begins with one
    made.decoder = decoders.Sequence([spaced, decoders.Fuse(), decoders.Replace(Regex(f" ?{LINE} ?"), LINE)])
    return made


def encode(text: str, ids: Mapping[str, int], unknown: int) -> list[int]:
    """What the backend gives, quicker. ids: those of the words, without the special tokens."""
    found: list[int] = []
    for number, line in enumerate(text.split(LINE)):
        if number:
            found.append(ids[LINE])
        found += [ids.get(word, unknown) for word in line.split()]
    return found
