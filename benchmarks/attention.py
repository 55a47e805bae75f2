"""What position schemes and ways of attention cost: a step of each beside one of plain absolute positions, and rows without their padding.

    python benchmarks/attention.py [--device cuda --dtype bfloat16] [--lengths 128 512] [--tokens 1024] [--layers 4] [--dropout 0 0.1]
        [--schemes tupe-absolute tupe-relative] [--ways kernel]

Forward and backward of the body alone, layers of BERT-base (768 wide, 12 heads, 3072 neurons), rows full. Vocabulary and optimizer, which cost all
schemes the same, are left out, and layers are fewer than 12 while a bias is computed once: both make ratios larger than a whole step's. The arms
take turns; a ratio is the median (and the quartiles) over the rounds of an arm's time by plain's in the same round; on a CPU the time of this process
alone, so that others' load falls out.

Ways: ours is what the model does. kernel: PyTorch's, which is given the bias. formula: softmax of the scores, then a product. folded: TUPE's
absolute part as more dimensions of queries and keys, so that the kernel needs no bias; two further dimensions reset [CLS].
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.models import attention
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineModel
from pipeline.models.positions import SCHEMES
from pipeline.models.stopwatch import device_name

LEARNED = ("absolute-relative", "tupe-absolute", "tupe-relative")
PLAIN = ("absolute", "ours")


def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float) -> Tensor:
    rows = mask.expand(len(query), -1, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(rows, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale)
    return (F.dropout(scores.softmax(dim=-1), dropout) @ value.flatten(0, 1)).unflatten(0, query.shape[:2])


@contextmanager
def folded(model: TrimlineModel) -> Iterator[None]:
    """TUPE-A without a bias: queries [q; p U_Q; cls; others], keys [k; p U_K; theta_1; theta_2 at cls], nothing of p at [CLS]."""
    scheme: Any = model.embeddings.positions
    more: list[Tensor] = []

    def bias(tokens: Tensor, position_ids: Tensor | None) -> None:
        length = tokens.shape[1]
        p = scheme.norm(scheme.table(torch.arange(length + 1, device=tokens.device)))
        query, key = (side(p).unflatten(1, (-1, scheme.head_dim)).transpose(0, 1) for side in (scheme.query, scheme.key))
        from_cls, to_cls = ((query[:, row] * key[:, row]).sum(dim=1)[:, None] for row in (0, 1))
        cls = F.one_hot(torch.zeros(1, dtype=torch.long, device=tokens.device), length).to(p).expand(len(query), -1)
        others = torch.stack([cls, 1 - cls], dim=-1), torch.stack([from_cls.expand_as(cls), cls * to_cls], dim=-1)
        more[:] = [torch.cat([F.pad(side[:, 2:], (0, 0, 1, 0)), two], dim=-1) for side, two in zip((query, key), others, strict=True)]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float) -> Tensor:
        longer = [torch.cat([side, extra.to(side).expand(len(side), -1, -1, -1)], dim=-1) for side, extra in zip((query, key), more, strict=True)]
        width = (longer[0].shape[-1] + 7) // 8 * 8
        query, key, padded = (F.pad(side, (0, width - side.shape[-1])) for side in (*longer, value))
        return F.scaled_dot_product_attention(query, key, padded, mask, dropout, scale=scale)[..., : value.shape[-1]]

    with mock.patch.object(scheme, "bias", bias), mock.patch.object(attention, "attend", attend):
        yield


def step(model: TrimlineModel, way: str, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One forward and backward; the last hidden state."""
    patches: dict[str, Any] = {"ours": nullcontext(), "kernel": mock.patch.object(attention, "attend", kernel)}
    patches |= {"formula": mock.patch.object(attention, "attend", formula), "folded": folded(model) if way == "folded" else nullcontext()}
    model.zero_grad()
    with patches[way], torch.autocast(batch["input_ids"].device.type, dtype, enabled=dtype != torch.float32):
        hidden = model(**batch).last_hidden_state
    hidden.float().square().mean().backward()
    return hidden.detach().float()


def timed(arms: Mapping[Any, Callable[[], object]], rounds: int, device: torch.device) -> dict[Any, list[float]]:
    """Seconds of each arm in each round, after one that does not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[Any, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm, run in arms.items():
            _wait(device)
            start = clock()
            run()
            _wait(device)
            if turn:
                times[arm].append(clock() - start)
    return times


def ratio(times: list[float], plain: list[float]) -> str:
    ratios = [one / other for one, other in zip(times, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


def body(scheme: str, length: int, options: argparse.Namespace, dropout: float, **changes: Any) -> TrimlineModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 768, "head_dim": 64, "heads_per_layer": [12] * options.layers, "ffn_per_layer": [3072] * options.layers}
    config = TrimlineConfig(vocab_size=1000, **shape, positions=scheme, dropout=dropout, max_position_embeddings=length, **changes)
    return TrimlineModel(config, add_pooling_layer=False).to(options.device).train()


def rows(count: int, length: int, real: int, device: torch.device) -> dict[str, Tensor]:
    """Random rows, of which `real` tokens are no padding on average: as many as longer ones are shorter."""
    lengths = torch.linspace(2 * real - length, length, count).round().long().clamp(min=1) if real < length else torch.full((count,), length)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": (torch.randint(5, 1000, (count, length)) * mask).to(device), "attention_mask": mask.to(device)}


def arms_of(schemes: list[str], ways: list[str]) -> list[tuple[str, str]]:
    """Plain first; then each scheme as the model has it, and in those other ways that it can go."""
    arms = [PLAIN, *((scheme, "ours") for scheme in schemes if scheme != PLAIN[0])]
    return arms + [(scheme, way) for scheme in schemes for way in ways if (scheme == "tupe-absolute" if way == "folded" else scheme in LEARNED)]


def schemes(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
    all_arms = arms_of(options.schemes, options.ways)
    heads = [f"{length} tokens, dropout {dropout:g}" for dropout in options.dropout for length in options.lengths]
    print(f"| scheme | way | {' | '.join(heads)} |")
    print("|---|---|" + "---|" * len(options.lengths) * len(options.dropout))
    columns = []
    for dropout in options.dropout:
        for length in options.lengths:
            batch = rows(max(1, options.tokens // length), length, length, device)
            models = {scheme: body(scheme, length, options, dropout) for scheme in {PLAIN[0], *options.schemes}}
            if not dropout:
                same(models, all_arms, batch, dtype)
            arms = {(scheme, way): partial(step, models[scheme], way, batch, dtype) for scheme, way in all_arms}
            columns.append(timed(arms, options.rounds, device))
    for arm in all_arms:
        found = [f"{statistics.median(times[arm]):.2f} s" if arm == PLAIN else ratio(times[arm], times[PLAIN]) for times in columns]
        print(f"| {arm[0]} | {arm[1]} | {' | '.join(found)} |")


def same(models: dict[str, TrimlineModel], arms: list[tuple[str, str]], batch: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every way is exact."""
    for scheme, way in arms:
        if way != "ours":
            ours, other = (step(models[scheme], name, batch, dtype) for name in ("ours", way))
            torch.testing.assert_close(other, ours, atol=1e-3 if dtype == torch.float32 else 0.1, rtol=1e-3)


def unpadded(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
    print("\n| half of the batch is padding | " + " | ".join(f"{length} tokens" for length in options.lengths) + " |")
    print("|---|" + "---|" * len(options.lengths))
    for scheme in ("absolute", "tupe-relative"):
        found = []
        for length in options.lengths:
            batch = rows(max(2, options.tokens // length), length, (length + 1) // 2, device)
            models = {unpadded: body(scheme, length, options, 0.0, unpadded=unpadded) for unpadded in (False, True)}
            times = timed({name: partial(step, model, "ours", batch, dtype) for name, model in models.items()}, options.rounds, device)
            found.append(ratio(times[True], times[False]))
        print(f"| {scheme}, unpadded by padded | {' | '.join(found)} |")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--ways", nargs="*", default=["kernel", "formula", "folded"], choices=["kernel", "formula", "folded"])
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}")
    print(f"{options.tokens} tokens a batch, {options.layers} layers, {options.rounds} rounds\n")
    schemes(options, dtype, device)
    unpadded(options, dtype, device)


if __name__ == "__main__":
    main()
