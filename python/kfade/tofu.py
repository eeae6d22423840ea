"""ToFU, the Task of Fictitious Unlearning: its published metrics, for a model or for recorded logs.

Maini et al. 2024 (arXiv 2401.06121). Definitions follow the code that the published numbers come from
(github.com/locuslab/tofu, github.com/locuslab/open-unlearning); where that and the paper differ, the option is named.
All losses are token means in nats, the marker that ends an answer counted as one of its tokens.

Four sets of questions: `retain` and `forget` (with a paraphrase of each answer, and five wrong ones in its form), and
`real_authors` and `world_facts` (with three wrong options). A log holds the losses and the ROUGE of each question;
everything else is arithmetic on logs.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from . import data, models
from .config import TRUTH_RATIOS, TofuConfig
from .data import Record, batches_by_length, pad_id, read_records, uses_chat
from .errors import DataError, MissingLibraryError
from .evaluate import References, end_and_pad, greedy_continuations, references, scores, sequence_losses
from .loss import IGNORE_INDEX
from .models import weights_sha256
from .progress import Progress
from .storage import KeptResults, read_json, write_text
from .update import Update

Array = npt.NDArray[np.float64]

HUB = "locuslab/TOFU"
SETS = ("retain", "forget", "real_authors", "world_facts")
# Their true answers are short names: no paraphrase, and a probability among the options.
OPTIONS = ("real_authors", "world_facts")
TEMPLATE = "Question: {question}\nAnswer: {answer}"
LOG, RETRAINED_LOG, RESULT = "tofu_log.json", "tofu_retrained_log.json", "tofu.json"
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


# ---- the metrics, on arrays over the questions of a set


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
    _need("scipy")
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
    _need("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score(a, r)["rougeL"].recall) for a, r in zip(answers, replies, strict=True)]


def _need(library: str) -> None:
    if find_spec(library) is None:
        raise MissingLibraryError(f"the library {library} is not installed; ToFU needs `pip install 'kfade[eval]'`")


# ---- logs


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


# ---- scores of logs


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


# ---- the questions


@dataclass(frozen=True)
class Question:
    """One question of a set; `paraphrased` is None where the set has no paraphrases."""

    question: str
    answer: str
    paraphrased: str | None
    wrong: tuple[str, ...]


def _question(record: Record, paraphrased: bool, where: str) -> Question:
    def texts(name: str, values: object) -> tuple[str, ...]:
        several = values if isinstance(values, (list, tuple)) else [values]
        if not several or not all(isinstance(text, str) and text.strip() for text in several):
            raise DataError(f"{where}: {name} is {values!r}; it must be text")
        return tuple(several)

    other = texts("paraphrased_answer", record.fields.get("paraphrased_answer"))[0] if paraphrased else None
    return Question(
        record.prompt, record.response, other, texts("perturbed_answer", record.fields.get("perturbed_answer"))
    )


def read_questions(source: str | Path = HUB, config: TofuConfig | None = None) -> dict[str, list[Question]]:
    """The questions of the four sets.

    Args:
        source: a directory with the published files (`retain_perturbed.jsonl` and so on, or `.json`), or the name of
            the data set on the Hugging Face hub.
        config: which forget split, and how many questions.

    Raises:
        DataError: a file or data set is missing, empty, or no ToFU set.
    """
    config = config or TofuConfig()
    found = {}
    for name in SETS:
        split = f"{config.forget_split if name == 'forget' else name}_perturbed"
        place: str | Path = f"{source}:{split}"
        if Path(source).is_dir():
            place = Path(source) / f"{split}.jsonl"
            place = place if place.exists() else next((p for p in (place.with_suffix(".json"),) if p.exists()), place)
        rows = read_records(place)[: config.limit]
        found[name] = [_question(r, name not in OPTIONS, f"{place}, question {n}") for n, r in enumerate(rows, 1)]
        if len({len(q.wrong) for q in found[name]}) > 1:
            raise DataError(
                f"{place}: the questions have different numbers of wrong answers; they must have one number"
            )
    return found


@dataclass(frozen=True)
class Inputs:
    """The questions of a set in tokens.

    Attributes:
        prompts: ids of each question, to be answered.
        answers: ids and labels of all true answers, then of all paraphrases if there are any, then of the wrong ones.
        sha256: of both.
    """

    prompts: list[list[int]] = field(repr=False)
    answers: list[tuple[list[int], list[int]]] = field(repr=False)
    sha256: str


class _Encoder:
    """Renders questions for one model."""

    def __init__(self, model: Any, tokenizer: Any, config: TofuConfig) -> None:
        self._tokenizer, self._most = tokenizer, config.max_tokens
        self._chat = uses_chat(tokenizer, config.chat) if config.template is None else False
        self._before = (config.template or TEMPLATE).removesuffix("{answer}")
        end = end_and_pad(model, tokenizer)[0]
        own = getattr(tokenizer, "eos_token_id", None)
        self._end = (own if own in end else end[0]) if isinstance(end, list) else end

    def __call__(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids and labels; the labels of the question are -100.

        In plain form both are tokenized together, as the benchmark does. Blanks that end what is before the answer are
        left to the answer's first token: alone they would be one that no training text has there.
        """
        if self._chat:
            record = Record(question, answer, answer, (), {})
            ids, labels = data.encode(self._tokenizer, record, chat=True, max_tokens=self._most)
        else:
            before = self._before.replace("{question}", question)
            front = list(self._tokenizer(before.rstrip(" "))["input_ids"])
            if len(front) > 1 and front[-1] == self._end:
                front.pop()
            ids = list(self._tokenizer(before + answer)["input_ids"])
            if self._end is not None and ids[-1] != self._end:
                ids.append(self._end)
            ids = ids[: self._most]
            labels = [IGNORE_INDEX] * len(front[: len(ids)]) + ids[len(front) :]
        if labels[-1] == IGNORE_INDEX:
            raise ValueError(f"max_tokens is {self._most}; it leaves no token of the answer {answer!r} to {question!r}")
        return ids, labels


def encode(
    model: Any, tokenizer: Any, questions: Mapping[str, Sequence[Question]], config: TofuConfig
) -> dict[str, Inputs]:
    """The sets in tokens of this model.

    Raises:
        ValueError: a question leaves no room for its answer in `max_tokens`, or the model has too few positions.
    """
    encoder = _Encoder(model, tokenizer, config)
    found = {}
    for name, items in questions.items():
        pairs = [(q.question, q.answer) for q in items]
        pairs += [(q.question, q.paraphrased) for q in items if q.paraphrased is not None]
        pairs += [(q.question, wrong) for q in items for wrong in q.wrong]
        answers = [encoder(*pair) for pair in pairs]
        prompts = [ids[: labels.count(IGNORE_INDEX)] for ids, labels in answers[: len(items)]]
        digest = hashlib.sha256(json.dumps([prompts, answers]).encode()).hexdigest()
        found[name] = Inputs(prompts, answers, digest)
    room = getattr(model.config, "max_position_embeddings", None)
    if isinstance(room, int):
        longest = max(len(ids) for inputs in found.values() for ids, _ in inputs.answers)
        prompt = max(len(ids) for inputs in found.values() for ids in inputs.prompts)
        if longest > room:
            raise ValueError(
                f"max_tokens is {config.max_tokens}; the model has {room} positions, and a sequence {longest}"
            )
        if prompt + config.max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens is {config.max_new_tokens}; it must be at most {room - prompt}: the model has {room}"
                f" positions, and a question takes {prompt}"
            )
    return found


# ---- a model on the questions


def measure(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    inputs: Inputs,
    config: TofuConfig,
    *,
    name: str = "",
    replies: bool = True,
    progress: Progress | None = None,
) -> Log:
    """The log of one set.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        questions: of the set.
        inputs: the same in its tokens.
        config: batch size and length of replies.
        name: of the set, for the progress.
        replies: whether to ask for replies, which takes most of the time.
        progress: where stages are shown and their cost is recorded.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    progress = progress or Progress()
    batches, order = batches_by_length(inputs.answers, config.batch_size, pad_id(tokenizer))
    losses = np.empty(len(order))
    with progress.stage(f"{name}: losses", len(order), "answer") as stage:
        losses[order] = sequence_losses(model, batches, advance=stage.advance).numpy()
    number, wrong = len(questions), len(questions[0].wrong)
    gt, rest = losses[:number], losses[number:]
    paraphrased = gt if questions[0].paraphrased is None else rest[:number]
    log = Log(gt, paraphrased, losses[-number * wrong :].reshape(number, wrong))
    if not replies:
        return log
    with progress.stage(f"{name}: replies", number, "question") as stage:
        texts = greedy_continuations(
            model,
            tokenizer,
            inputs.prompts,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            advance=stage.advance,
        )
    rouge = np.array(rouge_l_recall([q.answer for q in questions], texts))
    return Log(
        gt,
        paraphrased,
        log.perturbed,
        rouge,
        [[q.question, t, q.answer] for q, t in zip(questions, texts, strict=True)],
    )


def _measure_all(
    model: Any,
    tokenizer: Any,
    questions: Mapping[str, Sequence[Question]],
    inputs: Mapping[str, Inputs],
    config: TofuConfig,
    path: Path | None,
    progress: Progress,
    prefix: str = "",
    replies: bool = True,
) -> dict[str, Log]:
    weights = weights_sha256(model) if path is not None else ""
    length = config.max_new_tokens if replies else 0
    store = KeptResults(
        path,
        {name: {"weights": weights, "inputs": inputs[name].sha256, "max_new_tokens": length} for name in questions},
    )
    found = {}
    for name, items in questions.items():
        kept = store.get(name)
        if kept is not None:
            log = log_from_json(kept, f"{path}, {name}")
        else:
            log = measure(
                model, tokenizer, items, inputs[name], config, name=prefix + name, replies=replies, progress=progress
            )
            store.put(name, log.to_json())
        found[name] = log
    return found


def _true_answers(inputs: Inputs, tokenizer: Any, config: TofuConfig) -> list[dict[str, torch.Tensor]]:
    return batches_by_length(inputs.answers[: len(inputs.prompts)], config.batch_size, pad_id(tokenizer))[0]


@dataclass(frozen=True)
class Retrained:
    """What is kept of a model that was trained without the forget set.

    Attributes:
        log: of the forget set.
        outputs: on the true answers of `forget` and `retain`, to measure KL from; empty for a log alone.
        inputs: SHA-256 of the tokens of these.
    """

    log: Log
    outputs: dict[str, References] = field(default_factory=dict, repr=False)
    inputs: dict[str, str] = field(default_factory=dict)


def measure_retrained(
    model: Any,
    tokenizer: Any,
    questions: Mapping[str, Sequence[Question]],
    config: TofuConfig | None = None,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Retrained:
    """Log and outputs of the retrained model; arguments as `evaluate`."""
    config, progress = config or TofuConfig(), progress or Progress()
    inputs = encode(model, tokenizer, questions, config)
    path = None if out is None else out / RETRAINED_LOG
    forget = {"forget": questions["forget"]}
    logs = _measure_all(model, tokenizer, forget, inputs, config, path, progress, "retrained, ", replies=False)
    outputs = {}
    for name in ("forget", "retain"):
        with progress.stage(f"retrained, {name}: outputs"):
            outputs[name] = references(model, _true_answers(inputs[name], tokenizer, config))
    return Retrained(logs["forget"], outputs, {name: inputs[name].sha256 for name in outputs})


def evaluate(
    model: Any,
    tokenizer: Any,
    questions: Mapping[str, Sequence[Question]],
    config: TofuConfig | None = None,
    *,
    retrained: Retrained | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Tofu:
    """All metrics of a model.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        questions: of the four sets, as `read_questions` gives them.
        config: how.
        retrained: as `measure_retrained` gives it, for forget quality and KL.
        out: directory for the log; a set that its log has already, of the same weights and tokens, is not measured
            again.
        progress: where stages are shown and their cost is recorded.

    Raises:
        MissingLibraryError: rouge-score, or with `retrained` SciPy, is not installed.
        ValueError: see `encode`; or the retrained model was given other tokens.
        NonFiniteError: a loss is not finite.
    """
    config, progress = config or TofuConfig(), progress or Progress()
    _need("rouge_score")
    inputs = encode(model, tokenizer, questions, config)
    full = sum(len(ids) == config.max_tokens for x in inputs.values() for ids, _ in x.answers)
    if full:
        progress.say(f"note: {full} answers reach max_tokens ({config.max_tokens}), and may be cut there")
    if retrained is not None:
        _need("scipy")
        differ = [name for name, digest in retrained.inputs.items() if inputs[name].sha256 != digest]
        if differ:
            raise ValueError(
                f"the retrained model has other tokens for {' and '.join(differ)}; it must have the model's tokenizer"
                " and be given the same questions and template"
            )
    kl = {}
    for name, outputs in (retrained.outputs if retrained is not None else {}).items():
        with progress.stage(f"{name}: KL"):
            found = scores(model, _true_answers(inputs[name], tokenizer, config), outputs).kl
        assert found is not None
        kl[name] = found
    logs = _measure_all(model, tokenizer, questions, inputs, config, None if out is None else out / LOG, progress)
    return score(logs, retrained.log if retrained else None, truth_ratio=config.truth_ratio, kl=kl or None)


# ---- from names to numbers


def _is_log(source: str) -> bool:
    return Path(source).suffix == ".json"


def run(
    model: str,
    source: str = HUB,
    config: TofuConfig | None = None,
    *,
    retrained: str | None = None,
    update: str | Path | None = None,
    scale: float = 1.0,
    dtype: str = "float32",
    device: str = "cpu",
    out: Path | None = None,
    progress: Progress | None = None,
) -> Tofu:
    """All metrics of a model on disk or on the hub, or of a log.

    Args:
        model: a model as `models.load_model` takes it, or a log (`.json`), of which nothing is measured.
        source: of the questions, as `read_questions`.
        config: how.
        retrained: a model trained without the forget set, or its log (`.json`); of a log there is no KL.
        update: to apply to the model before.
        scale: of the update.
        dtype, device: of both models.
        out: directory for logs, by which an interrupted run goes on, and for the result (`tofu.json`).
        progress: where stages are shown and their cost is recorded.

    Raises:
        DataError, StorageError: a log, the questions or the update cannot be read.
        ValueError: see `evaluate`; no such model; an update for a log, or a retrained model beside one.
        MissingLibraryError: see `evaluate`.
    """
    config, progress = config or TofuConfig(), progress or Progress()
    if retrained is not None:
        _need("scipy")
    known = None
    if retrained is not None and _is_log(retrained):
        logs = read_log(retrained)
        if "forget" not in logs:
            raise DataError(f"{retrained} has no log of the forget set; forget quality needs it")
        known = Retrained(logs["forget"])
    if _is_log(model):
        if update is not None:
            raise ValueError(f"the model is a log, {model}; an update must have a model to be applied to")
        if retrained is not None and known is None:
            raise ValueError(f"the model is a log, {model}; the retrained model must be a log too, not {retrained}")
        result = score(read_log(model), known.log if known else None, truth_ratio=config.truth_ratio)
    else:
        _need("rouge_score")
        changes = None if update is None else Update.load(update)
        for name in (model, retrained):
            if name is not None and not _is_log(name):
                models.check_model(name, dtype, device)
        questions = read_questions(source, config)
        if retrained is not None and known is None:
            with progress.stage("load the retrained model"):
                loaded, tokenizer = models.load_model(retrained, dtype, device)
            known = measure_retrained(loaded, tokenizer, questions, config, out=out, progress=progress)
            del loaded  # before the next one is loaded: two need not fit in memory
            gc.collect()
        with progress.stage("load the model"):
            loaded, tokenizer = models.load_model(model, dtype, device)
        if changes is not None:
            changes.apply_(loaded, scale)
        result = evaluate(loaded, tokenizer, questions, config, retrained=known, out=out, progress=progress)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / RESULT, json.dumps(result.to_json(), allow_nan=False, indent=1) + "\n")
    return result
