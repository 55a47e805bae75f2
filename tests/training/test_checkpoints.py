from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pipeline.errors import UserError
from pipeline.training.checkpoints import _recorder, weights_only


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("plain", [True, False], ids=["plain pickle", "torch.save"])
def test_code_in_a_pickle_is_refused_even_where_the_caller_asks_for_it(plain, tmp_path):
    file, executed = tmp_path / "state.pt", tmp_path / "executed"
    if plain:
        file.write_bytes(pickle.dumps(Payload(executed), protocol=2))
    else:
        torch.save({"module": Payload(executed)}, file)
    with weights_only(), pytest.raises(UserError, match=r"state\.pt: refused, it holds more than tensors"):
        torch.load(file, weights_only=False)
    assert not executed.exists()


def test_what_deepspeed_saves_is_read(tmp_path):
    state = {"scaler": LossScaler(1), "stage": ZeroStageEnum.gradients, "slices": [OrderedDict(weight=fragment_address(3, 4))], "fp32": torch.ones(3)}
    torch.save(state, tmp_path / "state.pt")
    with weights_only():
        found = torch.load(tmp_path / "state.pt", weights_only=False)
    assert found["slices"][0]["weight"] == fragment_address(3, 4)
    assert found["stage"] is ZeroStageEnum.gradients


class Named:
    """Pickles as `getattr` of something: so do members of an enumeration in Python 3.11.0 to 3.11.3."""

    def __init__(self, *of):
        self.of = of

    def __reduce__(self):
        return getattr, self.of


def test_getattr_names_members_of_an_enumeration_and_nothing_else(tmp_path):
    torch.save([Named(ZeroStageEnum, "gradients")], tmp_path / "member.pt")
    with weights_only():
        assert torch.load(tmp_path / "member.pt") == [ZeroStageEnum.gradients]
    for number, of in enumerate([(ZeroStageEnum, "__init__"), (ZeroStageEnum, "__members__"), (LossScaler, "backward"), ("text", "format")]):
        torch.save([Named(*of)], tmp_path / f"{number}.pt")
        with weights_only(), pytest.raises(UserError, match="refused, it holds more than tensors"):
            torch.load(tmp_path / f"{number}.pt")


def test_torch_load_is_itself_again_afterwards():
    original = torch.load
    with weights_only():
        assert torch.load is not original
    assert torch.load is original


def test_a_full_disk_is_told_after_deepspeed_is_done_saving():
    shards = _recorder()
    shards.save({"weights": torch.zeros(1 << 16)}, "/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        shards.result()
