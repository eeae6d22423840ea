"""A model's log on the questions, and its scores, beside those of a retrained one."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import models
from ..config import TofuConfig
from ..data import batches_by_length, pad_id
from ..errors import DataError
from ..evaluate import References, greedy_continuations, references, scores, sequence_losses
from ..models import weights_sha256
from ..progress import Progress
from ..storage import KeptResults, write_text
from ..update import Update
from .questions import HUB, Inputs, Question, encode, read_questions
from .scores import Log, Tofu, log_from_json, need_library, read_log, rouge_l_recall, score

LOG, RETRAINED_LOG, RESULT = "tofu_log.json", "tofu_retrained_log.json", "tofu.json"


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
    need_library("rouge_score")
    inputs = encode(model, tokenizer, questions, config)
    full = sum(len(ids) == config.max_tokens for x in inputs.values() for ids, _ in x.answers)
    if full:
        progress.say(f"note: {full} answers reach max_tokens ({config.max_tokens}), and may be cut there")
    if retrained is not None:
        need_library("scipy")
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
        need_library("scipy")
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
        need_library("rouge_score")
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
