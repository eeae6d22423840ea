"""The same numbers as curvlinops (K-FAC) and kronfluence (per-sequence EK-FAC), once normalisations are undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import VOCABULARY, Batch, batch, hand_made, sampled_labels, tiny
from oracles import assert_close, relative
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import kfade

TOLERANCE = 1e-4
FISHERS = ["empirical", "sampled"]


def model_of(kind: str) -> nn.Module:
    """float32, and with linear layers only: neither peer knows Conv1D."""
    return hand_made().float() if kind == "hand-made" else tiny(kind, torch.float32)


def labels_for(model: nn.Module, one: Batch, fisher: str) -> Tensor:
    """The peers are handed our sampled labels as if they were the data's; no token is predicted from padding."""
    labels = (one["labels"] if fisher == "empirical" else sampled_labels(model, [one])[0]).clone()
    labels[:, 1:][one["attention_mask"][:, :-1] == 0] = -100
    return labels


def shifted(labels: Tensor) -> Tensor:
    """Labels aligned with the logits that predict them; the last position predicts nothing."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def logits_of(model: nn.Module, one: Batch) -> Tensor:
    inputs = {name: one[name] for name in ("input_ids", "attention_mask")}
    if hasattr(model, "config"):  # with padding on the left, positions begin at the first token
        inputs["position_ids"] = (one["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**inputs).logits


# ------------------------------------------------------------------------------------------ curvlinops


class Classes(nn.Module):
    """Logits in the layout of `CrossEntropyLoss`: classes before tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = logits_of(self.model, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
        return logits.transpose(1, 2)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", ["llama", "phi", "hand-made"])
def test_kfac_is_that_of_curvlinops(kind: str, fisher: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, one = model_of(kind), batch("none")  # it has no notion of padding
    ours = kfade.fit(model, [one], kfade.FitConfig(curvature="kfac", fisher=fisher, modules="^(?!.*head)"))
    assert not any("head" in name for name in ours)
    labels = shifted(labels_for(model, one, fisher))
    parameters = [p for name in ours for p in model.get_submodule(name).parameters()]
    theirs = curvlinops.KFACLinearOperator(
        Classes(model),
        nn.CrossEntropyLoss(reduction="sum", ignore_index=-100),
        parameters,
        [(one["input_ids"], labels)],
        check_deterministic=False,
        fisher_type="empirical",
        num_per_example_loss_terms=labels.shape[1],
        num_data=labels.shape[0],
        separate_weight_and_bias=False,
    )
    theirs.compute_kronecker_factors()
    for name, layer in ours.items():
        # It divides A by sequences × tokens, and leaves S as the sum.
        a, s = theirs._input_covariances[f"model.{name}"], theirs._gradient_covariances[f"model.{name}"]
        assert_close(layer.a_sum.to_dense(), a * labels.numel(), TOLERANCE, f"A of {name}")
        assert_close(layer.s_sum.to_dense(), s, TOLERANCE, f"S of {name}")
        assert_close(layer.input_factor(), a, TOLERANCE)


# ----------------------------------------------------------------------------------------- kronfluence


@pytest.fixture
def kronfluence() -> Any:
    return pytest.importorskip("kronfluence")


def their_task(tracked: list[str]) -> Any:
    from kronfluence.task import Task

    class Given(Task):
        """The summed loss of the labels that a batch brings."""

        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            logits = logits_of(model, batch)[:, :-1].reshape(-1, VOCABULARY)
            return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].reshape(-1), reduction="sum")

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

    return Given()


def as_linear(model: nn.Module) -> nn.Module:
    """A copy whose Conv1D layers are linear layers with the same weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "hand-made"])
def test_ekfac_is_that_of_kronfluence(kronfluence: Any, kind: str, fisher: str, padding: str) -> None:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor import covariance, eigen
    from kronfluence.utils.state import State

    model, one = model_of(kind), batch(padding)
    ours = kfade.fit(model, [one], kfade.FitConfig(fisher=fisher, modules="mlp|attn|up|gate|down|first|second"))
    data = {**one, "labels": labels_for(model, one, fisher)}
    task = their_task(list(ours))
    prepared = prepare_model(as_linear(model), task)
    arguments = FactorArguments(use_empirical_fisher=True)
    run = {
        "model": prepared, "state": State(cpu=True), "task": task, "loader": [data], "factor_args": arguments,
        "disable_tqdm": True,
    }  # fmt: skip
    _, factors = covariance.fit_covariance_matrices_with_loader(**run)
    # Λ is compared in one and the same basis, ours: eigenvectors are unique up to rounding / gap only.
    basis = {
        "activation_eigenvectors": {n: layer.q_in for n, layer in ours.items()},
        "activation_eigenvalues": {n: layer.lambda_in for n, layer in ours.items()},
        "gradient_eigenvectors": {n: layer.q_out for n, layer in ours.items()},
        "gradient_eigenvalues": {n: layer.lambda_out for n, layer in ours.items()},
    }
    sequences, corrected = eigen.fit_lambda_matrices_with_loader(**run, eigen_factors=basis)
    for name, layer in ours.items():
        assert_close(layer.a_sum.to_dense(), factors["activation_covariance"][name], TOLERANCE, f"A of {name}")
        assert_close(layer.s_sum.to_dense(), factors["gradient_covariance"][name], TOLERANCE, f"S of {name}")
        theirs = corrected["lambda_matrix"][name] / int(sequences)
        assert_close(layer.eigenvalues() * layer.losses / len(one["labels"]), theirs, TOLERANCE, f"Λ of {name}")
        assert int(factors["num_activation_covariance_processed"][name]) == layer.positions


def test_sampled_labels_matter() -> None:
    """So that agreement above is agreement on labels too."""
    model, one = model_of("llama"), batch("right")
    fits = [kfade.fit(model, [one], kfade.FitConfig(fisher=fisher, modules="layers.0.mlp")) for fisher in FISHERS]
    assert all(relative(fits[0][n].s_sum.to_dense(), fits[1][n].s_sum.to_dense()) > 100 * TOLERANCE for n in fits[0])
