"""The ToFU metrics: published numbers, numbers by hand, and small models against plain transformers in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pages import run_examples
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import kfade
from kfade import DataError, tofu
from kfade.cli import app
from kfade.config import TofuConfig
from kfade.errors import MissingLibraryError
from kfade.tofu import evaluation, scores

pytest.importorskip("rouge_score", reason="rouge-score, of the extra eval, is not installed")
pytest.importorskip("scipy", reason="SciPy, of the extra eval, is not installed")

SHARED = Path(__file__).parents[3] / "shared" / "data"
LOGS, DATA = SHARED / "tofu_logs", SHARED / "tofu"
published_logs = pytest.mark.skipif(not LOGS.is_dir(), reason=f"the published ToFU logs are not in {LOGS}")
published_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the ToFU data set is not in {DATA}")
FULL, RETAIN90 = LOGS / "llama2-7b-full.json", LOGS / "llama2-7b-retain90.json"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# ---- published outputs


@published_logs
@pytest.mark.parametrize("path, utility", [(FULL, "0.6227"), (RETAIN90, "0.6137")])
def test_the_published_model_utility(path: Path, utility: str) -> None:
    assert f"{tofu.score(tofu.read_log(path)).model_utility:.4f}" == utility


@published_logs
def test_the_published_forget_quality() -> None:
    found = tofu.run(str(FULL), retrained=str(RETAIN90))
    assert (f"{found.forget_quality:.4g}", f"{found.ks_statistic:.4f}") == ("1.834e-21", "0.3967")
    assert found.truth_ratio_mean == "geometric" and found.sets["forget"].questions == 300
    # The benchmark takes the ratios; their logarithms have the same order, so the same test.
    from scipy.stats import ks_2samp

    logs = [tofu.read_log(path)["forget"] for path in (FULL, RETAIN90)]
    assert ks_2samp(*(np.exp(x.perturbed.mean(1) - x.paraphrased) for x in logs)).pvalue == found.forget_quality


@published_logs
def test_the_arithmetic_mean_is_another_number() -> None:
    found = tofu.run(str(FULL), config=TofuConfig(truth_ratio="arithmetic"), retrained=str(RETAIN90))
    assert f"{found.model_utility:.4f}" == "0.5859"  # as numpy gives it in one line from the same file
    assert found.truth_ratio_mean == "arithmetic"


# ---- by hand


def log(gt: list[float], paraphrased: list[float], perturbed: list[list[float]], rouge: list[float]) -> tofu.Log:
    """A log of 1/p for each loss."""
    return tofu.Log(*(np.log(np.array(x, dtype=float)) for x in (gt, paraphrased, perturbed)), np.array(rouge))


def small() -> dict[str, tofu.Log]:
    fiction = log([2, 4], [2, 2], [[4, 16], [1, 1]], [1.0, 0.5])
    options = log([2, 8], [2, 8], [[4, 4], [8, 4]], [0.5, 0.5])
    return {"retain": fiction, "forget": fiction, "real_authors": options, "world_facts": options}


@pytest.mark.parametrize("mean, first", [("geometric", 1 / 4), ("arithmetic", 5 / 16)])
def test_small_logs_by_hand(mean: str, first: float) -> None:
    # Geometric: 1/sqrt(4·16) over 1/2. Arithmetic: (1/4 + 1/16)/2 over 1/2. The second question has R = 2 in both.
    found = tofu.score(small(), truth_ratio=mean)
    assert found.sets["retain"].probability == pytest.approx((1 / 2 + 1 / 4) / 2, rel=1e-15)
    assert found.sets["retain"].rouge_l_recall == 0.75
    assert found.sets["retain"].truth_ratio == pytest.approx((1 - first + 0) / 2, rel=1e-14)
    assert found.sets["forget"].truth_ratio == pytest.approx((first + 1 / 2) / 2, rel=1e-14)
    # Shares of the options: 1/2 of 1/2 + 1/4 + 1/4, and 1/8 of 1/8 + 1/8 + 1/4.
    assert found.sets["real_authors"].probability == pytest.approx((1 / 2 + 1 / 4) / 2, rel=1e-14)
    options = {"geometric": (1 - 1 / 2 + 0) / 2, "arithmetic": (1 - 1 / 2 + 0) / 2}[mean]
    assert found.sets["world_facts"].truth_ratio == pytest.approx(options, rel=1e-14)
    nine = [0.375, 0.75, (1 - first) / 2, *2 * [0.375, 0.5, options]]
    assert found.model_utility == pytest.approx(9 / sum(1 / x for x in nine), rel=1e-14)
    assert found.forget_quality is None and found.kl is None


@pytest.mark.filterwarnings("error")
def test_forget_quality_by_hand() -> None:
    low, high = np.array([-1.0, 0.0, 1.0]), np.array([2.0, 3.0, 4.0])
    # All of one below all of the other: 2 of the C(6, 3) = 20 orders.
    assert tofu.forget_quality(low, high) == (pytest.approx(2 / 20), 1.0)
    assert tofu.forget_quality(low, low) == (1.0, 0.0)
    for n in (3, 5, 40, 300):  # one apart: the smallest statistic, which every order reaches
        ranks = np.arange(2.0 * n)
        assert tofu.forget_quality(ranks[::2], ranks[1::2]) == (pytest.approx(1.0), pytest.approx(1 / n))
    with pytest.raises(ValueError, match="has 3 questions of the forget set, and the retrained model's 2"):
        tofu.forget_quality(low, high[:2])


def test_losses_beyond_the_range_of_exp_are_no_nan() -> None:
    far = tofu.Log(np.array([2000.0]), np.array([2000.0]), np.array([[1.0, 1.0]]), np.array([0.0]))
    near = tofu.Log(np.array([1.0]), np.array([1.0]), np.array([[2000.0, 2000.0]]), np.array([0.0]))
    for sample in (far, near):
        found = tofu.score(dict.fromkeys(tofu.SETS, sample))
        assert all(math.isfinite(x) for s in found.sets.values() for x in (s.probability, s.truth_ratio))
        assert found.model_utility == 0.0  # ROUGE is 0


def test_rouge_stems_words_and_ignores_order_that_is_not_common() -> None:
    assert tofu.rouge_l_recall(["The authors were writing novels"], ["the author is writing a novel"]) == [0.8]
    assert tofu.rouge_l_recall(["a b c d"], ["d c b a"]) == [0.25]
    assert tofu.rouge_l_recall(["answer"], [""]) == [0.0]


# ---- logs in files


def test_a_log_by_number_of_the_question_is_the_same(tmp_path: Path) -> None:
    logs = small()
    names = {name: file for file, name in scores._FILES.items()}

    def numbered(rows: list[Any]) -> dict[str, Any]:
        return {str(n): rows[n] for n in reversed(range(len(rows)))}

    theirs = {names[n]: {key: numbered(rows) for key, rows in x.to_json().items()} for n, x in logs.items()}
    for name, content in (("ours", {n: x.to_json() for n, x in logs.items()}), ("theirs", theirs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert tofu.score(tofu.read_log(tmp_path / f"{name}.json")) == tofu.score(logs)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.update(train={}), "has ['train'] sets; a ToFU log has retain, forget"),
        (lambda x: x["forget"].pop("average_perturb_loss"), "forget has no average_perturb_loss"),
        (lambda x: x["forget"]["avg_gt_loss"].append(1.0), "different numbers of questions: {'avg_gt_loss': 3"),
        (lambda x: x["retain"].update(avg_gt_loss=[1.0, math.nan]), "avg_gt_loss with a NaN or an infinity at quest"),
        (lambda x: x["retain"].update(avg_gt_loss=["a", "b"]), "retain has avg_gt_loss that is no array of numbers"),
        (lambda x: x["retain"].update(average_perturb_loss=[1.0, 2.0]), "average_perturb_loss of shape [2]"),
        (lambda x: x.update(retain=3), "retain is a int; it must be an object"),
        (lambda x: x.pop("retain"), "a score needs retain, forget"),
        (lambda x: x["world_facts"].pop("rougeL_recall"), "the log has no rougeL_recall of world_facts"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_log_is_named(tmp_path: Path, change: Any, message: str) -> None:
    content = {name: x.to_json() for name, x in small().items()}
    change(content)
    path = tmp_path / "log.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        tofu.run(str(path))
    assert message in str(error.value)


# ---- questions


def write_set(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{split}_perturbed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fiction(number: int) -> dict[str, Any]:
    return {
        "question": f"Who wrote book {number}?",
        "answer": f"Author {number} wrote it" + " and liked it" * (number % 3) + ".",
        "paraphrased_answer": f"It was author {number}.",
        "perturbed_answer": [f"It was author {number + k}." for k in (1, 2)],
        "paraphrased_question": f"Book {number} is whose?",
    }


def fact(number: int) -> dict[str, Any]:
    names = ["Paris", "Rome", "Oslo", "Lima"]
    return {
        "question": f"Where is house {number}?",
        "answer": names[number % 4],
        "perturbed_answer": [names[(number + k) % 4] for k in (1, 2, 3)],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/`, and the models `plain/`, `retrained/` (no chat template) and `chat/`."""
    folder = tmp_path_factory.mktemp("tofu")
    (folder / "data").mkdir()
    write_set(folder / "data", "retain", [fiction(n) for n in range(7)])
    write_set(folder / "data", "forget05", [fiction(n) for n in range(20, 25)])
    write_set(folder / "data", "real_authors", [fact(n) for n in range(4)])
    write_set(folder / "data", "world_facts", [fact(n) for n in range(9, 12)])
    for name, seed in (("plain", 0), ("retrained", 1), ("chat", 2)):
        model, tokenizer = tiny(seed, chat=name == "chat")
        model.float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def tiny(seed: int = 0, *, chat: bool = False, gpt2: bool = False) -> tuple[Any, PreTrainedTokenizerFast]:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in map(fiction, range(30))]
    special = ["<eos>", "<end>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    inner.train_from_iterator(texts * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", additional_special_tokens=special[1:],
        chat_template=TEMPLATE if chat else None,
    )  # fmt: skip
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": 1 if chat else 0, "pad_token_id": 0}
    if gpt2:
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=128, **ends)
        return GPT2LMHeadModel(config).double().eval(), tokenizer
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.3, **shape, **ends
    )  # fmt: skip
    return LlamaForCausalLM(llama).double().eval(), tokenizer


def plain_loss(model: Any, tokenizer: Any, before: str, after: str) -> float:
    """Token-mean cross-entropy of the text `after` behind `before`, alone and without padding."""
    front = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([tokenizer(before + after, add_special_tokens=False)["input_ids"]])
    assert ids[0, : len(front)].tolist() == front
    with torch.no_grad():
        logits = model(ids).logits[0, len(front) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(front) :]))


SMALL = TofuConfig(forget_split="forget05", batch_size=3, max_new_tokens=6)


@pytest.mark.parametrize("kind", ["plain", "chat", "template", "gpt2"])
def test_each_loss_is_that_of_plain_transformers(home: Path, kind: str) -> None:
    model, tokenizer = tiny(chat=kind == "chat", gpt2=kind == "gpt2")
    template = "[INST] {question} [/INST]{answer}" if kind == "template" else None
    config = TofuConfig(**{**vars(SMALL), "template": template})
    questions = tofu.read_questions(home / "data", config)
    inputs = tofu.encode(model, tokenizer, questions, config)

    def loss(question: str, answer: str) -> float:
        before, after = {
            "chat": (f"<user>{question}<end>\n<assistant>", f"{answer}<end>"),
            "template": (f"[INST] {question} [/INST]", f"{answer}<eos>"),
        }.get(kind, (f"Question: {question}\nAnswer:", f" {answer}<eos>"))
        return plain_loss(model, tokenizer, before, after)

    for name in ("forget", "world_facts"):
        found = tofu.measure(model, tokenizer, questions[name], inputs[name], config)
        for n, q in enumerate(questions[name]):
            expected = [loss(q.question, text) for text in (q.answer, q.paraphrased or q.answer, *q.wrong)]
            ours = [found.gt[n], found.paraphrased[n], *found.perturbed[n]]
            # float64 on both sides; padding changes the order of sums
            np.testing.assert_allclose(ours, expected, rtol=1e-11)
        alone = tofu.measure(
            model, tokenizer, questions[name], inputs[name], TofuConfig(**{**vars(config), "batch_size": 1})
        )
        np.testing.assert_allclose(found.perturbed, alone.perturbed, rtol=1e-11)
        assert found.texts == alone.texts and len(found.texts) == len(questions[name])
        expected_rouge = tofu.rouge_l_recall([t[2] for t in alone.texts], [t[1] for t in alone.texts])
        assert found.rouge is not None and found.rouge.tolist() == expected_rouge


def test_replies_are_greedy_and_whole(home: Path) -> None:
    model, tokenizer = tiny()
    questions = tofu.read_questions(home / "data", SMALL)
    found = tofu.measure(
        model, tokenizer, questions["forget"], tofu.encode(model, tokenizer, questions, SMALL)["forget"], SMALL
    )
    for question, reply, answer in found.texts:
        ids = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
        start = len(tokenizer(f"Question: {question}\nAnswer:")["input_ids"])
        assert reply == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert answer in {q.answer for q in questions["forget"]}


def test_the_kl_is_that_of_plain_transformers(home: Path) -> None:
    (model, tokenizer), (other, _) = tiny(0), tiny(1)
    questions = tofu.read_questions(home / "data", SMALL)
    retrained = tofu.measure_retrained(other, tokenizer, questions, SMALL)
    found = tofu.evaluate(model, tokenizer, questions, SMALL, retrained=retrained)
    assert found.kl is not None
    for name in ("forget", "retain"):
        total, tokens = 0.0, 0
        for q in questions[name]:
            front = tokenizer(f"Question: {q.question}\nAnswer:")["input_ids"]
            ids = torch.tensor([tokenizer(f"Question: {q.question}\nAnswer: {q.answer}<eos>")["input_ids"]])
            with torch.no_grad():
                theirs, ours = (m(ids).logits[0, len(front) - 1 : -1].log_softmax(-1) for m in (other, model))
            total += float((theirs.exp() * (theirs - ours)).sum())
            tokens += len(ours)
        assert found.kl[name] == pytest.approx(total / tokens, rel=1e-10)  # float64, other order of sums
    same = tofu.evaluate(other, tokenizer, questions, SMALL, retrained=retrained)
    assert same.forget_quality == 1.0 and same.kl is not None
    assert max(same.kl.values()) < 1e-12 and found.kl["forget"] > 0.01


def test_the_first_questions_of_a_set_and_other_endings(home: Path, tmp_path: Path) -> None:
    found = tofu.read_questions(home / "data", TofuConfig(forget_split="forget05", limit=2))
    assert {name: len(items) for name, items in found.items()} == dict.fromkeys(tofu.SETS, 2)
    assert found["real_authors"][0].paraphrased is None and len(found["real_authors"][0].wrong) == 3
    for path in (home / "data").iterdir():  # as a clone of the hub's repository has them
        (tmp_path / path.with_suffix(".json").name).write_text(path.read_text())
    assert tofu.read_questions(tmp_path, TofuConfig(forget_split="forget05", limit=2)) == found


def test_questions_from_the_hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    asked = []

    def load_dataset(name: str, configuration: str, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        rows = (home / "data" / f"{configuration}.jsonl").read_text().splitlines()
        return datasets.Dataset.from_list([json.loads(row) for row in rows])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = TofuConfig(forget_split="forget05")
    assert tofu.read_questions(config=config) == tofu.read_questions(home / "data", config)
    assert asked[1] == ("locuslab/TOFU", "forget05_perturbed", "train")


def test_what_is_wrong_with_the_questions_is_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"forget01_perturbed\.jsonl cannot be read"):
        tofu.read_questions(home / "data", TofuConfig(forget_split="forget01"))
    write_set(tmp_path, "retain", [])
    with pytest.raises(DataError, match=r"retain_perturbed\.jsonl is empty"):
        tofu.read_questions(tmp_path)
    write_set(tmp_path, "retain", [fiction(1), {"question": "a", "answer": "b", "perturbed_answer": ["c", "d"]}])
    with pytest.raises(
        DataError, match=r"retain_perturbed\.jsonl, question 2: paraphrased_answer is None; it must be text"
    ):
        tofu.read_questions(tmp_path)
    write_set(tmp_path, "retain", [fiction(1), {**fiction(2), "perturbed_answer": ["c"]}])
    with pytest.raises(DataError, match="different numbers of wrong answers"):
        tofu.read_questions(tmp_path)
    with pytest.raises(DataError, match="nowhere:retain_perturbed is neither a file nor a data set"):
        tofu.read_questions(tmp_path / "nowhere")


@published_data
def test_all_published_questions_are_read() -> None:
    for split, number in (("forget01", 40), ("forget05", 200), ("forget10", 400)):
        found = tofu.read_questions(DATA, TofuConfig(forget_split=split, limit=None))
        assert [len(found[name]) for name in tofu.SETS] == [400, number, 100, 117]
        assert [len(found[name][0].wrong) for name in tofu.SETS] == [5, 5, 3, 3]
    assert [len(items) for items in tofu.read_questions(DATA).values()] == [300, 300, 100, 117]  # as in published logs


@pytest.mark.parametrize(
    "options, message",
    [
        ({"forget_split": "forget20"}, "forget_split is 'forget20'; it must be one of forget01"),
        ({"truth_ratio": "mean"}, "truth_ratio is 'mean'; it must be one of geometric, arithmetic"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"template": "{answer} to {question}"}, "it must have {question} once and end in {answer}"),
        ({"template": "{question}{answer}", "chat": True}, "at most one of them must be given"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        TofuConfig(**options)
    assert message in str(error.value)


def test_a_model_without_room_is_refused_before_it_runs(home: Path) -> None:
    model, tokenizer = tiny()
    questions = tofu.read_questions(home / "data", SMALL)
    model.forward = None  # nothing may be run
    with pytest.raises(ValueError, match=r"max_new_tokens is 200; it must be at most \d+: the model has 128 positions"):
        tofu.evaluate(model, tokenizer, questions, TofuConfig(forget_split="forget05"))
    with pytest.raises(ValueError, match=r"max_tokens is 5; it leaves no token of the answer 'Author 0 wrote it\.'"):
        tofu.evaluate(model, tokenizer, questions, TofuConfig(forget_split="forget05", max_tokens=5))


# ---- the command


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", "tofu", *(str(a) for a in arguments)])


def arguments(home: Path, out: Path, model: str = "plain") -> list[object]:
    return ["--model", home / model, "--data", home / "data", "--forget-split", "forget05", "--max-new-tokens", 6,
            "--out", out, "--json"]  # fmt: skip


def test_the_command_end_to_end(home: Path, tmp_path: Path) -> None:
    done = call(*arguments(home, tmp_path / "run"), "--retrained", home / "retrained")
    assert done.exit_code == 0, done.stderr
    assert "forget: replies" in done.stderr and "questions/s" in done.stderr
    found = json.loads(done.stdout)
    assert {name: s["questions"] for name, s in found["sets"].items()} == dict(
        zip(tofu.SETS, (7, 5, 4, 3), strict=True)
    )
    assert 0 <= found["forget_quality"] <= 1 and found["truth_ratio_mean"] == "geometric"
    assert found["kl"]["forget"] > 0 and found["kl"]["retain"] > 0
    written = json.loads((tmp_path / "run" / tofu.RESULT).read_text())
    assert written == {key: found[key] for key in written}
    # The logs that it wrote give the same numbers, but for the KL.
    again = call("--model", tmp_path / "run" / tofu.LOG, "--retrained", tmp_path / "run" / tofu.RETRAINED_LOG, "--json")
    assert json.loads(again.stdout) == {**found, "kl": None, "costs": []}
    # bfloat16 has 8 bits
    half = json.loads(call(*arguments(home, tmp_path / "half"), "--dtype", "bfloat16").stdout)
    ours, theirs = half["sets"]["retain"]["truth_ratio"], found["sets"]["retain"]["truth_ratio"]
    assert ours == pytest.approx(theirs, abs=0.05)


def test_an_update_is_applied_before(home: Path, tmp_path: Path) -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    kfade.Update({"model.layers.0.mlp.up_proj.weight": weight}).save(tmp_path / "update")
    model, tokenizer = tiny(0)
    model.float().model.layers[0].mlp.up_proj.weight.data.add_(weight, alpha=0.5)
    expected = tofu.evaluate(model, tokenizer, tofu.read_questions(home / "data", SMALL), SMALL)
    found = call(*arguments(home, tmp_path / "out"), "--batch-size", 3, "--update", tmp_path / "update", "--scale", 0.5)
    assert json.loads(found.stdout)["model_utility"] == expected.model_utility  # the same sums of the same numbers


def test_tables_name_the_mean(home: Path, tmp_path: Path) -> None:
    done = call(*arguments(home, tmp_path, "chat")[:-1], "--truth-ratio", "arithmetic", "--quiet")
    assert done.exit_code == 0 and done.stderr == ""
    assert "arithmetic" in done.stdout and "model utility" in done.stdout


def test_what_is_done_is_not_done_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = tofu.measure

    def watched(*args: Any, name: str, **options: Any) -> tofu.Log:
        if len(measured) == 2 and not stopped:
            stopped.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return measure(*args, name=name, **options)

    stopped: list[str] = []
    monkeypatch.setattr(evaluation, "measure", watched)
    whole = arguments(home, tmp_path)
    interrupted = call(*whole)
    assert interrupted.exit_code == 130 and stopped == ["real_authors"] and measured == ["retain", "forget"]
    finished = json.loads(call(*whole).stdout)
    assert measured == list(tofu.SETS)
    assert json.loads(call(*whole).stdout)["sets"] == finished["sets"] and len(measured) == 4
    monkeypatch.setattr(evaluation, "measure", measure)
    clean = json.loads(call(*arguments(home, tmp_path / "clean")).stdout)
    assert clean["sets"] == finished["sets"]
    monkeypatch.setattr(evaluation, "measure", watched)
    # Another length of replies, other weights, other tokens: all are measured.
    for change in (["--max-new-tokens", 7], ["--model", home / "retrained"], ["--template", "{question} {answer}"]):
        measured.clear()
        assert call(*whole, *change).exit_code == 0
        assert measured == list(tofu.SETS)
    (tmp_path / tofu.LOG).write_text("{broken")
    measured.clear()
    assert call(*whole).exit_code == 0 and measured == list(tofu.SETS)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "nowhere.json"], "nowhere.json does not exist"),
        (["--model", "./nowhere"], "no such directory or file exists"),
        (["--retrained", "./nowhere"], "no such directory or file exists"),
        (["--forget-split", "forget10"], "forget10_perturbed.jsonl cannot be read"),
        (["--chat"], "the tokenizer has no chat template"),
        (["--truth-ratio", "mean"], "truth_ratio is 'mean'"),
        (["--retrained", "chat"], "the retrained model has other tokens for forget and retain"),
    ],
)
def test_errors_of_the_command(home: Path, tmp_path: Path, options: list[str], message: str) -> None:
    options = [str(home / o) if o == "chat" else o for o in options]
    done = call(*arguments(home, tmp_path), *options)
    assert done.exit_code == 2 and message in done.stderr


def test_a_log_takes_no_update_and_no_model_beside_it(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps({name: x.to_json() for name, x in small().items()}))
    assert call("--model", path, "--json").exit_code == 0
    wrong = {"--update": (path, "an update must have a model"), "--retrained": (home / "plain", "must be a log too")}
    for option, (value, message) in wrong.items():
        done = call("--model", path, option, value)
        assert done.exit_code == 2 and message in done.stderr


def test_a_missing_library_is_named_before_any_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"rouge_score is not installed; ToFU needs `pip install 'kfade\[eval\]'`"):
        tofu.rouge_l_recall([], [])
    with pytest.raises(MissingLibraryError, match="scipy is not installed"):
        tofu.forget_quality(np.zeros(2), np.zeros(2))
    done = call(*arguments(home, tmp_path))
    assert done.exit_code == 2 and "error: the library rouge_score is not installed" in done.stderr


def test_the_page_runs() -> None:
    namespace = run_examples("tofu.md")
    assert namespace["result"].model_utility > 0
