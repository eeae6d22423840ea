"""`unlearn`: uphill Gauss-Newton steps on a forget set, within a budget of measured retain KL.

One step from the accumulated change Δ is

    Δ ← Δ + (F + λI)⁻¹ (η ∇L_forget − c ∇KL_retain)

with F the Gauss-Newton matrix of the retain set (McKinney et al. 2026, arXiv 2602.10568), the
second gradient from the second step on. The weight c is one whose step lowers the KL to the original
model most, as measured on held-out retain sequences; η is then the largest whose measured
KL stays within the step's share of the budget. The quadratic prediction `½ Δᵀ F Δ` only says where
the search begins: steps of merely predicted size diverge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .capture import deterministic_mode, trained
from .config import UnlearnConfig, to_dict
from .curvature import Curvature
from .fit import check_batches, device_of, fit, model_id, state_dtype
from .layers import Layer, select
from .loss import Batch, Head, require_finite
from .progress import Progress, Stage, StageCost
from .update import Update

Matrices = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """One measurement of the search for η."""

    eta: float
    predicted_kl: float
    measured_kl: float


@dataclass(frozen=True)
class Step:
    """One step, taken or rolled back.

    Attributes:
        number: from 1.
        accepted: whether it was taken.
        reason: why not, if it was not.
        eta: step size.
        retain_weight: c, the weight of the retain-KL gradient.
        predicted_kl: `½ Δᵀ F Δ` of the whole change, nats a token.
        measured_kl: KL to the original model on held-out retain sequences, nats a token.
        forget_nll, retain_nll: token means after the step; retain on the held-out sequences.
        refitted: the curvature was fitted anew before this step.
        trials: the measurements behind η.
    """

    number: int
    accepted: bool
    reason: str
    eta: float
    retain_weight: float
    predicted_kl: float
    measured_kl: float
    forget_nll: float
    retain_nll: float
    refitted: bool
    trials: tuple[Trial, ...]


@dataclass
class UnlearnReport:
    """What a run measured.

    Attributes:
        config: its options.
        model_id: the model.
        forget_nll, retain_nll: token means before the first step.
        steps: the steps.
        costs: of the stages.
        warnings: what a reader should know.
    """

    config: dict[str, Any]
    model_id: str
    forget_nll: float
    retain_nll: float
    steps: list[Step] = field(default_factory=list)
    costs: list[StageCost] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> list[Step]:
        return [step for step in self.steps if step.accepted]

    def summary(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        values = asdict(self)
        values["costs"] = [{**asdict(cost), "rate": cost.rate} for cost in self.costs]
        return values


def split_holdout(batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
    """Split sequences evenly into a part to fit on and a part to measure on.

    Raises:
        ValueError: either part would have no loss position.
    """
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    seen = 0
    for batch in batches:
        held = torch.tensor(
            [math.floor((seen + i + 1) * share) > math.floor((seen + i) * share) for i in range(len(batch.input_ids))],
            device=batch.input_ids.device,
        )
        seen += len(held)
        for part, rows in zip(parts, (~held, held), strict=True):
            if bool(rows.any()):
                part.append(Batch(batch.index, batch.input_ids[rows], batch.attention[rows], batch.labels[rows]))
    for name, part in zip(("to fit on", "to measure KL on"), parts, strict=True):
        if not any(bool(batch.loss_mask.any()) for batch in part):
            raise ValueError(
                f"retain has {seen} sequences and holdout is {share}: no loss position is left {name};"
                " give more retain sequences or another holdout"
            )
    return parts


class _Run:
    """The model of one run, its tracked weights, and what is measured on it."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], head: Head, config: UnlearnConfig) -> None:
        self.model, self.layers, self.head, self.config = model, layers, head, config
        self.device, self.dtype = device_of(model), state_dtype(model)
        self._original = {name: p.detach().clone() for layer in layers for name, p in layer.parameters().items()}

    @torch.no_grad()
    def set_change(self, change: Matrices | None) -> None:
        """Give the tracked parameters their original value plus `change`; None restores the original bits."""
        for layer in self.layers:
            parts = layer.split(change[layer.name]) if change is not None else {}
            for name, p in layer.parameters().items():
                original = self._original[name]
                p.copy_(original if change is None else original.to(self.dtype) + parts[name])

    @torch.no_grad()
    def references(self, batches: Sequence[Batch], stage: Stage) -> list[Tensor]:
        """Loss rows of the model as it is, to measure KL from."""
        rows = []
        for batch in batches:
            rows.append(self.head.rows(batch).clone())
            stage.advance(batch.tokens)
        return rows

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], references: Sequence[Tensor], stage: Stage) -> tuple[float, float]:
        """Mean KL to the references and mean NLL, nats a token."""
        divergence = nll = 0.0
        tokens = 0
        for batch, reference in zip(batches, references, strict=True):
            rows = self.head.rows(batch)
            kl, _ = self.head.kl(rows, reference, gradient=False)
            divergence += float(kl.sum())
            nll += float(self.head.labelled(rows, batch)[2].sum(dtype=torch.float64))
            tokens += rows.shape[0]
            stage.advance(batch.tokens)
        return divergence / tokens, nll / tokens

    @torch.no_grad()
    def sequence_nll(self, batches: Sequence[Batch], stage: Stage) -> list[Tensor]:
        """Summed NLL of each sequence `[B]`, a tensor a batch."""
        sums = []
        for batch in batches:
            sums.append(batch.sequence_sums(self.head.labelled(self.head.rows(batch), batch)[2]))
            stage.advance(batch.tokens)
        return sums

    def _gradient_matrices(self) -> Matrices:
        result = {}
        for layer in self.layers:
            parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in layer.parameters().values()]
            bias = parts[1].to(self.dtype) if layer.has_bias else None
            result[layer.name] = layer.joint(parts[0].to(self.dtype), bias).clone()
        return result

    def _tracked(self) -> AbstractContextManager[None]:
        """Only the tracked parameters take gradients; what they had in `.grad` comes back at the end."""
        return trained(self.model, [p for layer in self.layers for p in layer.parameters().values()])

    def forget_gradient(
        self, batches: Sequence[Batch], start: Sequence[Tensor], stage: Stage
    ) -> tuple[Matrices, float]:
        """Gradient of the forget objective (token mean), and the token-mean NLL."""
        tokens = sum(len(batch.loss_index) for batch in batches)
        total = 0.0
        with self._tracked():
            for batch, before in zip(batches, start, strict=True):
                rows = self.head.rows(batch)
                _, grad, nll = self.head.labelled(rows, batch)
                require_finite(nll, batch, "the forget loss")
                total += float(nll.sum(dtype=torch.float64))
                if self.config.objective == "npo":
                    weight = npo_weights(batch.sequence_sums(nll), before, self.config.npo_beta)
                    sequence = batch.loss_index // batch.input_ids.shape[1]
                    grad = grad * weight[sequence].unsqueeze(1).to(grad.dtype)
                rows.backward(grad / tokens)
                stage.advance(batch.tokens)
            return self._gradient_matrices(), total / tokens

    def kl_gradient(self, batches: Sequence[Batch], references: Sequence[Tensor], stage: Stage) -> Matrices:
        """Gradient of the mean KL to the references (token mean)."""
        tokens = sum(len(batch.loss_index) for batch in batches)
        with self._tracked():
            for batch, reference in zip(batches, references, strict=True):
                rows = self.head.rows(batch)
                _, grad = self.head.kl(rows, reference)
                rows.backward(grad / tokens)
                stage.advance(batch.tokens)
            return self._gradient_matrices()


def npo_weights(nll: Tensor, start: Tensor, beta: float) -> Tensor:
    """Weight of each sequence's gradient under NPO, `2σ(β(log p − log p₀))`: 1 at first, 0 once forgotten.

    Zhang et al. 2024 (arXiv 2404.05868), equation of the adaptive smoothing weight.

    Args:
        nll: summed NLL of each sequence under the model as it is, `[B]`.
        start: the same under the original model.
        beta: inverse temperature.
    """
    return 2 * torch.sigmoid(beta * (start - nll))


def _combine(*terms: tuple[float, Matrices]) -> Matrices:
    names = terms[0][1]
    return {name: sum((weight * m[name] for weight, m in terms[1:]), terms[0][0] * terms[0][1][name]) for name in names}


class _Quadratic:
    """The prediction `½ (Δ + ηd)ᵀ F (Δ + ηd)` as a polynomial in η."""

    def __init__(self, curvature: Curvature, change: Matrices, direction: Matrices) -> None:
        def product(left: Matrices, right: Matrices) -> float:
            return sum(curvature[name].product(left[name], right[name]) for name in left)

        self.constant = 0.5 * product(change, change)
        self.slope = product(change, direction)
        self.curve = 0.5 * product(direction, direction)

    def __call__(self, eta: float) -> float:
        return self.constant + eta * self.slope + eta * eta * self.curve

    def reach(self, kl: float, at_zero: float) -> float:
        """The positive η at which the polynomial, moved to `at_zero` at 0, reaches `kl`."""
        if self.curve <= 0:
            return 0.0
        return (-self.slope + math.sqrt(max(0.0, self.slope**2 + 4 * self.curve * (kl - at_zero)))) / (2 * self.curve)


def search_step_size(
    measure: Callable[[float], float],
    predicted: Callable[[float], float],
    first: float,
    at_zero: float,
    target: float,
    trials: int,
) -> tuple[float, list[Trial]]:
    """The largest η found whose measured KL is at most `target`; 0 if none was.

    Args:
        measure: η → measured KL.
        predicted: η → predicted KL, recorded beside it.
        first: where to begin.
        at_zero: measured KL at η = 0.
        target: budget.
        trials: at most so many measurements.

    KL above `at_zero` is taken as a power of η, quadratic at first and then as the last two
    measurements say, and the next η aims 5 % below the target, inside the bracket of the largest good
    and the smallest bad one. Within 8 % of the target is enough. Where a step of twice the length or more
    adds less than a tenth to the KL, it has saturated, and longer ones would only destroy: the search ends.
    """
    low, high = 0.0, math.inf
    eta, power = first, 2.0
    last_eta = last_share = 0.0
    done: list[Trial] = []
    for number in range(trials):
        kl = measure(eta)
        done.append(Trial(eta, predicted(eta), kl))
        share = (kl - at_zero) / (target - at_zero) if math.isfinite(kl) else math.inf
        if kl <= target:
            saturated = eta >= 2 * last_eta > 0 and 0.01 < share < 1.1 * last_share
            if saturated:
                break
            low = max(low, eta)
            if share >= 0.92:
                break
        else:
            high = min(high, eta)
        if 0 < last_share < math.inf and 0 < share < math.inf and share != last_share and eta != last_eta:
            power = min(4.0, max(0.5, math.log(share / last_share) / math.log(eta / last_eta)))
        last_eta, last_share = eta, share
        guess = eta * (0.95 / share) ** (1 / power) if 0 < share < math.inf else 0.0
        if low == 0.0:
            # Each miss in a row aims a little lower, so that a wrong power cannot creep up on the target.
            guess *= 0.9**number
        if low < guess < high:
            eta = min(guess, 30 * eta)
        elif low == 0.0:
            eta = high / 4 if math.isfinite(high) else 4 * eta
        else:
            eta = math.sqrt(low * high) if math.isfinite(high) else 4 * low
    return low, done


def unlearn(
    model: nn.Module,
    forget: Iterable[Mapping[str, Tensor]],
    retain: Iterable[Mapping[str, Tensor]],
    config: UnlearnConfig | None = None,
    *,
    curvature: Curvature | None = None,
    progress: Progress | None = None,
) -> Update:
    """Find the update that makes a model lose a forget set within a retain-KL budget.

    The model is left as it was, to the bit; apply the update to it with `Update.apply_`.

    Args:
        model: a causal language model, as `fit` takes it.
        forget: batches whose labelled tokens are to become unlikely.
        retain: batches whose outputs are to stay. A share of their sequences (`holdout`) is kept out
            of the fit and used to measure.
        config: options; see UnlearnConfig.
        curvature: of the retain set, fitted before; `config.fit` is then used for refits alone.
        progress: where to show progress and record costs.

    Returns:
        The update of all accepted steps, with `report`; empty of change if the first step failed.

    Raises:
        ValueError: bad batches, or a `curvature` of other layers.
        UnsupportedLayerError, NonFiniteError: as `fit`.
    """
    config = config or UnlearnConfig()
    progress = progress or Progress()
    layers = select(model, config.fit.modules)
    device = device_of(model)
    forget_batches = check_batches(forget, device, "forget")
    fitted, held = split_holdout(check_batches(retain, device, "retain"), config.holdout)
    if curvature is not None and set(curvature) != {layer.name for layer in layers}:
        raise ValueError(
            f"curvature has layers {sorted(curvature)[:4]}…; it must have those that modules selects,"
            f" {sorted(layer.name for layer in layers)[:4]}…"
        )
    with deterministic_mode(model):
        head = Head(model, fitted[0], {module for layer in layers for module in layer.modules}, config.fit.autocast)
        run = _Run(model, layers, head, config)
        try:
            stepper = _Stepper(run, forget_batches, fitted, held, curvature, progress)
            stepper.take_all()
        finally:
            run.set_change(None)
    parts = [layer.split(stepper.change[layer.name]) for layer in layers]
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    return Update(tensors, stepper.report.model_id, stepper.report)


def as_batches(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Checked batches as the mappings that `fit` takes."""
    return [{"input_ids": b.input_ids, "attention_mask": b.attention.long(), "labels": b.labels} for b in batches]


class _Stepper:
    """Takes the steps of one run."""

    def __init__(
        self,
        run: _Run,
        forget: Sequence[Batch],
        fitted: Sequence[Batch],
        held: Sequence[Batch],
        curvature: Curvature | None,
        progress: Progress,
    ) -> None:
        self.run, self.config, self.progress = run, run.config, progress
        self.forget, self.fitted, self.held = forget, fitted, held
        self.curvature = curvature
        self.change: Matrices = {
            layer.name: torch.zeros(layer.d_out, layer.width_in, dtype=run.dtype, device=run.device)
            for layer in run.layers
        }
        self._kl = 0.0
        self._uses_pull = self.config.retain_term and self.config.steps > 1
        self._tokens = {
            name: sum(batch.tokens for batch in part)
            for name, part in (("forget", forget), ("fitted", fitted), ("held", held))
        }
        self._forget_losses = sum(len(batch.loss_index) for batch in forget)
        kept = [*held, *fitted] if self._uses_pull else list(held)
        total = sum(batch.tokens for batch in (*kept, *forget, *held))
        with progress.stage("original outputs", total) as stage:
            rows = run.references(kept, stage)
            self._held_rows, self._fitted_rows = rows[: len(held)], rows[len(held) :]
            self._start = run.sequence_nll(forget, stage)
            _, retain_nll = run.measure(held, self._held_rows, stage)
        self.report = UnlearnReport(
            to_dict(self.config), model_id(run.model), self._forget_nll(self._start), retain_nll, costs=progress.costs
        )

    def _forget_nll(self, sums: Sequence[Tensor]) -> float:
        return sum(float(s.sum(dtype=torch.float64)) for s in sums) / self._forget_losses

    def _measure(self, change: Matrices, stage: Stage) -> float:
        """Held-out KL with this change in place."""
        self.run.set_change(change)
        return self.run.measure(self.held, self._held_rows, stage)[0]

    def _solve(self, gradient: Matrices) -> Matrices:
        assert self.curvature is not None
        solved = self.curvature.solve_matrices(gradient, self.config.damping, self.config.damping_kind)
        return {name: matrix.to(self.run.dtype) for name, matrix in solved.items()}

    def _directions(self, number: int) -> tuple[Matrices, Matrices | None, float]:
        """The solved forget gradient; from the second step on that of the retain KL, and how fast it lowers it."""
        pulls = number > 1 and self._uses_pull
        tokens = self._tokens["forget"] + pulls * self._tokens["fitted"]
        with self.progress.stage(f"step {number}: gradients", tokens) as stage:
            gradient, _ = self.run.forget_gradient(self.forget, self._start, stage)
            if not pulls:
                return self._solve(gradient), None, 0.0
            rise = self.run.kl_gradient(self.fitted, self._fitted_rows, stage)
            pull = self._solve(rise)
            return self._solve(gradient), pull, sum(float((rise[name] * pull[name]).sum()) for name in rise)

    def _retain_weight(self, pull: Matrices, slope: float, stage: Stage) -> tuple[float, float]:
        """The weight c whose step `−c·pull` lowers the measured KL most, and that KL; 0 if none does.

        The search goes down from the largest weight. Each next one is the minimum of the parabola
        through the KL before, its known slope there, and the last measurement, at most halved and at
        most divided by thirty.

        Args:
            pull: the solved gradient of the retain KL.
            slope: fall of the KL for each unit of c, at 0.
        """
        best, lowest, weight = 0.0, self._kl, self.config.retain_weight
        for _ in range(self.config.trials):
            kl = self._measure(_combine((1.0, self.change), (-weight, pull)), stage)
            if kl < lowest:
                best, lowest = weight, kl
            elif best > 0:
                break
            bend = (kl - self._kl + slope * weight) / weight**2 if math.isfinite(kl) else math.inf
            minimum = slope / (2 * bend) if bend > 0 else 0.0
            weight = min(weight / 2, max(weight / 30, minimum))
        return best, lowest

    def _step_size(
        self, number: int, at_zero: float, predicted: _Quadratic, measure: Callable[[float], float]
    ) -> tuple[float, tuple[Trial, ...], str]:
        """η, the trials behind it, and why it is 0 if it is."""
        if self.config.step_size is not None:
            eta = self.config.step_size
            trial = Trial(eta, predicted(eta), measure(eta))
            finite = math.isfinite(trial.measured_kl)
            return (eta if finite else 0.0), (trial,), "" if finite else "the measured KL is not finite"
        assert self.config.kl_budget is not None
        target = self.config.kl_budget * number / self.config.steps
        if not at_zero < target:
            return 0.0, (), f"the retain KL is {at_zero:.4g} before the step; its budget is {target:.4g} nats a token"
        first = predicted.reach(target, at_zero)
        if not (first > 0 and math.isfinite(first)):
            return 0.0, (), "the direction is zero or not finite"
        eta, trials = search_step_size(measure, predicted, first, at_zero, target, self.config.trials)
        return eta, tuple(trials), "" if eta > 0 else f"no trial met the retain-KL budget of {target:.4g} nats a token"

    def take(self, number: int) -> Step:
        """Take step `number`, or leave everything as it was and say why."""
        refit = self.config.refit_every > 0 and number > 1 and (number - 1) % self.config.refit_every == 0
        if self.curvature is None or refit:
            self.curvature = fit(self.run.model, as_batches(self.fitted), self.config.fit, progress=self.progress)
        direction, pull, slope = self._directions(number)
        with self.progress.stage(f"step {number}: search") as stage:
            base, weight, at_zero = self.change, 0.0, self._kl
            if pull is not None:
                weight, at_zero = self._retain_weight(pull, slope, stage)
                base = _combine((1.0, self.change), (-weight, pull))
            predicted = _Quadratic(self.curvature, base, direction)

            def measure(eta: float) -> float:
                return self._measure(_combine((1.0, base), (eta, direction)), stage)

            eta, trials, reason = self._step_size(number, at_zero, predicted, measure)
            if eta > 0:
                self.change = _combine((1.0, base), (eta, direction))
            self.run.set_change(self.change)
            self._kl, retain_nll = self.run.measure(self.held, self._held_rows, stage)
            forget_nll = self._forget_nll(self.run.sequence_nll(self.forget, stage))
        return Step(
            number, not reason, reason, eta, weight, predicted(eta), self._kl, forget_nll, retain_nll, refit, trials
        )  # fmt: skip

    def take_all(self) -> None:
        """All steps, until one cannot be taken."""
        for number in range(1, self.config.steps + 1):
            step = self.take(number)
            self.report.steps.append(step)
            self.progress.say(
                f"step {number}: forget NLL {step.forget_nll:.3f}, retain KL {step.measured_kl:.4f}"
                f" (predicted {step.predicted_kl:.2g}), η {step.eta:.3g}, c {step.retain_weight:g}"
                + ("" if step.accepted else f"; rolled back: {step.reason}")
            )
            if not step.accepted:
                self.report.warnings.append(f"step {number} was rolled back: {step.reason}")
                break
        last = self.report.accepted[-1] if self.report.accepted else None
        if last is not None and last.measured_kl > 10 * last.predicted_kl > 0:
            self.report.warnings.append(
                f"the measured KL is {last.measured_kl / last.predicted_kl:,.0f} times the predicted one: the"
                " block-diagonal matrix misses how layers act together, so the step rests on the measurement alone"
            )
        if len(self.report.accepted) > 1 and self.config.refit_every == 0:
            self.report.warnings.append(
                "the curvature was fitted once, at the original weights; steps far from them follow a stale matrix"
                " (refit_every fits it anew)"
            )
