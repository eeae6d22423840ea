"""`Update`: apply, scale, remove to the bit, save and load, re-apply after training, refuse other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfade


def model(dtype: torch.dtype = torch.float32, width: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).to(dtype)


def update(scale: float = 1e-3) -> kfade.Update:
    torch.manual_seed(1)
    return kfade.Update({"0.weight": scale * torch.randn(5, 4), "2.bias": scale * torch.randn(3)}, "some/model")


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_scales_and_remove_restores_every_bit(dtype: torch.dtype) -> None:
    net, change = model(dtype), update()
    before = state(net)
    change.apply_(net, scale=0.5)
    expected = (before["0.weight"].double() + 0.5 * change.tensors["0.weight"].double()).to(dtype)
    torch.testing.assert_close(net.state_dict()["0.weight"], expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    change.apply_(net, scale=2.0)
    change.remove_(net)
    change.remove_(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="no application"):
        change.remove_(net)


def test_a_wider_model_keeps_its_own_bits() -> None:
    net, change = model(torch.float64), update()
    before = state(net)
    change.apply_(net, scale=0.5)
    expected = before["0.weight"] + 0.5 * change.tensors["0.weight"].double()
    torch.testing.assert_close(net.state_dict()["0.weight"], expected, rtol=1e-15, atol=1e-16)


def test_groups_of_weights_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for limit in (1 << 30, 1):
        monkeypatch.setattr("kfade.update.GROUP_BYTES", limit)
        net = model(torch.bfloat16)
        update().apply_(net, 0.5)
        states.append(state(net))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_update_that_fails_half_way_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfade.update import apply_update_

    done: list[object] = []

    def runs_out(*arguments: Any) -> None:
        if done:
            raise torch.OutOfMemoryError("out of memory")
        done.append(apply_update_(*arguments))

    monkeypatch.setattr("kfade.update.GROUP_BYTES", 1)
    monkeypatch.setattr("kfade.update.apply_update_", runs_out)
    net, change = model(), update()
    before = state(net)
    with pytest.raises(torch.OutOfMemoryError):
        change.apply_(net)
    assert done and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="no application"):
        change.remove_(net)


def test_a_file_in_16_bit_is_added_in_float32() -> None:
    net, change = model(), update()
    change.tensors = {name: value.bfloat16() for name, value in change.tensors.items()}
    before = state(net)
    change.apply_(net)
    assert torch.equal(net.state_dict()["2.bias"], before["2.bias"] + change.tensors["2.bias"].float())


def test_a_parameter_under_two_names_is_refused() -> None:
    net = model(width=4)
    net.add_module("3", nn.Linear(4, 4, bias=False))
    net[3].weight = net[0].weight
    twice = kfade.Update({"0.weight": torch.ones(4, 4), "3.weight": torch.ones(4, 4)})
    before = state(net)
    with pytest.raises(ValueError, match=r"3\.weight: tied to 0\.weight in the model"):
        twice.apply_(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_removal_after_training_subtracts_and_reapplying_adds() -> None:
    net, change = model(), update()
    start = state(net)
    change.apply_(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.25)
    trained = state(net)
    change.remove_(net)
    torch.testing.assert_close(net.state_dict()["0.weight"], start["0.weight"] + 0.25)
    change.apply_(net)
    torch.testing.assert_close(net.state_dict()["0.weight"], trained["0.weight"])


def test_save_and_load_give_the_same_bits(tmp_path: Path) -> None:
    change = update()
    assert change.save(tmp_path / "run") == tmp_path / "run" / "update.safetensors"
    loaded = kfade.Update.load(tmp_path / "run")
    assert loaded.model_id == "some/model"
    assert all(torch.equal(loaded.tensors[name], value) for name, value in change.tensors.items())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["update.safetensors"]


def test_another_model_is_refused_with_every_mismatch_and_left_alone() -> None:
    net, change = model(width=6), update()
    change.tensors["9.weight"] = torch.zeros(1)
    before = state(net)
    with pytest.raises(ValueError, match=r"0\.weight: \[5, 4\] in the update, \[6, 4\].*9\.weight: not in the model"):
        change.apply_(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1"])
def test_bad_scale_is_named(scale: float) -> None:
    with pytest.raises(ValueError, match="scale is"):
        update().apply_(model(), scale=scale)


def test_files_that_are_not_updates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(kfade.StorageError, match="cannot be read"):
        kfade.Update.load(tmp_path / "absent.safetensors")
    path = update().save(tmp_path / "run")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(kfade.StorageError, match="cannot be read"):
        kfade.Update.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(kfade.StorageError, match="format"):
        kfade.Update.load(path)
