"""Every option, once: a field of one of these dataclasses, with its unit and its check."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

CURVATURES = ("identity", "diagonal", "kfac", "ekfac")
FISHERS = ("sampled", "empirical")
DECOMPOSITIONS = ("eigh", "cholesky")
DAMPINGS = ("relative", "absolute")
OBJECTIVES = ("distil", "npo", "cross_entropy")
FORGET_SPLITS = ("forget01", "forget05", "forget10")
TRUTH_RATIOS = ("geometric", "arithmetic")
AUTOCASTS = ("off", "bfloat16", "float16")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}")


def _number(name: str, value: object, *, above: float | None = None, minimum: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
    if above is not None and value <= above:
        raise ValueError(f"{name} is {value}; it must be greater than {above:g}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum:g}")


def _share(name: str, value: object) -> None:
    _number(name, value, minimum=0.0)
    if value >= 1:  # type: ignore[operator]
        raise ValueError(f"{name} is {value}; it must be below 1")


@dataclass(frozen=True)
class FitConfig:
    """How the curvature of a retain set is fitted.

    Attributes:
        curvature: `identity`, `diagonal`, `kfac` or `ekfac`.
        fisher: `sampled` draws labels from the model's softmax (the Gauss-Newton matrix for
            cross-entropy); `empirical` takes the labels of the data.
        modules: `mlp`, `attention`, `all-linear`, or a regular expression searched in module names.
        samples: Monte-Carlo label samples a batch (sampled Fisher only), each one more backward pass.
        seed: of the sampled labels, which depend on it and on each sequence's own tokens only.
        layers_per_pass: at most so many layers collect at a time, each group of them with its own
            passes over the data; None collects all at once.
        device_memory: GiB that the process may take on the model's device; where `layers_per_pass` is None it is chosen
            so that the fit stays within, see `kfade.plan`. None is no limit.
        state_device: where accumulators, eigenvectors and Λ live while they are not used: `cpu` (host memory, pinned),
            or another GPU, `cuda` or `cuda:N`. Each layer's are then brought to the model's device as a batch comes to
            it, so that one pass does however many layers there are; see `kfade.placement`. None is the model's device.
            Without a group. It has never run on a GPU.
        autocast: `off`, `bfloat16` or `float16`: run the model under autocast.
        temperature: T, by which logits are divided before the softmax whose Fisher is taken. Beyond 1 it sees
            directions that a model has become sure in, where its own Fisher is nearly 0 and grows as soon as it moves.
        rank: k: of each factor keep the k largest eigenpairs, found by a sketch, and the mean of the rest; a factor of
            order k or less is kept whole. None keeps all whole. Only with `kfac` and `ekfac`.
        max_factor_order: a factor of a higher order is taken to be block-diagonal, with the fewest blocks of at most
            this order, nearly equal: of k blocks a kth of the memory and work remains, and of `eigh` a k²th. It is a
            limit and no number of blocks, since widths differ within a model, and a limit means the same for all. None
            keeps all whole. Only with `kfac` and `ekfac`, without a rank.
        decomposition: of the factors: `eigh`, or `cholesky`, which finds no eigenvectors: a solve then factorises both
            factors with their share of a factored damping, see `kfade_kernels.cholesky`. Only with `kfac`, whole.
        basis_share: one pass over the data instead of two: this share of the batches, evenly spread, gives A, S and the
            eigenvectors, and the others give Λ. None takes all for both, one pass after the other. Only with `ekfac`.
        checkpoint_seconds: a fit that has a directory saves the sums of the pass it is in after each so many seconds,
            or less often where saving would take more than 2 % of the time.
    """

    curvature: str = "ekfac"
    fisher: str = "sampled"
    modules: str = "mlp"
    samples: int = 1
    seed: int = 0
    layers_per_pass: int | None = None
    device_memory: float | None = None
    state_device: str | None = None
    autocast: str = "off"
    temperature: float = 1.0
    rank: int | None = None
    max_factor_order: int | None = None
    decomposition: str = "eigh"
    basis_share: float | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        _one_of("curvature", self.curvature, CURVATURES)
        _one_of("fisher", self.fisher, FISHERS)
        _one_of("autocast", self.autocast, AUTOCASTS)
        if not isinstance(self.modules, str) or not self.modules:
            raise ValueError(f"modules is {self.modules!r}; it must be a preset or a regular expression")
        _integer("samples", self.samples, 1)
        if self.fisher == "empirical" and self.samples != 1:
            raise ValueError(f"samples is {self.samples}; the empirical Fisher has no labels to sample: it must be 1")
        _integer("seed", self.seed, 0)
        if self.layers_per_pass is not None:
            _integer("layers_per_pass", self.layers_per_pass, 1)
        if self.device_memory is not None:
            _number("device_memory", self.device_memory, above=0.0)
        if self.state_device is not None:
            if not isinstance(self.state_device, str):
                raise TypeError(f"state_device is {self.state_device!r}; it must be the name of a device, or None")
            if not re.fullmatch(r"cpu|cuda(:\d+)?", self.state_device):
                raise ValueError(f"state_device is {self.state_device!r}; it must be cpu, cuda or cuda:N")
        _number("temperature", self.temperature, above=0.0)
        if self.rank is not None:
            _integer("rank", self.rank, 1)
            if self.curvature not in ("kfac", "ekfac"):
                raise ValueError(f"rank is {self.rank}; {self.curvature} has no factors: it must be None")
        if self.max_factor_order is not None:
            _integer("max_factor_order", self.max_factor_order, 2)
            if self.curvature not in ("kfac", "ekfac"):
                raise ValueError(
                    f"max_factor_order is {self.max_factor_order}; {self.curvature} has no factors: it must be None"
                )
            if self.rank is not None:
                raise ValueError(
                    f"rank is {self.rank} and max_factor_order is {self.max_factor_order}; at most one must be given"
                )
        _one_of("decomposition", self.decomposition, DECOMPOSITIONS)
        if self.decomposition == "cholesky" and (self.curvature != "kfac" or self.rank is not None):
            raise ValueError(
                f"decomposition is 'cholesky', curvature is {self.curvature!r} and rank is {self.rank}; without"
                " eigenvectors they must be 'kfac' and None"
            )
        if self.basis_share is not None:
            _number("basis_share", self.basis_share, above=0.0)
            _share("basis_share", self.basis_share)
            if self.curvature != "ekfac":
                raise ValueError(
                    f"basis_share is {self.basis_share}; {self.curvature} takes one pass anyway: it must be None"
                )
        _number("checkpoint_seconds", self.checkpoint_seconds, minimum=0.0)


@dataclass(frozen=True)
class UnlearnConfig:
    """How a forget set is unlearned: by default towards outputs that do not know, in as many steps as it asks for.

    Attributes:
        fit: how the retain curvature is fitted: with K-FAC, from softened outputs.
        tokens_per_dimension: the curvature is fitted on batches with about so many tokens for each dimension of the
            largest factor, every so many of them; None takes the whole retain set, less `holdout`.
        damping: λ of the solve.
        damping_kind: `relative` multiplies `damping` by the mean eigenvalue of each layer;
            `absolute` takes it as it is, in the unit of Λ.
        objective: what a step descends on the forget set. `cross_entropy` (the paper's, which has no bound) and
            `npo` ascend the loss; `npo` weights each sequence by how much of it is still remembered. `distil` is the
            KL from a target that does not know: the original model's outputs with the logit of each label lowered,
            and flattened.
        margin: by how much `distil` lowers the logit of a label, in nats.
        target_temperature: what `distil` divides the target's logits by. None takes 1 + P⁴, P the geometric mean of
            the probabilities that the original model gives the labels: of what it has memorised it is too sure (2),
            of what it knows a little it is not (1).
        pull_back: whether `distil` raises a label again that steps have left below its target. None does where the
            sequences of the forget set have more than 8 labelled tokens on average: in an answer that long most words
            are what any model would write, and steps away from it take them along; a shorter one is all that is to go.
        npo_beta: inverse temperature of `npo`.
        steps: number of steps. None takes one where a step takes the whole forget set and nothing is pulled back, else
            80, but at most ten passes over it and at least two. Many steps of `distil` end before, where nothing is
            left: a pass over the forget set finds a hundredth of the loss that the first one found, and the last
            retain batches are within the budget. Labels that are pulled back leave more.
        tokens_per_step: a step takes so many forget batches as have about so many labelled tokens together, and so
            many retain batches; at least one of each. None takes all of both.
        kl_budget: retain KL that the update may reach, in nats a token on held-out retain sequences. None when
            `step_size` is given.
        step_share: what the first of several steps is measured to cost, as a share of the budget. Later ones have its
            predicted KL, but ten times its η at most, by a quarter more from step to step; both shrink to nothing
            linearly, and are shorter where the KL on the way is more than four times the budget. A single step has the
            length that the measured KL allows.
        step_size: η of every step, instead of a budget.
        retain_weight: c, the weight of the gradient of the retain KL in the first steps; 0 leaves it out. Later it
            follows the measured KL where there is a budget: at each step it is multiplied by the share of the budget
            that is spent, by ½ at least and 4 at most, or in a run of more than 16 steps by a root of that.
        cg_iterations: solve by so many conjugate-gradient iterations on the exact Gauss-Newton matrix of the step's
            retain batches, preconditioned by the fitted curvature; 0 takes the fitted one's own solution. Each costs
            about six forward passes over these batches.
        refit_every: refit the curvature every so many steps; 0 never.
        holdout: share of the retain sequences kept out of the fit and of the steps, on which KL is measured.
        trials: at most so many measurements of KL, for the scale of the update, and for the length of the first step.
    """

    fit: FitConfig = field(default_factory=lambda: FitConfig(curvature="kfac", temperature=3.0))
    tokens_per_dimension: float | None = 40.0
    damping: float = 0.01
    damping_kind: str = "relative"
    objective: str = "distil"
    margin: float = 5.0
    target_temperature: float | None = None
    pull_back: bool | None = None
    npo_beta: float = 0.1
    steps: int | None = None
    tokens_per_step: int | None = 256
    kl_budget: float | None = 0.02
    step_share: float = 0.1
    step_size: float | None = None
    retain_weight: float = 10.0
    cg_iterations: int = 0
    refit_every: int = 0
    holdout: float = 0.2
    trials: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.fit, FitConfig):
            raise TypeError(f"fit is a {type(self.fit).__name__}; it must be a FitConfig")
        if self.tokens_per_dimension is not None:
            _number("tokens_per_dimension", self.tokens_per_dimension, above=0.0)
        _one_of("damping_kind", self.damping_kind, DAMPINGS)
        _one_of("objective", self.objective, OBJECTIVES)
        _number("damping", self.damping, minimum=0.0)
        _number("margin", self.margin, minimum=0.0)
        if self.target_temperature is not None:
            _number("target_temperature", self.target_temperature, above=0.0)
        if self.steps is not None:
            _integer("steps", self.steps, 1)
        if self.tokens_per_step is not None:
            _integer("tokens_per_step", self.tokens_per_step, 1)
        if (self.kl_budget is None) == (self.step_size is None):
            raise ValueError(
                f"kl_budget is {self.kl_budget} and step_size is {self.step_size}; exactly one must be given"
            )
        if self.kl_budget is not None:
            _number("kl_budget", self.kl_budget, above=0.0)
        _number("step_share", self.step_share, above=0.0)
        if self.step_size is not None:
            _number("step_size", self.step_size, above=0.0)
        _number("npo_beta", self.npo_beta, above=0.0)
        _number("retain_weight", self.retain_weight, minimum=0.0)
        _integer("cg_iterations", self.cg_iterations, 0)
        _integer("refit_every", self.refit_every, 0)
        _number("holdout", self.holdout, above=0.0)
        if self.holdout >= 1:
            raise ValueError(f"holdout is {self.holdout}; it must be a share below 1")
        _integer("trials", self.trials, 1)

    @classmethod
    def published(cls, **changes: Any) -> UnlearnConfig:
        """One uphill step on the whole forget set, in the metric of EK-FAC (McKinney et al. 2026, arXiv 2602.10568).

        Args:
            changes: fields to set otherwise.
        """
        return cls(**{"fit": FitConfig(**PUBLISHED_FIT), **PUBLISHED, **changes})

    def batches_in_step(self, tokens: Sequence[int]) -> int:
        """How many batches a step takes from a set of them, given the labelled tokens of each."""
        if self.tokens_per_step is None:
            return len(tokens)
        return min(len(tokens), math.ceil(self.tokens_per_step * len(tokens) / max(1, sum(tokens))))

    def steps_over(self, tokens: Sequence[int], sequences: int) -> int:
        """The number of steps on a forget set of so many sequences, given the labelled tokens of each batch."""
        if self.steps is not None:
            return self.steps
        if self.batches_in_step(tokens) == len(tokens) and not self.pulls_back(tokens, sequences):
            return 1
        few, many = (self.steps_in(passes, tokens) for passes in PASSES)
        return min(max(STEPS, few), many)

    def steps_in(self, passes: float, tokens: Sequence[int]) -> int:
        """The number of steps that go so many times through such a forget set; at least 1."""
        return max(1, math.ceil(passes * len(tokens) / self.batches_in_step(tokens)))

    def pulls_back(self, tokens: Sequence[int], sequences: int) -> bool:
        """Whether steps pull labels back to a target, of a forget set as `steps_over` takes it."""
        if self.objective != "distil":
            return False
        return sum(tokens) > SHORT * sequences if self.pull_back is None else self.pull_back


# Where the number of steps is not given: so many, but between so many passes over the forget set.
STEPS, PASSES = 80, (2, 10)
# Labelled tokens a sequence, of forget sets whose labels are left alone once they are below their target.
SHORT = 8
# What `UnlearnConfig.published` sets, of itself and of its fit.
PUBLISHED: dict[str, Any] = {
    "objective": "cross_entropy",
    "steps": 1,
    "tokens_per_step": None,
    "retain_weight": 0.0,
    "damping": 0.1,
}
PUBLISHED_FIT: dict[str, Any] = {"curvature": "ekfac", "temperature": 1.0}


@dataclass(frozen=True)
class ReapplyConfig:
    """How far a stored update is added again; see `kfade.reapply`.

    Attributes:
        kl_budget: greatest mean KL, in nats a token on the retain batches, from the model as it is before.
        scale: factor of the update that is tried first.
        trials: at most so many measurements of KL.
    """

    kl_budget: float = 0.02
    scale: float = 1.0
    trials: int = 8

    def __post_init__(self) -> None:
        _number("kl_budget", self.kl_budget, above=0.0)
        _number("scale", self.scale, above=0.0)
        _integer("trials", self.trials, 1)


@dataclass(frozen=True)
class InfluenceConfig:
    """How influence is computed from a fitted curvature.

    Attributes:
        damping: λ of the solve.
        damping_kind: `relative` multiplies `damping` by the mean eigenvalue of each layer;
            `absolute` takes it as it is, in the unit of Λ.
        solved_bytes: solved query gradients kept at once, in bytes. Each takes as much as the tracked weights (less
            with `query_rank`), at least one is kept, and every further group of them costs one more pass over the
            training set.
        query_rank: k: of each solved query gradient `[d_out, d_in]` keep the nearest matrix of rank k, as
            `k·(d_out + d_in)` numbers. A layer where those are no fewer than `d_out·d_in` keeps it whole. None keeps
            all whole.
    """

    damping: float = 0.1
    damping_kind: str = "relative"
    solved_bytes: int = 1 << 30
    query_rank: int | None = None

    def __post_init__(self) -> None:
        _number("damping", self.damping, minimum=0.0)
        _one_of("damping_kind", self.damping_kind, DAMPINGS)
        _integer("solved_bytes", self.solved_bytes, 1)
        if self.query_rank is not None:
            _integer("query_rank", self.query_rank, 1)


@dataclass(frozen=True)
class CompareConfig:
    """How unlearning methods are compared; see `kfade.compare`.

    Attributes:
        methods: names in `kfade.compare.NAMES`.
        budgets: retain KL at which methods are compared, in nats a token, measured on retain data that no method sees.
        seeds: how many, from 0.
        epochs: passes over the forget set that a method may take.
        learning_rates: those that every baseline tries. K-FADE tries as many budgets of its own.
        seconds: of unlearning that a run may take; None for no limit but the epochs.
        holdout: share of the retain records that no method sees.
    """

    methods: tuple[str, ...] = (
        "kfade", "kfade_published", "gradient_ascent", "gradient_difference", "npo", "simnpo", "undial", "undial_kl",
        "wga", "rmu", "task_vector",
    )  # fmt: skip
    budgets: tuple[float, ...] = (0.01, 0.03, 0.1)
    seeds: int = 3
    epochs: float = 5
    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    seconds: float | None = None
    holdout: float = 0.2

    def __post_init__(self) -> None:
        for name, what in (("methods", "names"), ("budgets", "numbers"), ("learning_rates", "numbers")):
            values = getattr(self, name)
            if not isinstance(values, tuple):
                raise TypeError(f"{name} is {values!r}; it must be a tuple of {what}")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {values!r}; it must have at least one, and none twice")
        for name in ("budgets", "learning_rates"):
            for value in getattr(self, name):
                _number(name, value, above=0.0)
        _integer("seeds", self.seeds, 1)
        _number("epochs", self.epochs, above=0.0)
        if self.seconds is not None:
            _number("seconds", self.seconds, above=0.0)
        _number("holdout", self.holdout, above=0.0)
        _share("holdout", self.holdout)


@dataclass(frozen=True)
class TofuConfig:
    """How a model is evaluated on ToFU; see `kfade.tofu`.

    Attributes:
        forget_split: `forget01`, `forget05` or `forget10`.
        truth_ratio: mean over the wrong answers in the truth ratio: `geometric` (the benchmark's code, and all
            published numbers), or `arithmetic` (the paper's formula).
        limit: at most so many questions a set, the first ones; the published logs have 300. None takes all.
        template: the text of a question and its answer, with `{question}` in it and `{answer}` at its end; None
            renders with the chat template where there is one, else as two lines, `Question: {question}` and
            `Answer: {answer}`.
        chat: whether to render with the chat template; None where there is one, and no `template`.
        batch_size: sequences a batch.
        max_tokens: tokens of a question with its answer; the rest of the answer is cut.
        max_new_tokens: tokens of a greedy reply.
    """

    forget_split: str = "forget10"
    truth_ratio: str = "geometric"
    limit: int | None = 300
    template: str | None = None
    chat: bool | None = None
    batch_size: int = 8
    max_tokens: int = 512
    max_new_tokens: int = 200

    def __post_init__(self) -> None:
        _one_of("forget_split", self.forget_split, FORGET_SPLITS)
        _one_of("truth_ratio", self.truth_ratio, TRUTH_RATIOS)
        if self.limit is not None:
            _integer("limit", self.limit, 1)
        if self.template is not None:
            if not isinstance(self.template, str):
                raise TypeError(f"template is {self.template!r}; it must be a string")
            parts = [self.template.count(name) for name in ("{question}", "{answer}")]
            if parts != [1, 1] or not self.template.endswith("{answer}"):
                raise ValueError(f"template is {self.template!r}; it must have {{question}} once and end in {{answer}}")
            if self.chat:
                raise ValueError("chat is True and there is a template; at most one of them must be given")
        _integer("batch_size", self.batch_size, 1)
        _integer("max_tokens", self.max_tokens, 2)
        _integer("max_new_tokens", self.max_new_tokens, 1)


@dataclass(frozen=True)
class LmEvalConfig:
    """How a model is evaluated by lm-eval; see `kfade.harness`.

    Attributes:
        tasks: names of tasks, groups or tags of lm-eval.
        num_fewshot: examples before each question, in tasks whose definition does not fix it to 0; None takes the
            definition's number, 0 where it has none.
        limit: at most so many questions a task and records of text, the first ones; None takes all.
        batch_size: sequences a batch.
        max_tokens: tokens of a record of text; the rest is cut.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, tuple) or not all(isinstance(name, str) for name in self.tasks):
            raise TypeError(f"tasks is {self.tasks!r}; it must be a tuple of names")
        if not self.tasks or not all(self.tasks):
            raise ValueError(f"tasks is {self.tasks!r}; it must have at least one name, and none empty")
        if self.num_fewshot is not None:
            _integer("num_fewshot", self.num_fewshot, 0)
        if self.limit is not None:
            _integer("limit", self.limit, 1)
        _integer("batch_size", self.batch_size, 1)
        _integer("max_tokens", self.max_tokens, 2)


@dataclass(frozen=True)
class KFACConfig:
    """How `kfade.optim.KFAC` trains a model.

    Attributes:
        lr: step length of the tracked layers, on the preconditioned gradient.
        momentum: of the preconditioned gradient, from 0 to below 1.
        weight_decay: decoupled, as AdamW's, in units of 1 / (lr · steps), for parameters of two dimensions and more.
        damping: λ of the solve.
        damping_kind: `relative` multiplies `damping` by the mean eigenvalue of each layer; `absolute` takes it as
            it is, in the unit of Λ.
        kl_clip: at most so much `lr² Σ g̃ᵀ g` over the tracked layers, about twice the KL, in nats a token, by which
            one step without momentum moves the predictions; None does not clip.
        factor_every: steps between two batches that are added to the factors; the first step adds one.
        refresh_every: steps between two eigendecompositions; the first step makes one.
        decay: factor on what the factors hold, at each batch that is added; 1 forgets nothing.
        fit: how the factors are collected; its `modules` are the tracked layers, its `curvature` must be `kfac`.
        adam_lr: learning rate of Adam, for the parameters that are not tracked.
        adam_betas: decay of its two averages a step, from 0 to below 1.
        adam_eps: added to the root of its second average, in the unit of the gradient.
    """

    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0
    damping: float = 100.0
    damping_kind: str = "relative"
    kl_clip: float | None = 0.001
    factor_every: int = 10
    refresh_every: int = 10
    decay: float = 0.95
    fit: FitConfig = field(default_factory=lambda: FitConfig(curvature="kfac", modules="all-linear"))
    adam_lr: float = 0.001
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "damping", "adam_lr", "adam_eps"):
            _number(name, getattr(self, name), minimum=0.0)
        _share("momentum", self.momentum)
        _one_of("damping_kind", self.damping_kind, DAMPINGS)
        if self.kl_clip is not None:
            _number("kl_clip", self.kl_clip, above=0.0)
        _integer("factor_every", self.factor_every, 1)
        _integer("refresh_every", self.refresh_every, 1)
        _number("decay", self.decay, above=0.0)
        if self.decay > 1:
            raise ValueError(f"decay is {self.decay}; it must be at most 1")
        if not isinstance(self.fit, FitConfig):
            raise TypeError(f"fit is a {type(self.fit).__name__}; it must be a FitConfig")
        if self.fit.curvature != "kfac":
            raise ValueError(f"fit.curvature is {self.fit.curvature!r}; it must be 'kfac'")
        if self.fit.decomposition != "eigh":
            raise ValueError(f"fit.decomposition is {self.fit.decomposition!r}; it must be 'eigh'")
        if not isinstance(self.adam_betas, (tuple, list)) or len(self.adam_betas) != 2:
            raise TypeError(f"adam_betas is {self.adam_betas!r}; it must be a pair of numbers")
        for i, beta in enumerate(self.adam_betas):
            _share(f"adam_betas[{i}]", beta)


def to_dict(config: FitConfig | UnlearnConfig | InfluenceConfig) -> dict[str, Any]:
    """The fields as plain JSON/YAML values, nested."""
    return asdict(config)


def _known(kind: type, values: Mapping[str, Any], where: str) -> None:
    names = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"{where} has unknown options {unknown}; it may have {sorted(names)}")


def fit_config(values: Mapping[str, Any], where: str = "config") -> FitConfig:
    """A FitConfig from plain values, refusing what it does not know."""
    _known(FitConfig, values, where)
    return FitConfig(**values)


def unlearn_config(values: Mapping[str, Any], where: str = "config") -> UnlearnConfig:
    """An UnlearnConfig from plain values (`fit` nested), refusing what it does not know."""
    _known(UnlearnConfig, values, where)
    known = dict(values)
    if "fit" in known and not isinstance(known["fit"], FitConfig):
        known["fit"] = fit_config(known["fit"], f"{where}.fit")
    return UnlearnConfig(**known)
