from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.corpus import tokenizer
from pipeline.corpus.settings import Specification
from pipeline.errors import UserError

KINDS = ["unigram", "bpe", "bytes"]
SPECIAL_LOOKING = ["<s>", "</s>", "<mask>", "<pad>", "<unk>", "<0x0A>"]
PIECES = ["the ", " model", "reads", "\n", "\n\n", "  ", "    ", "\t", "é", "日本", "😀", "e\u0301", "\u00a0", ".", "0", "\x00", *SPECIAL_LOOKING]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")),
    st.lists(st.sampled_from(PIECES)).map("".join),
)


@pytest.fixture(scope="module")
def directories(texts, tmp_path_factory):
    """One directory a kind, trained on the texts."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        tokenizer.train(Specification(kind=kind, vocab_size=700), texts, root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(directories):
    return {kind: tokenizer.load(directory) for kind, directory in directories.items()}


@pytest.fixture(scope="module")
def original(directories):
    return {kind: sentencepiece.SentencePieceProcessor(model_file=str(directories[kind] / "spm.model")) for kind in KINDS[:2]}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
@example(text="")
@example(text="  two  spaces \n\n\tand <s> or <mask>\r\n ")
def test_autotokenizer_gives_the_ids_of_sentencepiece_and_the_text_comes_back(loaded, original, text):
    for kind, fast in loaded.items():
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert fast.decode(ids) == text
        if kind in original:
            assert ids == original[kind].encode(text)
            assert original[kind].decode(ids) == text
        else:
            assert ids == [byte + 5 for byte in text.encode()]


def test_both_agree_on_long_texts_and_so_does_bulk_encoding(directories, loaded, original, texts):
    documents = [" ".join(texts), *texts[:20], "", "x" * 20_000]
    for kind, directory in directories.items():
        bulk = [ids.tolist() for ids in tokenizer.Encoder(directory).encode(documents)]
        assert bulk == [[*loaded[kind](text, add_special_tokens=False)["input_ids"], 3] for text in documents]
        if kind in original:
            assert [ids[:-1] for ids in bulk] == original[kind].encode(documents)


def test_sums_of_unigram_scores_are_exact_so_that_rounding_never_picks_the_segmentation(original):
    scores = [original["unigram"].get_score(number) for number in range(700)]
    assert len(set(scores)) > 100
    assert all((score * 64).is_integer() for score in scores)


def test_roles_and_templates_are_those_encoders_expect(loaded):
    for fast in loaded.values():
        roles = [fast.pad_token_id, fast.unk_token_id, fast.cls_token_id, fast.bos_token_id, fast.sep_token_id, fast.eos_token_id, fast.mask_token_id]
        assert roles == [0, 1, 2, 2, 3, 3, 4]
        a, b = (fast(text, add_special_tokens=False)["input_ids"] for text in ("the model", "reads"))
        assert fast("the model")["input_ids"] == [2, *a, 3]
        assert fast("the model", "reads")["input_ids"] == [2, *a, 3, *b, 3]
        assert "token_type_ids" not in fast("the model")


def test_vocabularies_have_the_size_asked_for(loaded, original):
    assert [len(loaded[kind]) for kind in KINDS] == [700, 700, 261]
    assert [original[kind].get_piece_size() for kind in original] == [700, 700]


def test_training_twice_gives_the_same_tokenizer(directories, texts, tmp_path):
    for kind in KINDS:
        tokenizer.train(Specification(kind=kind, vocab_size=700), texts, tmp_path / kind)
        for file in ("tokenizer.json", *(["spm.model"] if kind != "bytes" else [])):
            assert (tmp_path / kind / file).read_bytes() == (directories[kind] / file).read_bytes()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_larger_than_the_corpus_allows_is_refused_with_the_largest_that_works(texts, tmp_path, kind):
    with pytest.raises(UserError, match=r"vocab_size 50000 is larger than the corpus allows: at most \d+") as refused:
        tokenizer.train(Specification(kind=kind, vocab_size=50_000), texts, tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []
    largest = int(str(refused.value).split("at most ")[1].split(";")[0])
    tokenizer.train(Specification(kind=kind, vocab_size=largest), texts, tmp_path / "tokenizer")


def test_a_vocabulary_smaller_than_its_characters_is_refused(texts, tmp_path):
    with pytest.raises(UserError, match=r"vocab_size 263 is smaller than .* at least \d+"):
        tokenizer.train(Specification(kind="bpe", vocab_size=263), texts, tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A directory of kind `words`: b and \\n are seen 3 times, a and c twice, d once."""
    directory = tmp_path_factory.mktemp("words") / "tokenizer"
    tokenizer.train(Specification(kind="words", vocab_size=None), ["b c a\n\n b <unk> ", "c b\na d </s>"], directory)
    return directory


def test_words_are_numbered_by_falling_frequency_then_by_text(words):
    fast = tokenizer.load(words)
    assert fast.convert_ids_to_tokens(list(range(len(fast)))) == ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "\n", "b", "a", "c", "d"]
    roles = [fast.pad_token_id, fast.unk_token_id, fast.cls_token_id, fast.bos_token_id, fast.sep_token_id, fast.eos_token_id, fast.mask_token_id]
    assert roles == [0, 1, 2, 2, 3, 3, 4]


def test_words_stand_between_spaces_every_line_end_is_one_and_others_are_unknown(words):
    (ids,) = tokenizer.Encoder(words).encode(["\n a  b, b\n\n<unk> c </s> <mask>"])
    assert ids.tolist() == [5, 7, 1, 6, 5, 5, 1, 8, 1, 1, 3]
    assert tokenizer.load(words).decode([7, 8, 5, 5, 6, 9]) == "a c\n\nb d"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.one_of(TEXT, st.lists(st.sampled_from([*"abcd \n\t\r\x1c\x85\u3000", *SPECIAL_LOOKING])).map("".join)), max_size=3))
def test_bulk_encoding_of_words_gives_autotokenizers_ids(words, texts):
    fast = tokenizer.load(words)
    assert [ids.tolist() for ids in tokenizer.Encoder(words).encode(texts)] == [
        [*fast(text, add_special_tokens=False)["input_ids"], 3] for text in texts
    ]


def test_a_vocabulary_of_words_holds_the_most_frequent(texts, tmp_path):
    many = [" ".join(f"w{number}" for number in range(400) for _ in range(1 + number % 3)) for _ in range(2)]
    tokenizer.train(Specification(kind="words", vocab_size=300), many, tmp_path / "words")
    fast = tokenizer.load(tmp_path / "words")
    assert len(fast) == 300
    assert {int(token[1:]) % 3 for token in fast.convert_ids_to_tokens(list(range(5, 5 + 133)))} == {2}
    with pytest.raises(ValueError, match="kind bpe needs a vocab_size"):
        Specification(kind="bpe", vocab_size=None)


def model_file(path, texts, **options):
    model = io.BytesIO()
    lines = [line for text in texts for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, hard_vocab_limit=False, minloglevel=2, **options)
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_sentencepiece_model_with_its_usual_options_is_taken_with_its_ids(texts, tmp_path, kind):
    path = model_file(tmp_path / "m.model", texts, model_type=kind, vocab_size=300)
    tokenizer.take(path, tmp_path / "taken", texts[:50])
    fast, original = tokenizer.load(tmp_path / "taken"), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("the  model reads", " a long text ", "naïve ﬁne ①", "日本語 unknown"):
        assert fast(text, add_special_tokens=False)["input_ids"] == original.encode(text)
    assert (tmp_path / "taken" / "spm.model").read_bytes() == path.read_bytes()
    size = original.get_piece_size()
    assert [fast.unk_token_id, fast.bos_token_id, fast.eos_token_id] == [0, 1, 2]
    assert {fast.pad_token_id, fast.mask_token_id} == {size, size + 1}
    assert fast.decode(original.encode("the model"), skip_special_tokens=True) == "the model"


def test_a_sentencepiece_model_that_cannot_be_rewritten_is_refused(texts, tmp_path):
    path = model_file(tmp_path / "m.model", texts, vocab_size=300, treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match=r"m\.model: this SentencePiece model cannot be rewritten .* near"):
        tokenizer.take(path, tmp_path / "taken", texts[:50])
    path = model_file(tmp_path / "w.model", texts, vocab_size=50, model_type="char")
    with pytest.raises(UserError, match=r"w\.model: a SentencePiece model of words or characters"):
        tokenizer.take(path, tmp_path / "taken")
    assert not (tmp_path / "taken").exists()


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path):
    for content in (b"not a model", b""):
        (tmp_path / "m.model").write_bytes(content)
        with pytest.raises(UserError, match=r"m\.model: not a SentencePiece model"):
            tokenizer.take(tmp_path / "m.model", tmp_path / "taken")


def test_a_hugging_face_directory_is_copied_as_it_is_without_weights(directories, tmp_path):
    given_ = tmp_path / "given"
    given_.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (given_ / name).write_bytes((directories["bpe"] / name).read_bytes())
    (given_ / "model.safetensors").write_bytes(b"weights")
    tokenizer.take(given_, tmp_path / "taken")
    assert sorted(file.name for file in (tmp_path / "taken").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "taken" / "tokenizer.json").read_bytes() == (given_ / "tokenizer.json").read_bytes()


def test_a_directory_without_its_sentencepiece_model_encodes_the_same(directories, texts, tmp_path):
    tokenizer.load(directories["unigram"]).save_pretrained(tmp_path / "exported")
    assert not (tmp_path / "exported" / "spm.model").exists()
    one, other = (list(tokenizer.Encoder(directory).encode(texts[:20])) for directory in (directories["unigram"], tmp_path / "exported"))
    assert [ids.tolist() for ids in one] == [ids.tolist() for ids in other]


def test_a_directory_that_is_no_tokenizer_or_has_no_end_token_is_refused(directories, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a tokenizer directory"):
        tokenizer.take(tmp_path / "empty", tmp_path / "taken")
    endless = tmp_path / "endless"
    endless.mkdir()
    (endless / "tokenizer.json").write_bytes((directories["bpe"] / "tokenizer.json").read_bytes())
    (endless / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}))
    with pytest.raises(UserError, match="neither an eos nor a sep token"):
        tokenizer.take(endless, tmp_path / "taken")
