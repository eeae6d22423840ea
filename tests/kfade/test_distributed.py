"""A fit that several ranks share, beside the same fit in one process; ranks that fail, and ranks that are gone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import models
import oracles
import pytest
import rank_work
import torch
from rank_work import CASES, ROUNDING, UNLEARNING, batches, fit_and_save, forget_and_retain, require_close, values_of
from ranks import run_ranks
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import kfade
from kfade import Curvature, FitConfig, Update, distributed
from kfade.errors import RankError
from kfade.layers import select
from kfade.ranks import share_out


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the workers have: products of two threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- a fit


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_fit_what_one_process_fits(size: int, tmp_path: Path) -> None:
    told = run_ranks(fit_and_save, size, tmp_path, tmp_path)
    for name, config in CASES.items():
        model = models.tiny("llama")
        one, many = kfade.fit(model, batches(), config), Curvature.load(tmp_path / name, model)
        require_close(many, one)
        assert sorted(layer for rank in told for layer in rank[name]) == sorted(one), "each layer has one owner"
        if size == 1:
            for layer, state in one.items():
                for key, value in values_of(state).items():
                    assert torch.equal(values_of(many[layer])[key], value), f"{key} of {layer}"
        one.save(tmp_path / f"whole {name}")
        there, here = ({p.name for p in (tmp_path / x).iterdir()} for x in (f"whole {name}", name))
        assert here == there, "the same files, whoever writes them"


def test_owners_share_the_cost() -> None:
    layers = select(models.tiny("llama", num_hidden_layers=6), "mlp")
    owners = distributed.owners_of(layers, 4, FitConfig())
    orders = [(layer.width_in, owners.inputs[layer.name]) for layer in layers if layer.leads]
    orders += [(layer.d_out, owners.outputs[layer.name]) for layer in layers]
    loads = [sum(n**3 for n, owner in orders if owner == rank) for rank in range(4)]
    # Greedy, the dearest first: no rank has more than the least one and one item.
    assert max(loads) - min(loads) <= max(n for n, _ in orders) ** 3


def test_both_factors_of_a_layer_are_with_who_solves_by_cholesky() -> None:
    layers = select(models.tiny("llama", num_hidden_layers=6), "all-linear")
    owners = distributed.owners_of(layers, 4, FitConfig(curvature="kfac", decomposition="cholesky"))
    assert all(owners.outputs[layer.name] == owners.inputs[layer.group] for layer in layers)
    assert set(owners.inputs.values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_take_a_basis(size: int, tmp_path: Path) -> None:
    run_ranks(rank_work.fit_with_basis, size, tmp_path, tmp_path)
    for name in rank_work.WITH_BASIS:
        model, config = models.tiny("llama"), CASES[name]
        basis = kfade.fit(model, batches()[:2], config)
        one = kfade.fit(model, batches(), config, basis=basis)
        many = Curvature.load(tmp_path / name, model)
        require_close(many, one)
        for layer, state in basis.items():
            q = many[layer].input_eigenvectors()
            assert torch.equal(q, state.input_eigenvectors()), "taken as it is"


def test_items_go_to_who_has_least() -> None:
    assert share_out([5.0, 1.0, 4.0, 3.0], 2) == [0, 0, 1, 1]
    assert share_out([1.0] * 5, 3) == [0, 1, 2, 0, 1], "equals in turn"
    assert share_out([1.0, 1.0], 2, [3.0, 0.0]) == [1, 0], "who had less before comes first"
    assert share_out([], 2) == []


def test_what_a_rank_has_of_a_fit(tmp_path: Path) -> None:
    """Layers of another rank are refused by name, and never solved with as if they had no curvature."""
    first, second = run_ranks(rank_work.look_around, 2, tmp_path)
    assert first["held"].isdisjoint(second["held"]) and first["all"] == second["all"] == first["held"] | second["held"]
    for number, told in enumerate((first, second)):
        assert f"is with rank {1 - number}" in told["missing"]
        assert "unknown layers" in told["solve"]
        assert told["solved"] <= 1e-12, "a rank solves with its own layers as one process does"
    # Both halves of each input group have one factor A, and one rank of it.
    assert any(f"it is with rank {owner}" in told["factor"] for owner, told in ((1, first), (0, second)))


def test_the_same_bits_twice(tmp_path: Path) -> None:
    one, two = (run_ranks(rank_work.fingerprint, 2, tmp_path) for _ in range(2))
    assert one == two


# ----------------------------------------------------------------------------------------- wrapped models


@pytest.mark.parametrize("size, how, name", [
    (2, "ddp", "kfac"), (2, "fsdp", "ekfac"), (2, "blocks", "low rank"), (2, "root", "diagonal"),
    pytest.param(4, "fsdp", "passes", marks=pytest.mark.slow),
])  # fmt: skip
def test_wrapped_models_are_fitted(size: int, how: str, name: str, tmp_path: Path) -> None:
    """Of four ranks one has no batch, and runs what carries nothing beside the others."""
    for told in run_ranks(rank_work.fit_wrapped, size, tmp_path, tmp_path, how, name):
        assert told == {"weights": True, "flags": True}, "the model is left as it was"
    model = models.tiny("llama")
    many = Curvature.load(tmp_path / f"{how} {name}", model)
    require_close(many, kfade.fit(model, batches(), CASES[name]))


@pytest.mark.parametrize("size, how, names", [
    (2, "plain", ("one step", "steps", "cholesky")), (2, "plain", ("cg",)), (3, "ddp", ("cg",)),
    (2, "ddp", ("one step",)), (2, "fsdp", ("steps",)),
    pytest.param(4, "plain", ("steps", "npo"), marks=pytest.mark.slow),
    pytest.param(4, "fsdp", ("one step", "npo"), marks=pytest.mark.slow),
])  # fmt: skip
def test_ranks_unlearn_what_one_process_unlearns(size: int, how: str, names: tuple[str, ...], tmp_path: Path) -> None:
    told = run_ranks(rank_work.unlearn_wrapped, size, tmp_path, tmp_path, how, names)
    assert all(rank == told[0] for rank in told), "every rank has the same bits, and has measured the same"
    for name in names:
        model = models.tiny("llama")
        one = kfade.unlearn(model, *forget_and_retain(), UNLEARNING[name])
        many = Update.load(tmp_path / f"{how} {name}.safetensors")
        assert many.tensors.keys() == one.tensors.keys()
        for key, tensor in one.tensors.items():
            oracles.assert_close(many.tensors[key], tensor, ROUNDING, key)
        found = told[0][name]
        assert found["outcome"] == pytest.approx(rank_work.measured(one), rel=1e-9)
        assert found["norm"] == pytest.approx(one.norm(), rel=1e-9)
        assert found["removed"] == rank_work.digest(model)
        many.apply_(model)
        assert found["applied"] == found["loaded"] == rank_work.digest(model), "shards take what the file says"


def test_the_fit_of_an_unlearning_of_a_sharded_model_saves_itself(tmp_path: Path) -> None:
    """The second run takes what the first has saved, and one process what two ranks have."""
    for name in ("first", "again"):
        assert run_ranks(rank_work.unlearn_stored, 2, tmp_path, tmp_path, name) == [None, None]
    first, again = (Update.load(tmp_path / name).tensors for name in ("first", "again"))
    one = kfade.unlearn(models.tiny("llama"), *forget_and_retain(), UNLEARNING["one step"], store=tmp_path / "s")
    for name, tensor in one.tensors.items():
        assert torch.equal(again[name], first[name])
        oracles.assert_close(first[name], tensor, ROUNDING, name)


def test_shards_are_read_from_files(tmp_path: Path) -> None:
    model = models.tiny("llama")
    state = {name: p.detach().clone() + 1 for name, p in model.named_parameters()}
    names = sorted(state)
    for folder in ("none", "other", "same"):
        (tmp_path / folder).mkdir()
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, tmp_path / "same" / f"{number}.safetensors")
    other = {**state, "lm_head.weight": torch.zeros(3, 2)}
    save_file(other, tmp_path / "other" / "a.safetensors")
    first, second = run_ranks(rank_work.misread, 2, tmp_path, tmp_path)
    assert first == second
    assert "none has no tensor" in first[0]
    assert "lm_head.weight of shape [3, 2]; the model's is [97, 16]" in first[1]
    model.load_state_dict(state)
    assert first[3] == rank_work.digest(model) != first[2]


@pytest.mark.slow
def test_a_model_larger_than_the_memory_of_each_process_is_unlearned(tmp_path: Path) -> None:
    """Four processes, none of which could hold the weights of 303 MB beside what PyTorch takes by itself."""
    room = 250_000_000
    torch.manual_seed(0)
    model = LlamaForCausalLM(rank_work.large_config()).eval()
    weights = sum(p.nbytes for p in model.parameters())
    assert weights > 1.2 * room
    rank_work.save_in_parts(model, tmp_path)
    told = run_ranks(rank_work.unlearn_within, 4, tmp_path, tmp_path, room, seconds=540)
    assert not [rank for rank in told if isinstance(rank, BaseException)]
    assert all("can't allocate memory" in rank["whole"] for rank in told), "the limit is one"
    one = kfade.unlearn(model, *rank_work.large_data(), rank_work.LARGE)
    many = Update.load(tmp_path / "update")
    assert one.norm() > 0
    for name, tensor in one.tensors.items():
        # The rounding of float32, over the smallest damped eigenvalues.
        oracles.assert_close(many.tensors[name], tensor, 1e-3, name)
    assert told[0]["outcome"] == pytest.approx(rank_work.measured(one), rel=1e-3)


def test_what_a_group_cannot_do(tmp_path: Path) -> None:
    for told in (ranks := run_ranks(rank_work.refused, 2, tmp_path)):
        assert "config.cg_iterations is 2 and the model is sharded" in told[0]
        assert "model is sharded and group is None" in told[1]
        assert "config.device_memory is 1.0 and the model is sharded" in told[2]
        assert "basis has the layers of one rank alone; save it and load it" in told[3]
    assert "sharded over 2 ranks and group has 1" in ranks[0][4]


# ------------------------------------------------------------------------------------------------- errors


def test_different_batches_are_refused_everywhere(tmp_path: Path) -> None:
    for error in run_ranks(rank_work.unlike, 2, tmp_path, "batches"):
        assert type(error) is ValueError and str(error).startswith("batches of rank 1 differ from those of rank 0")
    for error in run_ranks(rank_work.unlike, 2, tmp_path, "weights"):
        assert type(error) is ValueError and str(error).startswith("the model's weights of rank 1 differ")
    for error in run_ranks(rank_work.unlike_bases, 2, tmp_path):
        assert type(error) is ValueError and str(error).startswith("the spectra of the basis of rank 1 differ")
    for error in run_ranks(rank_work.unlike, 2, tmp_path, "options"):
        assert type(error) is ValueError and str(error).startswith("options of rank 1 differ")


def test_a_group_is_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="group is 'gloo'; it must be a process group"):
        kfade.fit(models.tiny("llama"), batches(), group="gloo")  # type: ignore[arg-type]


@pytest.mark.parametrize("when", ["forward", "decomposition"])
def test_an_exception_ends_all_ranks_with_its_name(when: str, tmp_path: Path) -> None:
    first, failed, third = run_ranks(rank_work.fail, 3, tmp_path, when, "raise")
    assert type(failed) is ZeroDivisionError, "the rank that fails raises its own error"
    for other, seconds in (first, third):
        assert type(other) is RankError
        assert str(other) == "rank 1 failed: ZeroDivisionError: in the midst of it"
        assert seconds < 30


@pytest.mark.parametrize("when", ["forward", "decomposition"])
def test_a_killed_rank_ends_all_ranks_with_its_name(when: str, tmp_path: Path) -> None:
    first, killed, third = run_ranks(rank_work.fail, 3, tmp_path, when, "kill")
    assert killed == -signal.SIGKILL
    for other, seconds in (first, third):
        assert type(other) is RankError and str(other).startswith("rank 1 gave no sign of life for 4 s")
        assert seconds < 30


@pytest.mark.parametrize("when", ["collective", "sharded"])
def test_a_rank_killed_while_others_wait_for_it_in_a_collective_is_named(when: str, tmp_path: Path) -> None:
    first, killed = run_ranks(rank_work.fail, 2, tmp_path, when, "kill")
    assert killed == -signal.SIGKILL
    assert type(first[0]) is RankError and str(first[0]).startswith("rank 1 gave no sign of life")
