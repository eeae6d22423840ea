"""The published metrics, on logs of losses and replies."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import TRUTH_RATIOS
from ..errors import DataError, MissingLibraryError
from ..storage import read_json

Array = npt.NDArray[np.float64]

SETS = ("retain", "forget", "real_authors", "world_facts")
# Their true answers are short names: no paraphrase, and a probability among the options.
OPTIONS = ("real_authors", "world_facts")
# What locuslab/tofu calls its sets.
_FILES = {
    "eval_log.json": "retain",
    "eval_log_forget.json": "forget",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
_KEYS = {
    "gt": "avg_gt_loss",
    "paraphrased": "avg_paraphrased_loss",
    "perturbed": "average_perturb_loss",
    "rouge": "rougeL_recall",
}


def probability(gt: Array, perturbed: Array | None = None) -> Array:
    """`P(a|q)^(1/|a|) = exp(−loss)` of each answer `[Q]`.

    Args:
        gt: losses of the true answers `[Q]`.
        perturbed: losses of the wrong options `[Q, K]`: then the probability is the true answer's share in the sum
            over all options, as for real authors and world facts.
    """
    if perturbed is None:
        return np.exp(-gt)
    with np.errstate(over="ignore"):  # a share of 0
        return np.asarray(1 / (1 + np.exp(gt[:, None] - perturbed).sum(1)))


def log_truth_ratio(paraphrased: Array, perturbed: Array, mean: str = "geometric") -> Array:
    """Logarithm of the truth ratio `R = mean_k P(wrong_k|q)^(1/|wrong_k|) / P(paraphrase|q)^(1/|paraphrase|)`, `[Q]`.

    Args:
        paraphrased: losses of the paraphrased (else the true) answers `[Q]`.
        perturbed: losses of the wrong answers `[Q, K]`.
        mean: over the wrong answers: `geometric`, the mean of their losses (the benchmark's code), or `arithmetic`
            (equation 1 of the paper).

    Raises:
        ValueError: `mean` is neither.
    """
    if mean not in TRUTH_RATIOS:
        raise ValueError(f"mean is {mean!r}; it must be one of {', '.join(TRUTH_RATIOS)}")
    if mean == "geometric":
        return np.asarray(paraphrased - perturbed.mean(1))
    return np.asarray(np.logaddexp.reduce(-perturbed, axis=1) - math.log(perturbed.shape[1]) + paraphrased)


def truth_score(log_ratio: Array, *, forget: bool = False) -> float:
    """Mean over the questions of `max(0, 1 − R)`, and on the forget set of `min(R, 1/R)`; both from 0 to 1.

    1 where the truth is far likelier than the wrong answers; on the forget set, where they are equally likely.
    """
    if forget:
        return float(np.exp(-np.abs(log_ratio)).mean())
    return float(-np.expm1(np.minimum(log_ratio, 0.0)).mean())


def harmonic_mean(values: Sequence[float]) -> float:
    """0 where a value is."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def forget_quality(log_ratio: Array, retrained: Array) -> tuple[float, float]:
    """p-value and statistic of the two-sample Kolmogorov-Smirnov test of the truth ratios on the forget set.

    Taken from their logarithms, since only their order matters.

    Args:
        log_ratio: of the model `[Q]`.
        retrained: of a model that was trained without the forget set `[Q]`.

    Raises:
        MissingLibraryError: SciPy is not installed.
        ValueError: not the same number of questions.
    """
    need_library("scipy")
    from scipy.stats import ks_2samp  # type: ignore[import-untyped]

    if log_ratio.shape != retrained.shape:
        raise ValueError(
            f"the model's log has {len(log_ratio)} questions of the forget set, and the retrained model's"
            f" {len(retrained)}; both must be of the same questions"
        )
    with warnings.catch_warnings():
        # Where rounding takes its exact p beyond 1, it says so and takes the asymptotic one.
        warnings.filterwarnings("ignore", message="ks_2samp: Exact calculation", category=RuntimeWarning)
        found = ks_2samp(log_ratio, retrained)
    return float(found.pvalue), float(found.statistic)


def rouge_l_recall(answers: Sequence[str], replies: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each reply against its answer, by Google's rouge-score with Porter's stemmer.

    Raises:
        MissingLibraryError: rouge-score is not installed.
    """
    need_library("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score(a, r)["rougeL"].recall) for a, r in zip(answers, replies, strict=True)]


def need_library(library: str) -> None:
    if find_spec(library) is None:
        raise MissingLibraryError(f"the library {library} is not installed; ToFU needs `pip install 'kfade[eval]'`")


@dataclass(frozen=True)
class Log:
    """What was measured on the Q questions of one set; float64.

    Attributes:
        gt: losses of the true answers `[Q]`.
        paraphrased: losses of their paraphrases `[Q]`; of the true answers where there is none.
        perturbed: losses of the wrong answers `[Q, K]`.
        rouge: ROUGE-L recall of the greedy replies `[Q]`, or None where none were asked for.
        texts: question, reply and answer of each.
    """

    gt: Array
    paraphrased: Array
    perturbed: Array
    rouge: Array | None = None
    texts: list[list[str]] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values under the published keys."""
        values = {key: getattr(self, name) for name, key in _KEYS.items()}
        arrays = {key: value.tolist() for key, value in values.items() if value is not None}
        return {**arrays, **({"generated_text": self.texts} if self.texts else {})}


def _column(values: Mapping[str, Any], key: str, dimensions: int, where: str) -> Array:
    if key not in values:
        raise DataError(f"{where} has no {key}; a ToFU log has {', '.join(_KEYS.values())} for each set")
    rows = values[key]
    if isinstance(rows, Mapping):  # by number of the question, as locuslab/tofu writes them
        rows = [rows[number] for number in sorted(rows, key=int)]
    try:
        column = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} has {key} that is no array of numbers: {error}") from error
    if column.ndim != dimensions or not column.size:
        raise DataError(
            f"{where} has {key} of shape {list(column.shape)}; it must have {dimensions} dimensions, none 0"
        )
    if not np.isfinite(column).all():
        raise DataError(
            f"{where} has {key} with a NaN or an infinity at question {np.argwhere(~np.isfinite(column))[0][0]}"
        )
    return column


def log_from_json(values: object, where: str) -> Log:
    """One set of a log.

    Raises:
        DataError: a key is missing, or its values are no finite numbers for each question.
    """
    if not isinstance(values, Mapping):
        raise DataError(f"{where} is a {type(values).__name__}; it must be an object")
    columns = {
        name: _column(values, key, 2 if name == "perturbed" else 1, where)
        for name, key in _KEYS.items()
        if name != "rouge" or key in values
    }
    lengths = {_KEYS[name]: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where} has different numbers of questions: {lengths}")
    texts = values.get("generated_text", [])
    return Log(**columns, texts=texts if isinstance(texts, list) else [])


def read_log(path: str | Path) -> dict[str, Log]:
    """Logs by set, from a file that this module wrote, or `eval_log_aggregated.json` of locuslab/tofu.

    Raises:
        StorageError: the file cannot be read.
        DataError: it is no ToFU log.
    """
    content = read_json(Path(path))
    unknown = sorted(set(content) - set(SETS) - set(_FILES))
    if unknown or not content:
        raise DataError(f"{path} has {unknown or 'no'} sets; a ToFU log has {', '.join(SETS)}")
    return {_FILES.get(name, name): log_from_json(values, f"{path}, {name}") for name, values in content.items()}


@dataclass(frozen=True)
class SetScores:
    """Means over the questions of a set.

    Attributes:
        questions: how many.
        probability: see `probability`.
        rouge_l_recall: see `rouge_l_recall`.
        truth_ratio: see `truth_score`.
    """

    questions: int
    probability: float
    rouge_l_recall: float
    truth_ratio: float


@dataclass(frozen=True)
class Tofu:
    """The benchmark's numbers.

    Attributes:
        truth_ratio_mean: `geometric` or `arithmetic`, over the wrong answers.
        sets: scores by set.
        model_utility: harmonic mean of the three scores of retain, real authors and world facts.
        forget_quality: p-value of the Kolmogorov-Smirnov test against the retrained model, or None without one.
        ks_statistic: of that test.
        kl: mean KL(retrained ‖ model) on the true answers of `forget` and `retain`, nats a token; None without a
            retrained model (its log is not enough).
    """

    truth_ratio_mean: str
    sets: dict[str, SetScores]
    model_utility: float
    forget_quality: float | None = None
    ks_statistic: float | None = None
    kl: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def score(
    logs: Mapping[str, Log],
    retrained: Log | None = None,
    *,
    truth_ratio: str = "geometric",
    kl: dict[str, float] | None = None,
) -> Tofu:
    """All metrics of a model's logs.

    Args:
        logs: of the four sets.
        retrained: log of the forget set, of a model trained without it.
        truth_ratio: `geometric` or `arithmetic`; see `log_truth_ratio`.
        kl: as `Tofu` has it.

    Raises:
        DataError: a set, or its ROUGE, is missing.
        ValueError: `truth_ratio` is neither, or the logs of the forget set have different numbers of questions.
        MissingLibraryError: there is a retrained model's log, and SciPy is not installed.
    """
    found = {}
    for name in SETS:
        log = logs.get(name)
        if log is None:
            raise DataError(f"the log has sets {sorted(logs)}; a score needs {', '.join(SETS)}")
        if log.rouge is None:
            raise DataError(f"the log has no {_KEYS['rouge']} of {name}; a score needs it")
        found[name] = SetScores(
            len(log.gt),
            float(probability(log.gt, log.perturbed if name in OPTIONS else None).mean()),
            float(log.rouge.mean()),
            truth_score(log_truth_ratio(log.paraphrased, log.perturbed, truth_ratio), forget=name == "forget"),
        )
    used = [
        value for n, s in found.items() if n != "forget" for value in (s.probability, s.rouge_l_recall, s.truth_ratio)
    ]
    quality = statistic = None
    if retrained is not None:
        ours, theirs = (log_truth_ratio(x.paraphrased, x.perturbed, truth_ratio) for x in (logs["forget"], retrained))
        quality, statistic = forget_quality(ours, theirs)
    return Tofu(truth_ratio, found, harmonic_mean(used), quality, statistic, kl)
