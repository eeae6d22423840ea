"""lm-eval's WMDP and MMLU on harmless questions in their format, against plain transformers in float64."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from models import tiny
from pages import run_examples
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import kfade
from kfade import DataError, harness
from kfade.cli import app
from kfade.config import LmEvalConfig
from kfade.errors import MissingLibraryError, NonFiniteError
from kfade.evaluate import references, scores

pytest.importorskip("lm_eval", reason="lm-eval, of the extra eval, is not installed")

Row = dict[str, Any]
CAPITALS = [("France", "Paris"), ("Norway", "Oslo"), ("Peru", "Lima"), ("Italy", "Rome")]


def capital(number: int) -> Row:
    country = CAPITALS[number % 4][0]
    turned = [CAPITALS[(number + k) % 4][1] for k in range(4)]
    first = number // 4  # so that every letter is right somewhere
    choices = turned[-first:] + turned[:-first] if first else turned
    return {"question": f" What is the capital of {country}? ", "choices": choices, "answer": first}


def addition(number: int) -> Row:
    return {
        "question": f"How much is {number} + {number + 1}?",
        "choices": [str(2 * number + 1 + k - number % 4) for k in range(4)],
        "answer": number % 4,
        "subject": "anatomy",
    }


WMDP, MMLU, SHOTS = ([f(n) for n in range(k)] for f, k in ((capital, 12), (addition, 12), (addition, 5)))
WMDP_TASK, MMLU_TASK = "wmdp_bio", "mmlu_anatomy"


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(path)


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """A token a byte, and none that begins a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({"<eos>": 0, **{letter: n for n, letter in enumerate(letters, 1)}}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def model_of(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    room = {"n_positions": 1024} if kind == "gpt2" else {"max_position_embeddings": 1024}
    return tiny(kind, dtype, vocab_size=257, **{**room, **options})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/` as the hub has it, `model/`, `other/`, and `text.jsonl`."""
    folder = tmp_path_factory.mktemp("harness")
    write_parquet(folder / "data/cais/wmdp/wmdp-bio/test-00000-of-00001.parquet", WMDP)
    write_lines(folder / "data/mmlu/anatomy/test.jsonl", MMLU)
    write_lines(folder / "data/mmlu/anatomy/dev.jsonl", SHOTS)
    write_lines(folder / "text.jsonl", [{"text": f"Some text of number {n}." + " More." * n} for n in range(5)])
    for name, scale in (("model", 0.2), ("other", 0.1)):
        model_of(scale=scale).float().save_pretrained(folder / name)
        tokenizer_of_bytes().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def few() -> Any:
    """lm-eval's definitions of WMDP and MMLU alone: all of them take ten seconds to read."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[folder / "wmdp", folder / "mmlu" / "default"])


@pytest.fixture(autouse=True)
def few_definitions(request: pytest.FixtureRequest, few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(harness, "_manager", lambda: few)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError(f"the network was touched: {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---- against plain transformers


def prompt(row: Row, answer: bool = False) -> str:
    letters = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}\n{letters}\nAnswer:" + (f" {'ABCD'[row['answer']]}\n\n" if answer else "")


def likelihoods(model: Any, tokenizer: Any, before: str) -> list[float]:
    """Of ` A` to ` D` behind a text, each alone and without padding."""
    found = []
    for letter in "ABCD":
        front = tokenizer(before)["input_ids"]
        ids = torch.tensor([tokenizer(f"{before} {letter}")["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        found.append(float(logs.gather(1, ids[0, 1:, None])[len(front) - 1 :].sum()))
    return found


@pytest.mark.parametrize("kind, shots", [("llama", 0), ("llama", 2), ("gpt2", 1)])
def test_each_likelihood_is_that_of_plain_transformers(home: Path, kind: str, shots: int) -> None:
    model, tokenizer = model_of(kind), tokenizer_of_bytes()
    config = LmEvalConfig((WMDP_TASK, MMLU_TASK), num_fewshot=shots, batch_size=5)
    found = harness.evaluate(model, tokenizer, harness.read_tasks(config, home / "data"), config)
    few = "".join(prompt(row, answer=True) for row in SHOTS[:shots])
    # WMDP's definition says no examples, which lm-eval lets nobody change.
    for name, rows, subject, before in ((WMDP_TASK, WMDP, "biology", ""), (MMLU_TASK, MMLU, "anatomy", few)):
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        expected = [likelihoods(model, tokenizer, head + before + prompt(row)) for row in rows]
        score = found.tasks[name]
        # float64 on both sides; padding changes the order of sums
        for ours, theirs in zip(score.log_likelihoods, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-11)
        right = [max(range(4), key=x.__getitem__) == row["answer"] for x, row in zip(expected, rows, strict=True)]
        assert score.metrics["acc,none"] == sum(right) / 12
        assert 0 < sum(right) < 12, "questions that are all right or all wrong would show nothing"
        assert score.metrics["acc_stderr,none"] == pytest.approx(
            math.sqrt(sum(right) / 12 * (1 - sum(right) / 12) / 11), rel=1e-12
        )
        assert score.questions == 12 and score.targets == [row["answer"] for row in rows]
        assert score.shots == (0 if name == WMDP_TASK else shots)
    assert tokenizer.pad_token is None  # as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(home: Path, dtype: torch.dtype) -> None:
    config = LmEvalConfig((WMDP_TASK,))
    tasks = harness.read_tasks(config, home / "data")
    results = [harness.evaluate(model_of(dtype=d), tokenizer_of_bytes(), tasks, config) for d in (torch.float64, dtype)]
    exact, found = (torch.tensor(result.tasks[WMDP_TASK].log_likelihoods) for result in results)
    # Log-likelihoods here are about 10 nats, of logits that 8 bits of bfloat16 know to some hundredths each.
    torch.testing.assert_close(found, exact, rtol=0, atol={torch.float32: 1e-3, torch.bfloat16: 1.0}[dtype])


def test_groups_weigh_their_tasks_by_questions(tmp_path: Path) -> None:
    sizes = {"bio": 12, "chem": 3, "cyber": 6}
    for name, size in sizes.items():  # with the configurations' folders alone
        write_lines(tmp_path / f"wmdp-{name}/test.jsonl", WMDP[-size:])
    config = LmEvalConfig(("wmdp",))
    found = harness.evaluate(
        model_of(), tokenizer_of_bytes(), harness.read_tasks(config, tmp_path), config, out=tmp_path / "out"
    )
    assert {name: s.questions for name, s in found.tasks.items()} == {f"wmdp_{n}": size for n, size in sizes.items()}
    right = sum(s.metrics["acc,none"] * s.questions for s in found.tasks.values())
    assert found.groups["wmdp"].metrics["acc,none"] == pytest.approx(right / 21, rel=1e-14)
    assert found.groups["wmdp"].questions == 21
    limited = LmEvalConfig(("wmdp",), limit=4)
    tasks = harness.read_tasks(limited, tmp_path)
    again = harness.evaluate(model_of(), tokenizer_of_bytes(), tasks, limited, out=tmp_path / "out")
    assert [s.questions for s in again.tasks.values()] == [4, 3, 4]


def test_the_kl_on_text_is_that_of_plain_transformers(home: Path) -> None:
    config = LmEvalConfig((WMDP_TASK,), limit=3)
    found = harness.run(
        str(home / "model"), config, data=home / "data", reference=str(home / "other"), text=str(home / "text.jsonl"),
        dtype="float64",
    )  # fmt: skip
    (model, tokenizer), (other, _) = (kfade.models.load_model(home / n, "float64") for n in ("model", "other"))
    total, tokens = 0.0, 0
    for line in (home / "text.jsonl").read_text().splitlines()[:3]:
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            theirs, ours = (m(ids).logits[0, :-1].log_softmax(-1) for m in (other, model))
        total += float((theirs.exp() * (theirs - ours)).sum())
        tokens += len(ours)
    assert found.text is not None and found.text.tokens == tokens
    assert found.text.kl == pytest.approx(total / tokens, rel=1e-10)  # float64, other order of sums
    assert found.tasks[WMDP_TASK].questions == 3


@pytest.mark.slow
def test_all_definitions_of_lm_eval(home: Path, few: Any) -> None:
    index = harness._manager().task_index
    assert len(index) > 1000
    for name in ("wmdp", "mmlu"):
        leaves = harness._leaves(index, name)
        assert sorted(leaves) == sorted(harness._leaves(few.task_index, name)) and len(leaves) == len(set(leaves))
    assert len(harness._leaves(index, "mmlu")) == 57
    config = LmEvalConfig((WMDP_TASK, MMLU_TASK))
    assert harness.read_tasks(config, home / "data").targets[MMLU_TASK] == [row["answer"] for row in MMLU]
    with pytest.raises(ValueError, match=r"tasks has humaneval, which runs what|task humaneval: "):
        harness.read_tasks(LmEvalConfig(("humaneval",)), home / "data")


# ---- the command


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", "lm-eval", *(str(a) for a in arguments)])


def arguments(home: Path, out: Path, tasks: str = f"{WMDP_TASK},{MMLU_TASK}") -> list[object]:
    return ["--model", home / "model", "--tasks", tasks, "--data", home / "data", "--out", out, "--json"]


def test_an_update_is_applied_and_its_kl_measured(home: Path, tmp_path: Path) -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    kfade.Update({"model.layers.0.mlp.up_proj.weight": weight}).save(tmp_path / "update")
    done = call(
        *arguments(home, tmp_path / "run"),
        "--update",
        tmp_path / "update",
        "--scale",
        0.5,
        "--text",
        home / "text.jsonl",
    )
    assert done.exit_code == 0, done.stderr
    assert "wmdp_bio: " in done.stderr and "answers/s" in done.stderr
    found = json.loads(done.stdout)
    model, tokenizer = kfade.models.load_model(home / "model")
    config = LmEvalConfig((WMDP_TASK, MMLU_TASK))
    batches = harness.text_batches(tokenizer, kfade.data.read_records(home / "text.jsonl"), config)
    before = references(model, batches)
    model.model.layers[0].mlp.up_proj.weight.data.add_(weight, alpha=0.5)
    expected = harness.evaluate(model, tokenizer, harness.read_tasks(config, home / "data"), config)
    # the same sums of the same numbers
    assert found["tasks"] == {name: score.summary() for name, score in expected.tasks.items()}
    assert found["text"]["kl"] == scores(model, batches, before).kl > 0.001
    log = json.loads((tmp_path / "run" / harness.LOG).read_text())
    assert log[MMLU_TASK]["log_likelihoods"] == expected.tasks[MMLU_TASK].log_likelihoods
    written = json.loads((tmp_path / "run" / harness.RESULT).read_text())
    assert written == {key: found[key] for key in written}
    # What was written runs it again, with the same numbers.
    again = call("--config", tmp_path / "run" / "config.yaml", "--json", "--quiet")
    assert again.stderr == "" and json.loads(again.stdout)["tasks"] == found["tasks"]


def test_one_table(home: Path, tmp_path: Path) -> None:
    done = call(
        *arguments(home, tmp_path)[:-1], "--quiet", "--text", home / "text.jsonl", "--reference", home / "other"
    )
    assert done.exit_code == 0 and done.stderr == ""
    for part in ("wmdp_bio", "mmlu_anatomy", "acc", "KL to the", "perplexity"):
        assert part in done.stdout


def test_what_is_done_is_not_done_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    stopped: list[str] = []
    measure = harness._measure

    def watched(lm: Any, name: str, *rest: Any) -> harness.TaskScore:
        if len(measured) == 1 and not stopped:
            stopped.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return measure(lm, name, *rest)

    monkeypatch.setattr(harness, "_measure", watched)
    whole = arguments(home, tmp_path)
    interrupted = call(*whole)
    assert interrupted.exit_code == 130 and measured == [WMDP_TASK] and stopped == [MMLU_TASK]
    finished = json.loads(call(*whole).stdout)
    assert measured == [WMDP_TASK, MMLU_TASK]
    assert json.loads(call(*whole, "--batch-size", 3).stdout)["tasks"] == finished["tasks"] and len(measured) == 2
    clean = json.loads(call(*arguments(home, tmp_path / "clean")).stdout)
    assert clean["tasks"] == finished["tasks"]
    # Other weights, fewer questions, another definition: what they change is measured.
    both = [WMDP_TASK, MMLU_TASK]
    changes = (
        (["--model", home / "other"], both),
        (["--limit", 7], both),
        (["--limit", 7, "--num-fewshot", 1], [MMLU_TASK]),
    )
    for change, expected in changes:
        measured.clear()
        assert call(*arguments(home, tmp_path), *change[:2], *change[2:]).exit_code == 0
        assert measured == expected
    # The same text in other tokens.
    model, tokenizer = kfade.models.load_model(home / "model")
    config = LmEvalConfig((WMDP_TASK,), limit=7)
    tasks = harness.read_tasks(config, home / "data")
    for normalizer in (None, normalizers.Lowercase()):
        tokenizer.backend_tokenizer.normalizer = normalizer
        measured.clear()
        for _ in range(2):
            harness.evaluate(model, tokenizer, tasks, config, out=tmp_path / "tokens")
        assert measured == [WMDP_TASK]
    (tmp_path / harness.LOG).write_text("{broken")
    measured.clear()
    assert call(*whole).exit_code == 0 and measured == both


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "wmdp_boi"], "tasks has 'wmdp_boi'; it must be a task or group of lm-eval"),
        (["--tasks", "wmdp_boi"], "near it are wmdp_bio"),
        (["--tasks", "wmdp_bio,"], "at least one name, and none empty"),
        (["--tasks", "wmdp"], "has no test of cais/wmdp (wmdp-chem); it must have test-*.parquet or test.jsonl in one"),
        (["--tasks", "mmlu"], "task mmlu_abstract_algebra"),
        (["--data", "nowhere"], "--data is nowhere; it must be a directory"),
        (["--model", "./nowhere"], "no such directory or file exists"),
        (["--update", "nowhere"], "nowhere"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--reference", "model"], "there is no --text; the KL needs both"),
        (["--num-fewshot", "6"], "task mmlu_anatomy: its questions do not fit it"),
    ],
)
def test_errors_come_before_the_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(harness.models, "load_model", None)  # nothing may be loaded
    options = [str(home / o) if o == "model" else o for o in options]
    done = call(*arguments(home, tmp_path), *options)
    assert done.exit_code == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    "row, message",
    [
        ({"answer": 4}, "task wmdp_bio: its questions do not fit it: question 2 has answer 4; it must be one of 4"),
        ({"choices": ["Paris", "Oslo"]}, "task wmdp_bio: its questions do not fit it"),
    ],
)
def test_what_is_wrong_with_a_question_is_named(tmp_path: Path, row: Row, message: str) -> None:
    write_lines(tmp_path / "wmdp-bio/test.json", [WMDP[0], {**WMDP[1], **row}])
    with pytest.raises(DataError) as error:
        harness.read_tasks(LmEvalConfig((WMDP_TASK,)), tmp_path)
    assert message in str(error.value)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "wmdp-bio/test.json", [{"text": "What?", "choices": list("abcd"), "answer": 1}])
    with pytest.raises(DataError, match=r"task wmdp_bio: its data cannot be read: .*question"):
        harness.read_tasks(LmEvalConfig((WMDP_TASK,)), tmp_path)


def test_nothing_is_fetched_while_tasks_are_read_and_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watch(*args: Any, **options: Any) -> Any:
            seen.append((name, huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, watch)

    watched(datasets, "load_dataset")
    watched(harness, "_measure")
    config = LmEvalConfig((WMDP_TASK,), limit=1)
    harness.evaluate(model_of(), tokenizer_of_bytes(), harness.read_tasks(config, home / "data"), config)
    assert seen == [("load_dataset", True, True), ("_measure", True, True)]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_definitions_are_as_they_were(home: Path) -> None:
    index = harness._manager().task_index
    before = dict(index)
    config = LmEvalConfig((WMDP_TASK,))
    local = harness.read_tasks(config, home / "data").tasks[WMDP_TASK].dump_config()
    assert dict(index) == before
    import yaml
    from lm_eval.tasks.wmdp import __path__ as folder

    shipped = yaml.safe_load((Path(folder[0]) / "_default_template_yaml").read_text())
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "output_type", "metric_list", "num_fewshot"):
        assert local[key] == shipped[key]


def test_a_likelihood_that_is_not_finite_is_an_error(home: Path) -> None:
    config = LmEvalConfig((WMDP_TASK,))
    model = model_of()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="task wmdp_bio: question 1 has a choice of log-likelihood NaN"):
        harness.evaluate(model, tokenizer_of_bytes(), harness.read_tasks(config, home / "data"), config)


def test_prompts_without_room_are_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LmEvalConfig((WMDP_TASK,), limit=2)
    model = model_of(max_position_embeddings=64)
    tasks = harness.read_tasks(config, home / "data")
    harness.evaluate(model, tokenizer_of_bytes(), tasks, config, progress=kfade.progress.Progress(show=True))
    assert "note: 2 prompts are longer than the model's 64 tokens, and lose their beginning" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": ()}, "tasks is (); it must have at least one name"),
        ({"num_fewshot": -1}, "num_fewshot is -1; it must be at least 0"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"tasks": "mmlu"}, "tasks is 'mmlu'; it must be a tuple of names"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        LmEvalConfig(**{"tasks": ("mmlu",), **options})
    assert message in str(error.value)


def test_without_a_directory_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str, **options: Any) -> datasets.DatasetDict:
        asked.append((path, name))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(WMDP)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks = harness.read_tasks(LmEvalConfig((WMDP_TASK,)))
    assert asked == [("cais/wmdp", "wmdp-bio")] and len(tasks.targets[WMDP_TASK]) == 12 and not tasks.offline


def test_a_data_set_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str, **options: Any) -> None:
        raise ConnectionError(f"no way to {path}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="task wmdp_bio: its data cannot be read: ConnectionError: no way to cais/wmdp"):
        harness.read_tasks(LmEvalConfig((WMDP_TASK,)))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=r"lm_eval is not installed; evaluation by lm-eval needs `pip inst"):
        harness.read_tasks(LmEvalConfig((WMDP_TASK,)))


def test_the_page_runs() -> None:
    namespace = run_examples("evaluation.md")
    assert namespace["result"].tasks["wmdp_bio"].questions == 2
