"""`unlearn`: Gauss-Newton steps away from a forget set, within a budget of measured retain KL.

One step from the accumulated change Δ, on some of the forget set and some of the retain set, is

    Δ ← Δ − η (F + λI)⁻¹ (∇L + c ∇KL_retain)

with F the Gauss-Newton matrix of the retain set (McKinney et al. 2026, arXiv 2602.10568) and L what is descended on the
forget set: minus its loss, or the KL from outputs that do not know the labels. Where a step takes a whole forget
set of short answers there is one, by default, of the largest length found whose measured KL is within the budget. Else
there are many, which also pull what they lowered too far in long answers back to those outputs. The
first is *measured* to cost a share of the budget on held-out retain sequences, and what is predicted of it,
`½ η² dᵀ(F + λI)d`, is kept for the others, falling to zero: by how much predictions are off differs a hundredfold
between models, but little between steps. But η is never many times the first: what is forgotten has no gradient, and
a step of a length that is kept would make much of the little that is left. On the way c follows the KL of each step's
retain batch, which its gradient needs anyway, so that the path ends near the budget, or before, where nothing is left
to forget; at the end the whole change is scaled down into it, or up where much of it is left. Steps of merely
predicted size diverge.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .batches import as_batches, cycled, enough, labelled_tokens, split_holdout, spread
from .capture import deterministic_mode
from .config import UnlearnConfig, to_dict
from .curvature import Curvature
from .distributed import ShardedCurvature, layer_owners, made_from
from .fit import fit_among
from .layers import select
from .linearise import Matrices, conjugate_gradients, dot
from .loss import Batch, Head, Ignorance, check_batches, require_finite
from .models import device_of, model_id
from .moved import MovedModel, Part
from .outcome import Outcome, Step, Trial, UnlearnReport
from .progress import Progress, Stage
from .ranks import Ranks
from .sharding import check_sharding, is_sharded, placed_like, unwrapped
from .step_size import search_step_size
from .update import Update

# Looks at the state on the way: after the first step and so often, each at so many held-out and forget sequences.
LOOKS = 4
GLANCE = 32
# On the way the KL may be so many times the budget: what early steps break, the retain term mends. Beyond, steps are
# shorter. The weight of that term is multiplied by the share of the budget that is spent, a mean over the last steps,
# within these factors; as strongly as so many times in a run.
OFF = 4.0
PULL = (0.5, 4.0)
PULLS = 16
# η is at most so many times that of the first step, by so much more from step to step; falling as all lengths do.
GROWTH, RISE = 10.0, 1.25
# Nothing is left where a pass over the forget set finds less than this share of the loss that the first one found.
LEFT = 0.01
# Many steps that leave something, and spend less than this share of the budget, are made longer together at the end.
SPARE = 0.5


def npo_weights(nll: Tensor, start: Tensor, beta: float) -> Tensor:
    """Weight of each sequence's gradient under NPO, `2σ(β(log p − log p₀))`: 1 at first, 0 once forgotten.

    Zhang et al. 2024 (arXiv 2404.05868), equation of the adaptive smoothing weight.

    Args:
        nll: summed NLL of each sequence under the model as it is, `[B]`.
        start: the same under the original model.
        beta: inverse temperature.
    """
    return 2 * torch.sigmoid(beta * (start - nll))


def _half_square(curvature: Curvature, change: Matrices) -> float:
    """`½ Δᵀ F Δ`, the predicted KL in nats a token."""
    return 0.5 * sum(curvature[name].product(matrix, matrix) for name, matrix in change.items())


def _scaled(change: Matrices, factor: float) -> Matrices:
    return {name: factor * matrix for name, matrix in change.items()}


def unlearn(
    model: nn.Module,
    forget: Iterable[Mapping[str, Tensor]],
    retain: Iterable[Mapping[str, Tensor]],
    config: UnlearnConfig | None = None,
    *,
    curvature: Curvature | None = None,
    progress: Progress | None = None,
    every: int = 0,
    observe: Callable[[int, float], None] | None = None,
    store: str | Path | None = None,
    group: ProcessGroup | None = None,
) -> Update:
    """Find the update that makes a model lose a forget set within a retain-KL budget.

    The model is left as it was, to the bit; apply the update to it with `Update.apply_`.

    Args:
        model: a causal language model, as `fit` takes it.
        forget: batches whose labelled tokens are to become unlikely.
        retain: batches whose outputs are to stay. A share of their sequences (`holdout`) is kept out
            of the fit and of the steps, and used to measure.
        config: options; see UnlearnConfig.
        curvature: of the retain set, fitted before; `config.fit` is then used for refits alone.
        progress: where to show progress and record costs.
        every: call `observe` after each so many steps, and after the last if nothing is left to forget; 0 never.
        observe: is told the steps taken and the seconds of unlearning so far, its own and looks on the way left out,
            with the model as the steps have made it, not yet scaled.
        store: a directory in which the fit saves itself, and goes on where it was cut off; see `kfade.fit`. Refits
            are not saved.
        group: the ranks that share the work; each calls this with the same arguments, all batches among them. None:
            this process alone.

    Returns:
        The update of all steps, with `report`; empty of change if no scale of it meets the budget. With a group every
        rank has all of it; where the model is sharded, its shards of it.

    Raises:
        ValueError: bad batches, a `curvature` of other layers, both a `curvature` and a `store`, or a
            sharded model with `config.cg_iterations`.
        StorageError, OSError: of `store`, as `fit`.
        RankError, UnsupportedLayerError, NonFiniteError: as `fit`.
    """
    config = config or UnlearnConfig()
    progress = progress or Progress()
    if curvature is not None and store is not None:
        raise ValueError(f"store is {store}, and a curvature is given: there is nothing to fit; give one of them")
    if (every > 0) != (observe is not None):
        raise ValueError(f"every is {every} and observe is {observe}; give both, with every at least 1, or neither")
    model = unwrapped(model)
    check_sharding(model, group)
    if config.cg_iterations and is_sharded(model):
        raise ValueError(
            f"config.cg_iterations is {config.cg_iterations} and the model is sharded, through which no forward-mode"
            " derivative is taken; it must be 0"
        )
    layers = select(model, config.fit.modules)
    device = device_of(model)
    forget_batches = [b for b in check_batches(forget, device, "forget") if len(b.loss_index)]
    tokens = labelled_tokens(forget_batches)
    sequences = sum(len(batch.input_ids) for batch in forget_batches)
    steps, pull_back = config.steps_over(tokens, sequences), config.pulls_back(tokens, sequences)
    config = replace(config, steps=steps, pull_back=pull_back)
    fitted, held = split_holdout(check_batches(retain, device, "retain"), config.holdout)
    names = None if curvature is None else set(curvature)
    if isinstance(curvature, ShardedCurvature) and group is not None:
        names = set(curvature.owners)
    if names is not None and names != {layer.name for layer in layers}:
        raise ValueError(
            f"curvature has layers {sorted(names)[:4]}…; it must have those that modules selects,"
            f" {sorted(layer.name for layer in layers)[:4]}…"
        )
    with deterministic_mode(model), Ranks(group) as ranks:
        if group is not None:
            ranks.require_same(made_from(model, [*forget_batches, *fitted, *held], config))
        head = Head(model, fitted[0], {module for layer in layers for module in layer.modules}, config.fit.autocast)
        run = MovedModel(model, layers, head, config, ranks)
        try:
            stepper = _Stepper(run, forget_batches, fitted, held, curvature, progress, store)
            stepper.take_all(every, observe)
            stepper.finish()
        finally:
            run.set_change(None)
        tensors = {}
        for layer, parts in run.delivered(stepper.change):
            for name, p in layer.parameters().items():
                tensors[name] = placed_like(parts[name], p)
    return Update(tensors, stepper.report.model_id, stepper.report)


class _Stepper:
    """Takes the steps of one run.

    Attributes:
        change: Δ, `[d_out, d_in (+ 1)]` by layer name.
        report: of the run.
    """

    def __init__(
        self,
        run: MovedModel,
        forget: Sequence[Batch],
        fitted: Sequence[Batch],
        held: Sequence[Batch],
        curvature: Curvature | None,
        progress: Progress,
        store: str | Path | None,
    ) -> None:
        self._store = store
        self.run, self.config, self.progress = run, run.config, progress
        self.forget, self.fitted = forget, fitted
        self.held = held = [batch for batch in held if len(batch.loss_index)]
        self.curvature = curvature
        self.change: Matrices = {}
        config = self.config
        assert config.steps is not None
        self._steps = config.steps
        self._predicted, self._retain_weight = 0.0, config.retain_weight
        self._first = math.inf
        # Of the batches of one step, and the sums of the forget set's by step.
        self._retain_kl: list[Tensor] = []
        self._forget_kl: list[Tensor] = []
        self._forget_losses: list[float] = []
        self._recent, self._spent = (0.0, 0.0), 0.0
        self._forgotten = False
        self._forgets = self._order(forget, "forget")
        losing = [batch for batch in fitted if len(batch.loss_index)]
        needed = config.retain_weight or config.cg_iterations
        self._retains = self._order(losing, "retain") if needed else [[]] * self._steps
        if not config.cg_iterations:
            # Before the first step the KL is 0, and so is its gradient.
            self._retains[0] = []
        self._few_held, self._few_forget = spread(held, GLANCE), spread(forget, GLANCE)
        self._refits, self._seconds = 0, 0.0

        pulled = {batch.index: batch for part in self._retains for batch in part}
        distils = config.objective == "distil"
        total = sum(b.tokens for part in (held, held, pulled.values(), *[forget] * (1 + distils)) for b in part)
        with progress.stage("original outputs", total) as stage:
            begin = time.perf_counter()
            self._held_rows = run.references(held, stage)
            self._retain_rows = run.references(pulled.values(), stage)
            self._forget_rows = run.references(forget if distils else [], stage)
            self._start = run.sequence_nll(forget, stage)
            _, retain_nll = run.measure(held, self._held_rows, stage)
            self._seconds += time.perf_counter() - begin
        self.report = UnlearnReport(
            to_dict(config), model_id(run.model), run.mean_nll(forget, self._start), retain_nll, costs=progress.costs
        )
        self._target_temperature = config.target_temperature or 1 + math.exp(-4 * self.report.forget_nll)

    def _order(self, batches: Sequence[Batch], what: str) -> list[list[Batch]]:
        """The batches of each step."""
        count = self.config.batches_in_step(labelled_tokens(batches))
        if count == len(batches):
            return [list(batches)] * self._steps
        order = cycled(batches, count * self._steps, f"{what} {self.config.fit.seed}")
        return [order[i : i + count] for i in range(0, len(order), count)]

    # ---- gradients on rows

    def _forget_on_rows(self, rows: Tensor, batch: Batch) -> Tensor:
        """Gradient of what is descended on a forget batch."""
        config = self.config
        if config.objective == "distil":
            target = Ignorance(batch.targets, config.margin, self._target_temperature, bool(config.pull_back))
            divergence, grad = self.run.head.kl(rows, self._forget_rows[batch.index], target=target)
            require_finite(divergence, batch, "the forget loss")
            self._forget_kl.append(divergence)
            return grad
        _, grad, nll = self.run.head.labelled(rows, batch)
        require_finite(nll, batch, "the forget loss")
        if config.objective == "npo":
            weight = npo_weights(batch.sequence_sums(nll), self._start[batch.index], config.npo_beta)
            grad = grad * weight[batch.loss_index // batch.input_ids.shape[1]].unsqueeze(1).to(grad.dtype)
        return -grad

    def _retain_on_rows(self, rows: Tensor, batch: Batch) -> Tensor:
        divergence, grad = self.run.head.kl(rows, self._retain_rows[batch.index])
        # Looked at once a step: reading it here would wait for a GPU at each batch.
        self._retain_kl.append(divergence)
        return grad

    # ---- steps

    def _direction(self, number: int, stage: Stage) -> tuple[Matrices, float]:
        """d = −(F + λI)⁻¹ g of one step, and `½ dᵀ(F + λI)d = −½ dᵀg`."""
        config, kept = self.config, self._retains[number - 1]
        parts: list[Part] = [(1.0, self._forgets[number - 1], self._forget_on_rows)]
        if config.retain_weight and kept:
            parts.append((self._retain_weight, kept, self._retain_on_rows))
        self._retain_kl, self._forget_kl = [], []
        gradient = self.run.gradient(parts, stage)
        if config.cg_iterations:
            solved = conjugate_gradients(
                lambda v: self._damped_product(v, kept),
                gradient,
                self._solve,
                config.cg_iterations,
                inner=lambda left, right: self.run.ranks.sums([dot(left, right)])[0],
            )
        else:
            solved = self._solve(gradient)
        direction = {name: matrix.neg_() for name, matrix in solved.items()}
        return direction, -0.5 * self.run.ranks.sums([dot(direction, gradient)])[0]

    def _solve(self, matrices: Matrices) -> Matrices:
        assert self.curvature is not None
        solved = self.curvature.solve_matrices(matrices, self.config.damping, self.config.damping_kind)
        return {name: matrix.to(self.run.dtype) for name, matrix in solved.items()}

    def _damped_product(self, matrices: Matrices, batches: Sequence[Batch]) -> Matrices:
        """`(G + λI) v` with the exact Gauss-Newton matrix of some retain batches, at the weights as they are."""
        assert self.curvature is not None
        run, config = self.run, self.config
        product = run.gauss_newton_product(matrices, batches)
        for name, matrix in product.items():
            matrix.add_(matrices[name], alpha=self.curvature[name].damping(config.damping, config.damping_kind))
        return product

    def _step_size(self, number: int, direction: Matrices, half_square: float) -> float:
        """η, for a direction of this `½ dᵀ(F + λI)d`; 0 where there is nothing to do."""
        config = self.config
        if config.step_size is not None:
            return config.step_size
        if not (math.isfinite(half_square) and half_square > 0):
            return 0.0
        if number == 1:
            self._predicted = self._first_prediction(direction, half_square)
            self._first = math.sqrt(self._predicted / half_square)
        # No higher power: of thousands of steps it would overflow.
        longest = self._first * min(GROWTH, RISE ** min(number - 1, 99))
        return (1 - (number - 1) / self._steps) * min(longest, math.sqrt(self._predicted / half_square))

    def _first_prediction(self, direction: Matrices, half_square: float) -> float:
        """The predicted KL of a first step that is measured to cost its share of the budget.

        Predictions are off by a factor that differs a hundredfold between models, but little between steps.
        """
        assert self.config.kl_budget is not None
        if self._steps == 1:
            # The search at the end measures it.
            return self.config.kl_budget
        target = self.config.kl_budget * self.config.step_share

        def measure(eta: float) -> float:
            self.run.set_change(_scaled(direction, eta))
            return self._glance_kl()[0]

        first = math.sqrt(target / half_square)
        eta, trials = search_step_size(measure, lambda x: x * x * half_square, first, 0.0, target, self.config.trials)
        return (eta or min(trial.eta for trial in trials)) ** 2 * half_square

    def take_all(self, every: int, observe: Callable[[int, float], None] | None) -> None:
        """All steps."""
        config, steps = self.config, self._steps
        looks = {1, *(-(-steps * i // LOOKS) for i in range(1, LOOKS + 1))} if steps > 1 else set()
        tokens = [sum(b.tokens for b in (*f, *r)) for f, r in zip(self._forgets, self._retains, strict=True)]
        begin = time.perf_counter()
        if self.curvature is None:
            self._fit(self._store)
        self._begin()
        self._seconds += time.perf_counter() - begin
        with self.progress.stage("steps", sum(tokens)) as stage:
            for number in range(1, steps + 1):
                begin = time.perf_counter()
                if config.refit_every and number > 1 and (number - 1) % config.refit_every == 0:
                    self._fit()
                    self._refits += 1
                weight = self._retain_weight
                direction, half_square = self._direction(number, stage)
                self._forgotten = self._adapt(number)
                eta = self._step_size(number, direction, half_square)
                for name, matrix in direction.items():
                    self.change[name].add_(matrix, alpha=eta)
                self.run.set_change(self.change)
                self._seconds += time.perf_counter() - begin
                self.report.tokens += tokens[number - 1]
                if number in looks or self._forgotten:
                    self._look(number, eta, weight)
                if observe is not None and (number % every == 0 or self._forgotten):
                    observe(number, self._seconds)
                if self._forgotten:
                    self.progress.say(f"nothing is left to forget after {number} of at most {steps} steps")
                    break

    def _begin(self) -> None:
        """Nothing is changed, of the layers that this rank owns."""
        assert self.curvature is not None
        run = self.run
        run.owners = layer_owners(self.curvature, run.ranks)
        for layer in run.layers:
            if run.owners[layer.name] == run.ranks.rank:
                self.change[layer.name] = torch.zeros(layer.d_out, layer.width_in, dtype=run.dtype, device=run.device)

    def _fit(self, store: str | Path | None = None) -> None:
        batches = as_batches(enough(self.fitted, self.run.layers, self.config.tokens_per_dimension))
        self.curvature = fit_among(self.run.model, batches, self.config.fit, self.progress, True, store, self.run.ranks)

    def _look(self, number: int, eta: float, weight: float) -> None:
        """Note the state on a few batches."""
        assert self.curvature is not None
        kl, retain_nll = self._glance_kl()
        forget_nll = self.run.mean_nll(self._few_forget, self.run.sequence_nll(self._few_forget, Stage(None, None)))
        predicted = self._predicted_kl()
        self.report.steps.append(Step(number, eta, predicted, kl, forget_nll, retain_nll, self._refits, weight))
        self.progress.say(f"step {number}: forget NLL {forget_nll:.3f}, retain KL {kl:.4f}, η {eta:.3g}")
        if self.config.kl_budget is not None and not self.config.retain_weight:
            self._shorten(kl / self.config.kl_budget)

    def _adapt(self, number: int) -> bool:
        """Adapt to what a step's own batches have shown; whether nothing is left to forget, within the budget."""
        retained = [float(sum(kl.sum() for kl in self._retain_kl)), sum(map(len, self._retain_kl))]
        forgotten = float(sum(kl.sum() for kl in self._forget_kl))
        divergence, count, loss = self.run.ranks.sums([*retained, forgotten])
        if self.config.kl_budget is not None and self.config.retain_weight and number > 1:
            self._follow(divergence, count)
        if self.config.objective != "distil":
            return False
        losses = self._forget_losses
        losses.append(loss)
        a_pass = self.config.steps_in(1, labelled_tokens(self.forget))
        return sum(losses[-a_pass:]) < LEFT * sum(losses[:a_pass]) and self._spent <= 1

    def _follow(self, divergence: float, count: float) -> None:
        """Pull harder to the original outputs where more than the budget is spent, less where less is."""
        budget = self.config.kl_budget
        assert budget is not None
        # A mean over tokens, as the budget is: batches of short answers cost more a token than those of long texts.
        finite = divergence if math.isfinite(divergence) else 1e3 * OFF * budget * count
        self._recent = (self._recent[0] / 2 + finite, self._recent[1] / 2 + count)
        self._spent = self._recent[0] / self._recent[1] / budget
        self._retain_weight *= min(PULL[1], max(PULL[0], self._spent)) ** min(1.0, PULLS / self._steps)
        self._shorten(self._spent)

    def _shorten(self, spent: float) -> None:
        """Take shorter steps from where far more than the budget is spent."""
        spent = spent if math.isfinite(spent) else 1e3 * OFF
        if spent > OFF:
            self._predicted *= max(OFF / spent, 1e-3)

    def _predicted_kl(self) -> float:
        """`½ Δᵀ F Δ` of the change so far."""
        assert self.curvature is not None
        return self.run.ranks.sums([_half_square(self.curvature, self.change)])[0]

    def _glance_kl(self) -> tuple[float, float]:
        """KL and NLL on a few held-out batches."""
        # No stage of its own: it would cut the progress of the steps.
        return self.run.measure(self._few_held, self._held_rows, Stage(None, None))

    def finish(self) -> None:
        """Scale the change to the budget, or drop it and say why."""
        assert self.curvature is not None
        unit = self._predicted_kl()
        with self.progress.stage("search for the scale") as stage:

            def measure(scale: float) -> float:
                self.run.set_change(_scaled(self.change, scale))
                return self.run.measure(self.held, self._held_rows, stage)[0]

            scale, trials, reason = self._scale(unit, measure)
            self.change = _scaled(self.change, scale)
            self.run.set_change(self.change if scale else None)
            kl, retain_nll = self.run.measure(self.held, self._held_rows, stage)
            forget_nll = self.run.mean_nll(self.forget, self.run.sequence_nll(self.forget, stage))
        predicted = scale * scale * unit
        self.report.outcome = Outcome(scale, reason, predicted, kl, forget_nll, retain_nll, tuple(trials))
        self.progress.say(
            f"forget NLL {forget_nll:.3f}, retain KL {kl:.4f} (predicted {predicted:.2g}), scale {scale:.3g}"
            + (f"; dropped: {reason}" if reason else "")
        )
        if reason:
            self.report.warnings.append(f"nothing was changed: {reason}")
        elif self.config.fit.temperature == 1 and kl > 10 * predicted > 0:
            self.report.warnings.append(
                f"the measured KL is {kl / predicted:,.0f} times the predicted one: the block-diagonal matrix misses"
                " how layers act together, or the model was too sure of itself; the change rests on the measurement"
                " alone"
            )

    def _scale(self, unit: float, measure: Callable[[float], float]) -> tuple[float, list[Trial], str]:
        """The factor of the change, the trials behind it, and why it is 0 if it is."""
        moved = self.run.ranks.sums([sum(bool(matrix.any()) for matrix in self.change.values())])[0]
        if not (math.isfinite(unit) and moved):
            return 0.0, [], "the direction is zero or not finite"
        if self.config.step_size is not None:
            kl = measure(1.0)
            finite = math.isfinite(kl)
            return float(finite), [Trial(1.0, unit, kl)], "" if finite else "the measured KL is not finite"
        target, alone = self.config.kl_budget, self._steps == 1
        assert target is not None

        def search(first: float, trials: int, limit: float) -> tuple[float, list[Trial]]:
            return search_step_size(measure, lambda x: x * x * unit, first, 0.0, target, trials, limit)

        if alone:
            scale, trials = search(math.sqrt(target / unit) if unit > 0 else 1.0, self.config.trials, math.inf)
        else:
            scale, trials = search(1.0, self.config.trials, 1.0)
            kl = trials[0].measured_kl
            # Many steps that end near the budget were told where to stop, and are not made longer.
            told = self._forgotten or self.config.pull_back
            if scale == 1 and 0 < kl < SPARE * target and not told and self.config.trials > 1:
                longer, more = search(math.sqrt(target / kl), self.config.trials - 1, math.inf)
                scale, trials = max(scale, longer), trials + more
        return scale, trials, "" if scale else f"no trial met the retain-KL budget of {target:.4g} nats a token"
