"""Notes on rare words are read, taken and written as the paper's formulas say.

tnf.npz: those formulas in fp64 on three sentences, computed elsewhere: input of the network, dictionary after each sentence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import objectives
from pipeline.corpus.store import Store, Writer
from pipeline.launch.ranks import Ranks
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForMaskedLM, TrimlineModel
from pipeline.objectives.base import Trainee
from pipeline.objectives.notes import Notes
from pipeline.objectives.settings import ElectraSettings, MetaControllerSettings, MlmSettings, NotesSettings
from pipeline.packing import plan as plans
from pipeline.packing import word_counts
from pipeline.packing.loader import Loader
from pipeline.packing.settings import PackSettings

VECTORS = np.load(Path(__file__).with_name("tnf.npz"))


def batch_of(spans, length, edges=None, hidden=()):
    """One row. spans: (first token, token after the last, number) of rare words; every other token is a word. hidden: tokens that are targets."""
    word = torch.arange(length)
    note = torch.full((length,), -1)
    for begin, end, number in spans:
        word[begin:end], note[begin:end] = begin, number
    labels = torch.full((length,), -100)
    labels[list(hidden)] = 7
    kept = [[number, begin, end, *(edges or (0, length))] for begin, end, number in spans] or [[-1] * 5]
    return {name: tensor[None] for name, tensor in {"word": word, "note": note, "labels": labels, "occurrences": torch.tensor(kept)}.items()}


def notes_of(table, **settings):
    table = torch.as_tensor(table, dtype=torch.float32)
    notes = Notes(NotesSettings(**settings), *table.shape, seed=0)
    notes.table.copy_(table)
    return notes


def vector(name):
    return torch.from_numpy(VECTORS[name]).float()


def write(notes, *batches):
    """One step in which the notes of these (batch, hidden states) are taken."""
    notes.before_step(0)
    for batch, states in batches:
        notes.collect(batch, states)
    return notes.after_step(0)


def test_inputs_and_dictionary_are_the_reference_vectors():
    notes = notes_of(vector("dict_init"), window=int(VECTORS["k"]))
    for sentence in range(3):
        spans = [(s, t, word) for s, t, word in VECTORS[f"s{sentence}_spans_s_t_word"].tolist()]
        valid = int(VECTORS[f"s{sentence}_valid"])
        x, states = vector(f"s{sentence}_tok") + vector(f"s{sentence}_pos"), vector(f"s{sentence}_ctx")
        batch = batch_of(spans, 12, edges=(0, valid))
        torch.testing.assert_close(notes.mixer(batch)(x[None])[0], vector(f"s{sentence}_input"), atol=1e-6, rtol=1e-5)
        if len({word for *_, word in spans}) == len(spans):
            write(notes, (batch, states[None]))
        else:  # the reference writes one occurrence after the other
            for span in spans:
                write(notes, (batch_of([span], 12, edges=(0, valid)), states[None]))
        torch.testing.assert_close(notes.table, vector(f"dict_after_s{sentence}"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("span", "edges", "mean"), [((4, 6), (0, 12), 5.5), ((0, 1), (0, 12), 2.0), ((9, 12), (0, 12), 10.0), ((4, 6), (4, 7), 6.0)])
def test_a_note_is_the_mean_of_its_window_cut_at_the_edges(span, edges, mean):
    states = torch.arange(1.0, 13.0).view(1, 12, 1)  # c_j = j + 1
    notes = notes_of([[0.0]], window=2, decay=1.0)
    write(notes, (batch_of([(*span, 0)], 12, edges=edges), states))
    assert notes.table.item() == pytest.approx(mean)


def test_reading_mixes_and_writing_moves_by_the_worked_numbers():
    notes = notes_of([[4.0]])
    assert notes.mixer(batch_of([(1, 2, 0)], 3))(torch.full((1, 3, 1), 2.0)).flatten().tolist() == [2.0, 3.0, 2.0]
    once, twice = notes_of([[1.0]], window=0), notes_of([[1.0]], window=0)
    threes = torch.full((1, 4, 1), 3.0)
    write(once, (batch_of([(0, 1, 0)], 4), threes))
    write(twice, (batch_of([(0, 1, 0), (2, 4, 0)], 4), threes))
    assert (once.table.item(), twice.table.item()) == (pytest.approx(1.2), pytest.approx(1.38))
    assert twice.written.tolist() == [2]


def test_writing_does_not_depend_on_micro_batches_nor_on_what_fills_up_rows():
    draws = torch.Generator().manual_seed(1)
    states = torch.randn(4, 10, 3, generator=draws)
    spans = [[(0, 2, 1), (4, 5, 0)], [(3, 6, 1)], [], [(9, 10, 1), (1, 2, 4), (5, 7, 4)]]
    rows = [(batch_of(each, 10), states[row : row + 1]) for row, each in enumerate(spans)]
    apart, together = (notes_of(torch.zeros(5, 3), window=2) for _ in range(2))
    write(apart, *rows)
    most = 3
    filled = [torch.cat([row["occurrences"], torch.full((1, most - row["occurrences"].shape[1], 5), -1)], 1) for row, _ in rows]
    whole = {name: torch.cat([row[name] for row, _ in rows]) for name in ("word", "note", "labels")} | {"occurrences": torch.cat(filled)}
    write(together, (whole, states))
    torch.testing.assert_close(apart.table, together.table)
    assert apart.written.tolist() == together.written.tolist() == [1, 3, 0, 0, 2]
    assert (apart.table[[2, 3]] == 0).all(), "words that were not met keep their note"


@pytest.mark.parametrize("read_on_masked", [False, True])
def test_a_note_is_read_where_no_token_of_its_word_is_hidden(read_on_masked):
    notes = notes_of([[1.0], [2.0]], weight=1.0, read_on_masked=read_on_masked)
    batch = batch_of([(1, 4, 0), (4, 6, 0), (7, 9, 1)], 10, hidden=[2, 6, 8])
    mixed = notes.mixer(batch)(torch.zeros(1, 10, 1)).flatten().tolist()
    assert mixed == ([0, 1, 1, 1, 1, 1, 0, 2, 2, 0] if read_on_masked else [0, 0, 0, 0, 1, 1, 0, 0, 0, 0])


def test_warm_notes_are_read_once_written_and_scaled_ones_have_the_inputs_length():
    batch = batch_of([(0, 1, 0), (2, 3, 1)], 4)
    x = torch.tensor([[[3.0, 4.0]] * 4])
    warm = notes_of(torch.ones(2, 2), warm=True)
    write(warm, (batch_of([(0, 1, 1)], 4), x))
    assert (warm.mixer(batch)(x) != x).any(-1).tolist() == [[False, False, True, False]]
    scaled = notes_of([[0.1, 0.0], [0.0, 70.0]], norm="embedding", weight=1.0)
    torch.testing.assert_close(scaled.mixer(batch)(x)[0], torch.tensor([[5.0, 0.0], [3.0, 4.0], [0.0, 5.0], [3.0, 4.0]]))


def test_notes_of_half_precision_are_kept_in_full():
    x = torch.randn(1, 6, 4).bfloat16()
    notes = notes_of(torch.ones(1, 4), decay=0.001)
    batch = batch_of([(1, 3, 0)], 6)
    mixed = notes.mixer(batch, torch.nn.Linear(4, 4).bfloat16())(x)
    assert mixed.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        write(notes, (batch, x))
    torch.testing.assert_close(notes.table[0], 0.999 + 0.001 * x[0].float().mean(0), atol=1e-7, rtol=0)


def test_nothing_is_taken_in_evaluation():
    notes, batch, states = notes_of([[1.0]]), batch_of([(1, 3, 0)], 6), torch.ones(1, 6, 1)
    with torch.no_grad():
        notes.collect(batch, states)
    notes.eval()
    notes.collect(batch, states)
    assert notes._taken == []


def test_figures_say_what_is_covered_read_and_moved():
    notes = notes_of([[2.0], [2.0], [2.0]], window=0, decay=0.5)
    batch = {name: torch.cat([tensor, tensor]) for name, tensor in batch_of([(1, 3, 0), (6, 8, 2)], 10, hidden=[7]).items()}
    batch["note"][1], batch["occurrences"][1] = -1, -1
    figures = {name: float(value) for name, value in write(notes, (batch, torch.ones(2, 10, 1))).items()}
    assert figures == {
        "coverage": 0.2, "rows_with_rare_words": 0.5, "hits": 0.5, "note_norm": 1.5, "note_drift": 0.25, "words_written": 2.0
    }  # fmt: skip


def test_notes_begin_from_the_seed_alone():
    tables = []
    for seed in (1, 1, 2):
        torch.rand(3)
        tables.append(Notes(NotesSettings(), 2000, 8, seed).table)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert tables[0].std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("read_on_masked", [False, True])
def test_what_a_note_says_does_not_change_the_loss_of_its_hidden_word(tokenizer, read_on_masked):
    torch.manual_seed(0)
    mlm = objectives.build(MlmSettings(), tokenizer, 1)
    model = TrimlineForMaskedLM(TrimlineConfig(vocab_size=200, hidden_size=16, head_dim=8, heads_per_layer=[2], ffn_per_layer=[16])).eval()
    batch = batch_of([(1, 4, 0), (6, 8, 1)], 10, hidden=[2, 6, 7])
    batch |= {"input_ids": torch.arange(5, 15)[None], "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    losses = []
    for value in (1.0, -3.0):
        mlm.take_notes(notes_of(torch.linspace(-value, 2 * value, 32).view(2, 16), read_on_masked=read_on_masked))
        losses.append(mlm(model, batch, 0)["mlm"].item())
    assert (losses[0] == losses[1]) is not read_on_masked


@pytest.mark.parametrize(("scheme", "places"), [("absolute", True), ("tupe-absolute", False), ("tupe-relative", False)])
def test_a_note_is_mixed_with_what_the_scheme_puts_into_the_input(scheme, places):
    """TUPE has no positions there: tokens alone are mixed."""
    shape = {"hidden_size": 16, "head_dim": 8, "heads_per_layer": [2], "ffn_per_layer": [16], "positions": scheme}
    body = TrimlineModel(TrimlineConfig(vocab_size=20, **shape)).eval()
    ids, notes, seen = torch.tensor([[7, 7, 9]]), notes_of(torch.ones(1, 16)), []
    mix = notes.mixer(batch_of([(1, 2, 0)], 3))
    body(ids, input_mixer=lambda x: seen.extend([x, mix(x)]) or seen[1])
    tokens = body.embeddings.word(ids)
    assert torch.equal(seen[0], tokens) is not places
    torch.testing.assert_close(seen[1][0, 1], 0.5 * seen[0][0, 1] + 0.5)
    assert torch.equal(seen[1][0, [0, 2]], seen[0][0, [0, 2]])


# -- in training -------------------------------------------------------------------------------------------------------

OBJECTIVES = [MlmSettings(mask_rate=0.4), ElectraSettings(mask_rate=0.4), MetaControllerSettings(mask_rate=0.4, options=4)]
TOPICS, RARE = 4, 1000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Rows `rare a b c`: each of the rare words has one of four topics, and what follows is of its topic."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    names = [*special.values(), *(f"w{number}" for number in range(5, 45 + RARE))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")), **special
    )
    directory, draws = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    with Writer(directory / "00000", np.uint16) as writer:
        for rare in draws.permutation(np.repeat(np.arange(RARE), 4)):
            writer.add([45 + rare, *(5 + 10 * (rare % TOPICS) + draws.integers(0, 10, 3)), 3])
    store = Store.open(directory)
    return store, tokenizer, plans.make(directory / "plan", PackSettings(length=8, segments="within", min_tokens=2), "encoder", store, tokenizer)


def loader_of(corpus, directory):
    store, tokenizer, plan = corpus
    return Loader(plan, store, tokenizer, 64, 1, rare=word_counts.rare((4, 4), store, tokenizer, Ranks(), directory))


def training(corpus, settings, notes, steps, directory, checkpointing=False):
    """The trainee after so many steps, and its losses."""
    tokenizer, loader = corpus[1], loader_of(corpus, directory)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "head_dim": 8, "heads_per_layer": [4, 4], "ffn_per_layer": [64, 64], "dropout": 0.0, "initializer_range": 0.1}
    config = TrimlineConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **shape)
    model = (TrimlineModel if settings.head == "none" else TrimlineForMaskedLM)(config)
    objective = objectives.build(settings, tokenizer, 1, model=config)
    if notes is not None:
        objective.take_notes(Notes(notes, RARE, 32, seed=1))
    trainee = Trainee(model, objective, side=objective.notes)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer, history = torch.optim.AdamW(trainee.parameters(), lr=3e-3), []
    for step in range(steps):
        batch = trainee.prepare({name: torch.from_numpy(array) for name, array in loader.batch(step).items()}, step)
        if notes is not None:
            trainee.side.before_step(step)
        losses = trainee(batch, step)
        sum(losses[name] for name in losses if name not in objective.figures).backward()
        optimizer.step()
        optimizer.zero_grad()
        if notes is not None:
            trainee.side.after_step(step)
        history.append({name: loss.item() for name, loss in losses.items()})
    return trainee, history


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda settings: settings.name)
def test_notes_of_weight_0_change_no_bit_and_leave_nothing_in_the_weights(corpus, settings, tmp_path):
    plain, losses = training(corpus, settings, None, 5, tmp_path)
    noted, same = training(corpus, settings, NotesSettings(weight=0), 5, tmp_path)
    assert losses == same
    found, expected = noted.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(noted.side.parameters()) == []


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda settings: settings.name)
def test_every_objective_reads_notes_and_takes_each_context_once(corpus, settings, tmp_path):
    _, plain = training(corpus, settings, None, 3, tmp_path)
    (noted, losses), (again, repeated) = (training(corpus, settings, NotesSettings(), 3, tmp_path, checkpointing) for checkpointing in (False, True))
    assert noted.side.written.sum() == 3 * 64
    assert losses != plain
    assert losses == repeated
    assert torch.equal(noted.side.table, again.side.table)


def test_notes_help_while_they_are_read(corpus, tmp_path):
    """Where the rare word alone is visible, its note says what topic it has: of 40 tokens that may follow, 10."""
    losses = {}
    for name, notes in {"plain": None, "notes": NotesSettings()}.items():
        trainee, _ = training(corpus, MlmSettings(mask_rate=0.5), notes, 180, tmp_path)
        trainee.eval()
        batch = {name: torch.from_numpy(array) for name, array in loader_of(corpus, tmp_path).batch(0).items()}
        hidden = (batch["input_ids"] >= 5) & (batch["input_ids"] < 45)
        batch |= {"input_ids": batch["input_ids"].masked_fill(hidden, 4), "labels": batch["input_ids"].masked_fill(~hidden, -100)}
        with torch.no_grad():
            losses[name] = trainee(batch, 0)["mlm"].item()
            trainee.objective.take_notes(None)
            losses[f"{name} away"] = trainee(batch, 0)["mlm"].item()
    assert losses["notes"] < losses["plain"] - 0.2, losses
    assert losses["notes away"] > losses["notes"] + 0.2, losses
