"""WMDP, MMLU and every other task of lm-eval, with the harness and the task definitions that lm-eval ships.

Li et al. 2024 (arXiv 2403.03218) and Hendrycks et al. 2021 (arXiv 2009.03300), as
github.com/EleutherAI/lm-evaluation-harness asks and scores them: its code makes the prompts, runs the model that is
in memory and takes the means. Added here: data from a directory instead of the hub, checks before the model runs,
results that an interrupted run finds again, and the KL to the original model on general text beside them.
"""

from __future__ import annotations

import difflib
import functools
import gc
import hashlib
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from . import models
from .capture import deterministic_mode
from .config import LmEvalConfig
from .data import Record, make_batches, read_records
from .errors import DataError, MissingLibraryError, NonFiniteError
from .evaluate import Evaluation, References, references, scores
from .models import weights_sha256
from .progress import Progress, Stage
from .storage import KeptResults, write_text
from .update import Update

LOG, RESULT = "lm_eval_log.json", "lm_eval.json"
_SEED = 1234  # the harness's own for drawn examples
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class TaskScore:
    """What lm-eval says of one task or group.

    Attributes:
        metrics: by lm-eval's name, `METRIC,FILTER` and `METRIC_stderr,FILTER`, such as `acc,none`.
        questions: how many were asked.
        shots: examples before each; None for a group.
        version: of the task's definition.
        log_likelihoods: of the choices of each question, nats; empty for a task that is not multiple choice.
        targets: number of the right choice of each; empty likewise.
    """

    metrics: dict[str, float]
    questions: int
    shots: int | None
    version: str
    log_likelihoods: list[list[float]] = field(default_factory=list, repr=False)
    targets: list[int] = field(default_factory=list, repr=False)

    def summary(self) -> dict[str, Any]:
        """All but the single questions, as plain JSON values."""
        return {"questions": self.questions, "shots": self.shots, "version": self.version, **self.metrics}


@dataclass(frozen=True)
class LmEval:
    """The numbers of a model.

    Attributes:
        lm_eval: version of lm-eval.
        tasks: scores by task, in the order they were asked for.
        groups: scores of groups, as lm-eval aggregates them.
        text: likelihood of general text and, with an original model, KL(original ‖ model) in nats a token.
    """

    lm_eval: str
    tasks: dict[str, TaskScore]
    groups: dict[str, TaskScore]
    text: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the single questions."""
        return {
            "lm_eval": self.lm_eval,
            "tasks": {name: score.summary() for name, score in self.tasks.items()},
            "groups": {name: score.summary() for name, score in self.groups.items()},
            "text": None if self.text is None else self.text.summary(),
        }


# ---- tasks


@dataclass(frozen=True)
class Tasks:
    """Tasks with their questions, made ready for any model.

    Attributes:
        tasks: lm-eval's objects by name; their instances are the requests.
        groups: lm-eval's groups by name.
        targets: of the questions of each task; empty for a task that is not multiple choice.
        sha256: of each task's requests, targets and definition.
        offline: whether the data came from a directory, and nothing may be fetched.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]
    targets: dict[str, list[int]] = field(repr=False)
    sha256: dict[str, str] = field(repr=False)
    offline: bool


def _need() -> None:
    for library in ("lm_eval", "datasets", "accelerate"):
        if find_spec(library) is None:
            raise MissingLibraryError(
                f"the library {library} is not installed; evaluation by lm-eval needs `pip install 'kfade[eval]'`"
            )


@functools.cache
def _manager() -> Any:
    # Reads all of lm-eval's 15,000 definitions: seconds.
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _quiet() -> Iterator[None]:
    # lm-eval's bars have no common switch; its errors are exceptions.
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Let the Hugging Face libraries fetch nothing."""
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = wanted or place.HF_HUB_OFFLINE
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _check_names(names: Sequence[str]) -> None:
    known = _manager().task_index
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"tasks has {name!r}; it must be a task or group of lm-eval {version('lm_eval')}{hint}")


def _leaves(index: Mapping[str, Any], item: str | Mapping[str, Any]) -> list[str]:
    """Names of the tasks of a task, group or tag."""
    name = item if isinstance(item, str) else item.get("group", item.get("task"))
    if name not in index:
        raise ValueError(f"tasks has a group that defines {name!r} inside itself; such data cannot come from --data")
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [str(name)]
    members = entry.cfg["task"]
    return [leaf for member in ([members] if isinstance(members, str) else members) for leaf in _leaves(index, member)]


def _local_files(task: str, definition: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The reader of `datasets` for a task's files, and the files by split.

    Raises:
        DataError: files are missing.
        ValueError: the task loads its data in code.
    """
    path, name = definition.get("dataset_path"), definition.get("dataset_name")
    if not isinstance(path, str) or "class" in definition or definition.get("custom_dataset"):
        raise ValueError(f"tasks has {task}, which loads its data in code; it cannot come from --data")
    sampled = definition.get("fewshot_config")
    wanted = [definition.get(key) for key in _SPLITS] + [sampled.get("split") if isinstance(sampled, Mapping) else None]
    splits = sorted({split for split in wanted if split})
    places = [base / name if name else base for base in (folder / path, folder / Path(path).name, folder)]
    missing = splits
    for place in places:
        for suffixes in ((".parquet",), (".jsonl", ".json")):
            files = {
                split: sorted(
                    str(file.absolute())
                    for file in (place.iterdir() if place.is_dir() else ())
                    if file.suffix in suffixes and file.name.startswith((f"{split}-", f"{split}."))
                )
                for split in splits
            }
            lacking = [split for split, found in files.items() if not found]
            if not lacking:
                return _READERS[suffixes[0]], files
            missing = min(missing, lacking, key=len)
    raise DataError(
        f"task {task}: {folder} has no {' and no '.join(missing)} of {path}{f' ({name})' if name else ''}; it must have"
        f" {' and '.join(f'{split}-*.parquet or {split}.jsonl' for split in splits)} in one of"
        f" {', '.join(str(place) for place in places)}"
    )


@contextmanager
def _local(names: Sequence[str], folder: Path) -> Iterator[None]:
    """Let the definitions of tasks name files of a directory in the place of a data set on the hub."""
    index = _manager().task_index
    leaves = list(dict.fromkeys(leaf for name in names for leaf in _leaves(index, name)))
    sources = {leaf: _local_files(leaf, index[leaf].cfg, folder) for leaf in leaves}
    before = {leaf: index[leaf] for leaf in leaves}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for number, (leaf, (reader, files)) in enumerate(sources.items()):
                # Into memory, and no copy in the user's cache: the questions may be such as nobody wants there.
                options = {"data_files": files, "cache_dir": scratch, "keep_in_memory": True}
                changed = {"dataset_path": reader, "dataset_name": None, "dataset_kwargs": options}
                definition = Path(scratch) / f"{number}.yaml"
                # lm-eval's own `include` leaves all the rest as it is.
                write_text(definition, yaml.safe_dump({"include": str(before[leaf].yaml_path), **changed}))
                index[leaf] = replace(before[leaf], yaml_path=definition)
            yield
        finally:
            index.update(before)


def _targets(task: Any, docs: Sequence[Mapping[str, Any]]) -> list[int]:
    """The right choice of each question.

    Raises:
        ValueError: it is none of the choices.
    """
    found = []
    for number, doc in enumerate(docs, 1):
        target, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
        if isinstance(target, str) and target in choices:
            target = choices.index(target)
        if not isinstance(target, int) or not 0 <= target < len(choices):
            raise ValueError(f"question {number} has answer {target!r}; it must be one of {len(choices)} choices")
        found.append(target)
    return found


def _prepare(name: str, task: Any, config: LmEvalConfig) -> tuple[list[int], str]:
    """Make a task's requests; the right choices, and the SHA-256 of all that a result depends on.

    Raises:
        DataError: a question does not fit the definition.
    """
    own = task.get_config("num_fewshot")
    if own is None or (config.num_fewshot is not None and own != 0):  # 0 in a definition stays: lm-eval's rule
        task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
    task.set_fewshot_seed(_SEED)
    try:
        with _quiet():
            task.build_all_requests(limit=config.limit, rank=0, world_size=1)
        docs = [doc for _, doc in task.doc_iterator(rank=0, limit=config.limit, world_size=1)]
        # Where a definition has several texts or targets, its target is no choice.
        choice = task.OUTPUT_TYPE == "multiple_choice" and not (task.multiple_input or task.multiple_target)
        targets = _targets(task, docs) if choice else []
    except Exception as error:  # of any template or function of a definition
        reason = str(error) or type(error).__name__
        raise DataError(f"task {name}: its questions do not fit it: {reason}") from error
    apart = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")  # where it came from
    definition = {key: value for key, value in task.dump_config().items() if key not in apart}
    content = [[list(i.args) for i in task.instances], docs if not choice else targets, definition, str(task.VERSION)]
    return targets, hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def read_tasks(config: LmEvalConfig, data: str | Path | None = None) -> Tasks:
    """Tasks of lm-eval, with their questions.

    Args:
        config: which, and how many questions.
        data: directory with the files of the tasks' data sets, as they lie on the hub: of a data set `cais/wmdp` with
            the configuration `wmdp-bio` the files `wmdp-bio/test-*.parquet` (or `test.jsonl`, `test.json`) in `data`,
            `data/wmdp` or `data/cais/wmdp`. Every split that a definition names must be there, and nothing is
            fetched. None lets lm-eval fetch them.

    Raises:
        MissingLibraryError: lm-eval is not installed.
        ValueError: no such task, one that runs code that it is given, or one whose data cannot be local.
        DataError: files are missing, or hold no questions that fit the task.
    """
    _need()
    folder = None if data is None else Path(data)
    if folder is not None and not folder.is_dir():
        raise DataError(f"--data is {folder}; it must be a directory with the tasks' data sets")
    _check_names(config.tasks)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with _offline(folder is not None):
        for name in config.tasks:
            with _local([name], folder) if folder is not None else _quiet():
                try:
                    with _quiet():
                        loaded = _manager().load([name])
                except Exception as error:  # of any library that a definition calls
                    raise DataError(f"task {name}: its data cannot be read: {type(error).__name__}: {error}") from error
            tasks |= {key: value for key, value in loaded["tasks"].items() if key not in tasks}
            groups |= loaded["groups"]
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise ValueError(f"tasks has {unsafe[0]}, which runs what the model writes; no such task is run here")
    targets, digests = {}, {}
    for name, task in tasks.items():
        targets[name], digests[name] = _prepare(name, task, config)
    return Tasks(tasks, groups, targets, digests, folder is not None)


# ---- a model on the tasks


class _Advance:
    """In the place of lm-eval's cache: is told of each finished request."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def add_partial(self, attr: str, req: object, res: object) -> None:
        self._stage.advance(1)


def _encoded(tasks: Tasks, tokenizer: Any, room: int, progress: Progress) -> dict[str, str]:
    """SHA-256 of what this tokenizer makes of each task; says how many prompts do not fit into `room` tokens."""
    found, cut = {}, 0
    for name, task in tasks.tasks.items():
        prompts = list(dict.fromkeys(str(instance.args[0]) for instance in task.instances))
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        cut += sum(len(ids) >= room for ids in tokens)
        digest = hashlib.sha256(tasks.sha256[name].encode())
        for ids in tokens:
            digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        found[name] = digest.hexdigest()
    if cut:
        progress.say(f"note: {cut} prompts are longer than the model's {room} tokens, and lose their beginning")
    return found


def _measure(lm: Any, name: str, task: Any, targets: list[int], limit: int | None, progress: Progress) -> TaskScore:
    from lm_eval import evaluate as run_harness

    with progress.stage(name, len(task.instances), "answer") as stage, _quiet():
        lm.set_cache_hook(_Advance(stage))
        task.set_fewshot_seed(_SEED)  # lm-eval makes the requests anew, from the same draws
        found = run_harness(lm, {"tasks": {name: task}, "groups": {}}, limit=limit)
    values = found["results"][name]
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) if targets else []
    likelihoods = [[float(reply[0]) for reply in sample["filtered_resps"]] for sample in samples]
    for number, choices in enumerate(likelihoods, 1):
        if not all(map(math.isfinite, choices)):
            raise NonFiniteError(f"task {name}: question {number} has a choice of log-likelihood NaN or infinity")
    metrics = {
        key: float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, (int, float)) and math.isfinite(value)
    }
    shots, number = int(found["n-shot"][name]), int(values["sample_len"])
    return TaskScore(metrics, number, shots, str(task.VERSION), likelihoods, targets)


def _group(group: Any, tasks: Mapping[str, TaskScore]) -> TaskScore:
    values = group.aggregate({name: {**s.metrics, "sample_len": s.questions} for name, s in tasks.items()})
    metrics = {key: float(v) for key, v in values.items() if "," in key and isinstance(v, (int, float))}
    return TaskScore(metrics, int(values["sample_len"]), None, group.version)


def text_batches(tokenizer: Any, records: Sequence[Record], config: LmEvalConfig) -> list[dict[str, torch.Tensor]]:
    """Batches of the first `config.limit` records of general text."""
    some = records[: config.limit]
    return make_batches(tokenizer, some, batch_size=config.batch_size, max_tokens=config.max_tokens)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    config: LmEvalConfig,
    *,
    text: Sequence[Mapping[str, torch.Tensor]] | None = None,
    reference: References | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> LmEval:
    """All scores of a model in memory.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        tasks: as `read_tasks` gives them for the same `config`.
        config: how.
        text: batches of general text, as `text_batches` gives them.
        reference: outputs of the original model on the same batches, as `evaluate.references` gives them.
        out: directory for the log; a task that its log has already, of the same weights, requests and version of
            lm-eval, is not measured again.
        progress: where stages are shown and their cost is recorded.

    Raises:
        NonFiniteError: a likelihood is not finite.
        ValueError: a reference without text, or of other text.
    """
    from lm_eval.models.huggingface import HFLM

    if reference is not None and text is None:
        raise ValueError("reference is given and text is not; the KL needs both")
    progress = progress or Progress()
    evaluation = None
    if text is not None:
        with progress.stage("general text"):
            evaluation = scores(model, text, reference)
    pad = getattr(tokenizer, "pad_token", None)
    with _offline(tasks.offline), deterministic_mode(model):
        try:
            with _quiet():
                lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=config.batch_size)
            library, inputs = version("lm_eval"), _encoded(tasks, tokenizer, lm.max_length, progress)
            weights = weights_sha256(model) if out is not None else ""
            store = KeptResults(
                None if out is None else out / LOG,
                {name: {"weights": weights, "inputs": inputs[name], "lm_eval": library} for name in tasks.tasks},
            )
            found = {}
            for name, task in tasks.tasks.items():
                kept = store.get(name)
                if kept is None:
                    found[name] = _measure(lm, name, task, tasks.targets[name], config.limit, progress)
                    store.put(name, asdict(found[name]))
                else:
                    found[name] = TaskScore(**kept)
        finally:
            if pad is None:  # lm-eval sets one
                tokenizer.pad_token = None
    groups = {name: _group(group, found) for name, group in tasks.groups.items() if group.has_aggregation}
    return LmEval(library, found, groups, evaluation)


# ---- from names to numbers


def _same_batches(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], reference: str) -> None:
    if not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(f"--reference is {reference}; it must have the model's tokenizer")


def run(
    model: str,
    config: LmEvalConfig,
    *,
    data: str | Path | None = None,
    update: str | Path | None = None,
    scale: float = 1.0,
    reference: str | None = None,
    text: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    out: Path | None = None,
    progress: Progress | None = None,
) -> LmEval:
    """All scores of a model on disk or on the hub.

    Args:
        model: as `models.load_model` takes it.
        config: which tasks, and how.
        data: directory with the tasks' data sets, as `read_tasks` takes it.
        update: to apply to the model before.
        scale: of the update.
        reference: the original model, to measure the KL from; with an update the model itself before it.
        text: general text to measure the KL on, as `data.read_records` takes it.
        dtype, device: of both models.
        out: directory for the log, by which an interrupted run goes on, and for the result (`lm_eval.json`).
        progress: where stages are shown and their cost is recorded.

    Raises:
        MissingLibraryError: lm-eval is not installed.
        DataError, StorageError: the tasks' data, the text or the update cannot be read.
        ValueError: see `read_tasks` and `evaluate`; no such model; a reference with another tokenizer.
    """
    progress = progress or Progress()
    _need()
    if reference is not None and text is None:
        raise ValueError(f"--reference is {reference} and there is no --text; the KL needs both")
    changes = None if update is None else Update.load(update)
    for name in (model, reference):
        if name is not None:
            models.check_model(name, dtype, device)
    records = None if text is None else read_records(text)
    with progress.stage("load the tasks"):
        tasks = read_tasks(config, data)
    original = theirs = None
    if reference is not None and records is not None:
        with progress.stage("reference"):
            loaded, tokenizer = models.load_model(reference, dtype, device)
            theirs = text_batches(tokenizer, records, config)
            original = references(loaded, theirs)
            del loaded  # before the next one is loaded: two need not fit in memory
            gc.collect()
    with progress.stage("load the model"):
        loaded, tokenizer = models.load_model(model, dtype, device)
    batches = None if records is None else text_batches(tokenizer, records, config)
    if theirs is not None and batches is not None:
        _same_batches(batches, theirs, str(reference))
    if changes is not None:
        if batches is not None and original is None:
            with progress.stage("reference"):
                original = references(loaded, batches)
        changes.apply_(loaded, scale)
    result = evaluate(loaded, tokenizer, tasks, config, text=batches, reference=original, out=out, progress=progress)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / RESULT, json.dumps(result.to_json(), allow_nan=False, indent=1) + "\n")
    return result
