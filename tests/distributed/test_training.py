"""The loop, the engine and the checkpoints on real ranks. Four starts of ranks, many trainings each (see toy.py)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pipeline.training.schedules import learning_rate
from pipeline.training.settings import TrainSettings

STAGES = ("zero0", "zero1", "zero2", "zero3")
MOVED = ("zero1", "zero3")
ACCOMPANIED = ("zero0", "zero1", "zero3")
STEPS = 6
LONG = {"steps": 8, "trainee": {"dropout": 0.1}, "settings": {"deepspeed": "zero1", "checkpoint_every": 2}}
"""With dropout, and a checkpoint after steps 2, 4, 6 and 8."""
BUDGET = {"steps": 1000, "pause": 0.1, "settings": {"deepspeed": "zero1", "time_budget": 0.05}}
"""Three seconds, of which a step takes a tenth or more."""
NESTEROV = {"optimizer": "nesterov", "momentum": 0.8, "lr": 0.1, "weight_decay": 0.0}


class Payload:
    """A pickle that creates a file when it is loaded by the usual means."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainings")


def training(place: Path, name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "directory": str(place / name), "steps": STEPS, **options}


def stop_at(step: int, rank: int, signal: str = "SIGUSR2") -> list[dict[str, Any]]:
    return [{"step": step, "ranks": [rank], "signal": signal}]


def copy(place: Path, old: str, new: str) -> Path:
    shutil.copytree(place / old, place / new)
    return place / new


def spoil(checkpoint: Path, file: str) -> None:
    """Changes one byte in the middle, as a bad disk would."""
    content = bytearray((checkpoint / file).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / file).write_bytes(content)


def forge(checkpoint: Path, file: str, content: bytes) -> None:
    """Replaces a file and makes state.json agree."""
    (checkpoint / file).write_bytes(content)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "state.json").write_text(json.dumps(state))


def history(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "logs" / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[dict[str, float]]:
    return [record["losses"] for record in history(directory)]


@pytest.fixture(scope="module")
def two_ranks(place: Path, launch: Callable[..., Any]) -> Any:
    trainings = [training(place, stage, settings={"deepspeed": stage, "checkpoint_every": 4}) for stage in (*STAGES, "zero3-offload")]
    trainings += [training(place, name, steps=12, settings={"deepspeed": name}) for name in ("zero0-bf16", "zero1-bf16", "zero3-bf16")]
    trainings += [training(place, "long", **LONG)]
    trainings += [training(place, "recomputed", **LONG | {"settings": {"deepspeed": "zero1", "activation_checkpointing": True}})]
    trainings += [training(place, f"stopped-{stage}", settings={"deepspeed": stage}, actions=stop_at(2, rank=1)) for stage in STAGES]
    trainings += [training(place, f"nesterov-{stage}", settings={"deepspeed": stage, **NESTEROV}) for stage in (*STAGES, "zero1-bf16")]
    moved = [training(place, f"nesterov-moved-{stage}", settings={"deepspeed": stage, **NESTEROV}, actions=stop_at(2, rank=1)) for stage in MOVED]
    trainings += moved
    for stage in ACCOMPANIED:
        options = {"settings": {"deepspeed": stage}, "accompanied": True}
        trainings += [training(place, f"accompanied-{stage}", **options)]
        trainings += [training(place, f"accompanied-stopped-{stage}", **options, actions=stop_at(2, rank=1))]
    trainings += [training(place, "budget", **BUDGET), training(place, "budget-stopped", **BUDGET, actions=stop_at(2, rank=1))]
    trainings += [training(place, "budget-ample", settings={"deepspeed": "zero1", "time_budget": 1000.0})]
    trainings += [training(place, "terminated", actions=stop_at(1, rank=0, signal="SIGTERM"), let_stop=True)]
    return launch(trainings, 2)


@pytest.fixture(scope="module")
def killed(place: Path, launch: Callable[..., Any]) -> Any:
    return launch([training(place, "killed", **LONG, actions=stop_at(5, rank=1, signal="SIGKILL"))], 2)


@pytest.fixture(scope="module")
def one_rank(place: Path, two_ranks: Any, launch: Callable[..., Any]) -> Any:
    zero0 = {"deepspeed": "zero0"}
    for name in ("other-data", "other-stage", "forged", "forged-trainee"):
        copy(place, "stopped-zero0", name)
    shard, evil = "deepspeed/mp_rank_00_model_states.pt", Payload(place / "executed")
    torch.save({"module": evil}, place / "evil.pt")
    forge(place / "forged" / "checkpoints" / "step-00000003", shard, (place / "evil.pt").read_bytes())
    forge(place / "forged-trainee" / "checkpoints" / "step-00000003", "trainee.pt", pickle.dumps(evil))
    trainings = [training(place, f"stopped-{stage}", settings={"deepspeed": stage}) for stage in STAGES]
    trainings += [training(place, f"grows-{stage}", settings={"deepspeed": stage}, actions=stop_at(2, rank=0)) for stage in ("zero1", "zero3")]
    trainings += [training(place, "other-data", settings=zero0, fingerprint="other"), training(place, "other-stage", settings={"deepspeed": "zero2"})]
    trainings += [training(place, name, settings=zero0) for name in ("forged", "forged-trainee")]
    trainings += [training(place, "diverges", settings=zero0 | {"checkpoint_every": 2, "log_every": 50}, trainee={"bad_from": 3})]
    trainings += [training(place, f"nesterov-moved-{stage}", settings={"deepspeed": stage, **NESTEROV}) for stage in MOVED]
    trainings += [training(place, "zero0-again", settings=zero0, trainee={"side": False})]
    return launch(trainings, 1)


@pytest.fixture(scope="module")
def two_ranks_again(place: Path, two_ranks: Any, killed: Any, one_rank: Any, launch: Callable[..., Any]) -> Any:
    for name, checkpoints in {"damaged": ["step-00000008"], "all-damaged": ["step-00000006", "step-00000008"]}.items():
        copy(place, "long", name)
        for checkpoint in checkpoints:
            spoil(place / name / "checkpoints" / checkpoint, "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    trainings = [training(place, name, **LONG) for name in ("killed", "damaged", "all-damaged", "long")]
    trainings += [training(place, f"grows-{stage}", settings={"deepspeed": stage}) for stage in ("zero1", "zero3")]
    trainings += [training(place, f"accompanied-stopped-{stage}", settings={"deepspeed": stage}, accompanied=True) for stage in ACCOMPANIED]
    trainings += [training(place, name, **BUDGET) for name in ("budget", "budget-stopped")]
    trainings += [training(place, "terminated")]
    return launch(trainings, 2)


@pytest.mark.parametrize("stage", [*STAGES, "zero3-offload"])
def test_two_ranks_with_accumulation_and_unequal_targets_train_as_plain_torch_on_the_whole_batch(stage, place, toy, two_ranks):
    assert two_ranks.results[stage]["outcome"] == "done", two_ranks.output
    expected, weights, _ = toy.reference(STEPS)
    for found, reference in zip(losses(place / stage), expected, strict=True):
        assert found == pytest.approx(reference, abs=1e-4)
    found = torch.load(place / stage / "weights.pt")
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*(f"nesterov-{stage}" for stage in STAGES), *(f"nesterov-moved-{stage}" for stage in MOVED)])
def test_nesterovs_momentum_trains_as_plain_torchs_on_any_stage_and_moves_to_another_number_of_ranks(name, place, toy, two_ranks, one_rank):
    assert (one_rank if "moved" in name else two_ranks).results[name]["outcome"] == "done", one_rank.output
    expected, weights, _ = toy.reference(STEPS, **NESTEROV)
    for found, reference in zip(losses(place / name), expected, strict=True):
        assert found == pytest.approx(reference, abs=1e-4)
    if (place / name / "weights.pt").exists():
        torch.testing.assert_close(torch.load(place / name / "weights.pt")["inner.weight"], weights["inner.weight"], atol=1e-5, rtol=1e-5)


def test_nesterovs_momentum_learns_in_bf16(place, two_ranks):
    found = losses(place / "nesterov-zero1-bf16")
    assert found[-1]["first"] < found[0]["first"]


@pytest.mark.parametrize("stage", [*STAGES, "zero3-offload"])
def test_the_side_module_gets_the_gradient_of_the_whole_batch_and_is_the_same_on_every_rank(stage, place, toy, two_ranks):
    _, _, gate = toy.reference(STEPS)
    sides = [torch.load(place / stage / f"side-{rank}.pt")["value"] for rank in (0, 1)]
    assert torch.equal(*sides)
    torch.testing.assert_close(sides[0], gate, atol=1e-5, rtol=1e-5)
    assert history(place / stage)[-1]["side"]["gate"] == pytest.approx(float(gate.sum()), abs=1e-4)


@pytest.mark.parametrize("stage", ACCOMPANIED)
def test_an_objectives_own_network_and_a_side_module_of_buffers_train_as_in_plain_torch_and_resume_bit_for_bit(
    stage, place, toy, two_ranks, two_ranks_again
):
    name, stopped = f"accompanied-{stage}", f"accompanied-stopped-{stage}"
    assert two_ranks.results[name]["outcome"] == "done", two_ranks.output
    expected, weights, table = toy.reference(STEPS, accompanied=True)
    for found, reference in zip(losses(place / name), expected, strict=True):
        assert found == pytest.approx(reference, abs=1e-4)
    found = torch.load(place / name / "weights.pt")
    assert list(found) == list(weights), "the model's, without the objective's network"
    torch.testing.assert_close(found, weights, atol=1e-5, rtol=1e-5)
    sides = [torch.load(place / name / f"side-{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(sides[0]["table"], table, atol=1e-5, rtol=1e-5)

    assert two_ranks.results[stopped]["outcome"] == "stopped"
    assert two_ranks_again.results[stopped]["outcome"] == "done", two_ranks_again.output
    assert [(record["losses"], record["side"]) for record in history(place / stopped)] == [
        (record["losses"], record["side"]) for record in history(place / name)
    ]
    again = [torch.load(place / stopped / f"side-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(side[buffer], sides[0][buffer]) for side in (sides[1], *again) for buffer in ("table", "updates"))
    resumed = torch.load(place / stopped / "weights.pt")
    assert all(torch.equal(resumed[key], found[key]) for key in found)


def test_a_ratio_is_the_quotient_of_global_means_and_not_logged_where_its_kind_was_not_met(place, two_ranks):
    records = history(place / "accompanied-zero1")
    assert {record["losses"]["kind"] > 0 for record in records} == {True, False}, "steps with such targets and without"
    for record in records:
        hits, kind = record["losses"]["hits"], record["losses"]["kind"]
        assert record["ratios"] == ({"accuracy": hits / kind} if kind else {})
        assert record["loss"] == pytest.approx(
            sum(record["losses"][name] * weight for name, weight in (("first", 1), ("second", 0.5), ("companion", 1)))
        )
    assert two_ranks.results["accompanied-zero1"]["ratios"] == records[-1]["ratios"]


def test_utilisation_counts_tokens_that_are_not_padding(place, toy, two_ranks):
    for record in history(place / "accompanied-zero1"):
        assert record["tokens_per_second"] / record["rows_per_second"] == pytest.approx(33 / 8)
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] / toy.LENGTH * 1e6 / (2 * 1e9))
    assert history(place / "zero1")[0]["mfu"] is None


@pytest.mark.parametrize("name", ["budget", "budget-stopped"])
def test_a_time_budget_ends_training_and_its_schedule_at_the_same_step_on_every_rank(name, place, toy, two_ranks, two_ranks_again):
    result = (two_ranks_again if "stopped" in name else two_ranks).results[name]
    assert result["outcome"] == "done", two_ranks_again.output
    records, settings = history(place / name), TrainSettings(**toy.SETTINGS | BUDGET["settings"])
    clock, other = (json.loads((place / name / f"clock-{rank}.json").read_text()) for rank in (0, 1))
    assert clock == other
    assert clock[0] == ([3, records[2]["seconds"]] if "stopped" in name else [0, 0.0]), "time goes on where it was stopped"
    for (step, seconds), record in zip(clock, records[clock[0][0] :], strict=True):
        assert (record["step"], record["lr"]) == (step + 1, learning_rate(settings, step, BUDGET["steps"], seconds))
    times = [seconds for _, seconds in clock]
    assert times == sorted(times)
    assert times[-1] < 60 * settings.time_budget <= records[-1]["seconds"]
    assert result["steps"] == records[-1]["step"] < BUDGET["steps"]


def test_a_training_whose_time_is_used_up_is_finished(two_ranks, two_ranks_again):
    assert two_ranks_again.results["budget"] == two_ranks.results["budget"] | {"calls": 0}


def test_within_an_ample_time_budget_the_steps_count(place, toy, two_ranks):
    assert two_ranks.results["budget-ample"]["steps"] == STEPS
    for found, reference in zip(losses(place / "budget-ample"), toy.reference(STEPS)[0], strict=True):
        assert found == pytest.approx(reference, abs=1e-4)


@pytest.mark.parametrize("name", ["zero0-bf16", "zero1-bf16", "zero3-bf16"])
def test_bf16_learns_and_gives_fp32_weights(name, place, two_ranks):
    found = losses(place / name)
    assert found[-1]["first"] < 0.5 * found[0]["first"]
    weights = torch.load(place / name / "weights.pt")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    matrix = weights["inner.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float()), "master weights, not rounded ones"


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_to_one_rank_stops_all_after_the_step_and_another_number_of_ranks_goes_on(stage, place, toy, two_ranks, one_rank):
    name = f"stopped-{stage}"
    assert two_ranks.results[name] == {"outcome": "stopped", "step": 3, "code": 85}
    assert one_rank.results[name]["outcome"] == "done", one_rank.output
    for found, reference in zip(losses(place / name), toy.reference(STEPS)[0], strict=True):
        assert found == pytest.approx(reference, abs=1e-4)


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_one_rank_stops_and_two_go_on(stage, place, toy, one_rank, two_ranks_again):
    name = f"grows-{stage}"
    assert one_rank.results[name]["outcome"] == "stopped"
    assert two_ranks_again.results[name]["outcome"] == "done", two_ranks_again.output
    expected, weights, gate = toy.reference(STEPS)
    for found, reference in zip(losses(place / name), expected, strict=True):
        assert found == pytest.approx(reference, abs=1e-4)
    torch.testing.assert_close(torch.load(place / name / "weights.pt")["inner.weight"], weights["inner.weight"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.load(place / name / "side-1.pt")["value"], gate, atol=1e-5, rtol=1e-5)


def test_sigterm_saves_a_checkpoint_and_the_launcher_exits_with_85(place, two_ranks, two_ranks_again):
    assert two_ranks.code == 85
    assert two_ranks.results["terminated"] == {"outcome": "stopped", "step": 2, "code": 85}
    assert "terminated: goes on after step 2" in two_ranks_again.output
    assert [record["step"] for record in history(place / "terminated")] == list(range(1, STEPS + 1))


def test_after_kill_9_the_remaining_losses_are_bit_for_bit_those_of_an_uninterrupted_training(place, killed, two_ranks_again):
    assert killed.code != 0
    assert two_ranks_again.results["killed"]["outcome"] == "done", two_ranks_again.output
    assert "killed: goes on after step 4" in two_ranks_again.output
    assert losses(place / "killed") == losses(place / "long")
    assert all(torch.equal(*pair) for pair in zip(*(torch.load(place / name / "weights.pt").values() for name in ("killed", "long")), strict=True))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(place, two_ranks_again):
    checkpoints = place / "damaged" / "checkpoints"
    assert f"WARNING: checkpoint {checkpoints / 'step-00000008'} is damaged: " in two_ranks_again.output
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt does not have the sha256" in two_ranks_again.output
    assert "damaged: goes on after step 6" in two_ranks_again.output
    assert losses(place / "damaged") == losses(place / "long")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000006", "step-00000008", "step-00000008.damaged"]


def test_where_every_checkpoint_is_damaged_training_does_not_silently_start_again(place, two_ranks_again):
    found = two_ranks_again.results["all-damaged"]
    assert found["outcome"] == "error"
    assert "every checkpoint is damaged" in found["message"]
    assert str(place / "all-damaged") in found["message"]


@pytest.mark.parametrize("name", ["forged", "forged-trainee"])
def test_a_pickle_with_code_is_refused_and_not_executed_though_its_checksum_matches(name, place, one_rank):
    found = one_rank.results[name]
    assert found["outcome"] == "error"
    assert "refused, it holds more than tensors" in found["message"]
    assert not (place / "executed").exists()
    pickle.loads(pickle.dumps(Payload(place / "executed")))
    assert (place / "executed").exists(), "the payload would have worked"
    (place / "executed").unlink()


def test_a_checkpoint_of_other_data_or_another_stage_is_refused(one_rank):
    assert "made with data 'toy', this run has 'other'" in one_rank.results["other-data"]["message"]
    assert "made with ZeRO stage 0, this run has 2" in one_rank.results["other-stage"]["message"]


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_checkpoint_from_before(place, one_rank):
    message = one_rank.results["diverges"]["message"]
    assert "step 4: loss second is nan" in message
    assert "lower lr" in message
    assert [path.name for path in (place / "diverges" / "checkpoints").iterdir()] == ["step-00000002"]


def test_activation_checkpointing_computes_twice_and_changes_nothing(place, two_ranks):
    assert losses(place / "recomputed") == losses(place / "long")
    assert two_ranks.results["recomputed"]["calls"] == 2 * two_ranks.results["long"]["calls"]


def test_only_the_newest_checkpoints_stay(place, two_ranks):
    assert sorted(path.name for path in (place / "long" / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_a_finished_training_answers_at_once_with_the_same_losses_and_weights(two_ranks, two_ranks_again):
    assert two_ranks_again.results["long"] == two_ranks.results["long"] | {"calls": 0}


def test_without_a_side_module_one_rank_alone_needs_no_launcher(one_rank):
    assert one_rank.results["zero0-again"]["outcome"] == "done", one_rank.output
