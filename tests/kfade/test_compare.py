"""Methods side by side: what is chosen at equal KL and time, how a sweep goes on, and the page."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from pages import run_examples
from typer.testing import CliRunner

from kfade import UnlearnConfig, compare
from kfade.baselines import BaselineConfig
from kfade.cli import app
from kfade.compare import Point, Run, Sweep, Task, Yardstick, at_equal_kl, our_seconds, report, runs, tries, verdict
from kfade.config import CompareConfig
from kfade.data import read_jsonl
from kfade.evaluate import references, scores
from kfade.storage import read_json

BUDGETS = (0.01, 0.1)
OPTIONS = CompareConfig(budgets=BUDGETS, seeds=2, epochs=2, learning_rates=(1e-3, 1e-2))


def point(method: str, seed: int, kl: float, distance: float, *, seconds: float = 1.0, step: int = 1) -> Point:
    return Point(method, "one", seed, step, seconds, 100, 8 - distance, kl, 1.0, distance, 0.5)


def no_target(p: Point) -> Point:
    return replace(p, forget_kl_retrained=None, retain_kl_retrained=None)


# ---- the choice


def test_the_nearest_within_the_budget_is_taken_for_each_seed() -> None:
    points = [
        point("a", 1, 0.01, 3.0), point("a", 1, 0.02, 2.0), point("a", 1, 0.021, 0.1),
        point("a", 0, 0.0, 5.0), point("a", 0, 0.5, 0.0), point("b", 0, 0.5, 0.0),
    ]  # fmt: skip
    chosen = at_equal_kl(points, 0.02)
    assert [(p.seed, p.distance) for p in chosen["a"]] == [(0, 5.0), (1, 2.0)]
    assert chosen["b"] == []  # nothing is interpolated: a method without a model within the budget has none


def test_time_is_a_second_limit() -> None:
    points = [point("a", 0, 0.01, 3.0, seconds=1), point("a", 0, 0.01, 1.0, seconds=10)]
    assert at_equal_kl(points, 0.02, seconds=9.9)["a"][0].distance == 3.0
    assert at_equal_kl(points, 0.02, seconds=10)["a"][0].distance == 1.0


def test_without_a_retrained_model_the_highest_loss_is_taken() -> None:
    points = [no_target(point("a", 0, 0.01, distance)) for distance in (3.0, 1.0, 2.0)]
    assert at_equal_kl(points, 0.02)["a"] == [points[1]]


def test_forgetting_more_than_the_retrained_model_is_no_better() -> None:
    near, beyond = point("a", 0, 0.01, 0.5), replace(point("a", 0, 0.01, 2.0), forget_nll=50.0)
    assert at_equal_kl([beyond, near], 0.02)["a"] == [near]


def of(points: Sequence[Point], **changes: Any) -> Sweep:
    runs = [Run(p.method, p.strength, p.seed, {}, [point(p.method, p.seed, 0.0, 9.0, seconds=0, step=0), p])
            for p in points]  # fmt: skip
    target = {"forget_nll": 8.0, "retain_kl": 0.02, "retain_nll": 1.0, "others": {}}
    return replace(Sweep("made by hand", OPTIONS, runs, [target, target]), **changes)


def test_the_sentences_say_who_wins_and_where_k_fade_is_behind() -> None:
    wins = of([point("kfade", 0, 0.01, 1.0), point("kfade", 1, 0.01, 2.0), point("npo", 0, 0.01, 3.0),
               point("npo", 1, 0.01, 1.9), point("wga", 0, 0.01, 7.0), point("wga", 1, 0.01, 7.0)])  # fmt: skip
    assert verdict(wins, 0.01) == (
        "Within a retain KL of 0.01, K-FADE is best: 1.5 ± 0.71 nats a token from the retrained model."
        " K-FADE is 0.95 ahead of the best baseline, NPO (2.45 ± 0.78): better in 1 of 2 seeds."
    )
    loses = of([point("kfade", 0, 0.01, 2.0), point("kfade_published", 0, 0.01, 4.0),
                point("npo", 0, 0.01, 3.0), point("wga", 0, 0.01, 1.5)])  # fmt: skip
    assert verdict(loses, 0.01) == (
        "Within a retain KL of 0.01, WGA is best: 1.5 nats a token from the retrained model."
        " K-FADE (2) is 0.5 behind the best baseline, WGA: better in 0 of 1 seed."
        " K-FADE as published (4) is 2.5 behind the best baseline, WGA: better in 0 of 1 seed."
    )
    no_aim = verdict(of([no_target(r.points[1]) for r in loses.runs], retrained=[]), 0.01)
    assert "is best: " in no_aim and "nats a token of forget NLL" in no_aim
    variants = of([point("kfade", 0, 0.01, 1.0), point("10 steps", 0, 0.01, 2.0)], variants=True)
    assert "K-FADE is 1 ahead of the best variant, 10 steps (2): better in 1 of 1 seed." in verdict(variants, 0.01)
    nothing = of([point("kfade", 0, 0.1, 1.0), point("npo", 0, 0.01, 10.0)])
    assert verdict(nothing, 0.01) == (
        "Within a retain KL of 0.01, nothing is better than the original model: 9 nats a token from the retrained"
        " model."
    )


def test_equal_time_is_that_of_the_better_k_fade() -> None:
    points = [point("kfade_published", 0, 0.01, 4.0, seconds=9),
              point("kfade", 0, 0.01, 2.0, seconds=3),
              point("npo", 0, 0.01, 1.0, seconds=1)]  # fmt: skip
    assert our_seconds(at_equal_kl(points, 0.02)) == 3
    assert our_seconds(at_equal_kl(points[:1], 0.02)) == 9
    assert our_seconds(at_equal_kl(points[2:], 0.02)) == math.inf


# ---- what is run


def test_every_method_has_the_same_number_of_tries() -> None:
    model = models.tiny("llama")
    # Each is a step of its own.
    forget = [{"input_ids": torch.ones(1, 257, dtype=torch.int64)} for _ in range(3)]
    found = {name: tries(name, model, forget, OPTIONS) for name in compare.NAMES}
    assert {len(configs) for configs in found.values()} == {2}
    assert all(c.steps == 1 for c in found["kfade_published"] if isinstance(c, UnlearnConfig))
    # Two passes over three batches.
    assert all(c.steps == 6 for c in found["kfade"] if isinstance(c, UnlearnConfig))
    budgets = [c.kl_budget for c in found["kfade"] if isinstance(c, UnlearnConfig)]
    assert budgets == pytest.approx([0.0075, 0.075])
    assert len(tries("kfade", model, forget, replace(OPTIONS, budgets=(0.01,)))) == 1  # the same again tells nothing
    for name, configs in found.items():
        for config, rate in zip(configs, (1e-3, 1e-2), strict=True):
            if isinstance(config, BaselineConfig):
                assert (config.learning_rate, config.epochs) == (rate, 2), name
    rmu = found["rmu"][0]
    assert isinstance(rmu, BaselineConfig) and rmu.layer == 0  # of two layers; layer 7 is not there


@pytest.fixture(scope="module")
def task() -> Task:
    model, retrained = models.tiny("llama"), models.tiny("llama", scale=0.3)
    forget, retain, held = ([models.batch(seed=seed, sequences=10)] for seed in (1, 2, 3))
    yardstick = Yardstick(model, forget, held, {"text": [models.batch("none", seed=4)]})
    yardstick.aim(retrained)
    return Task("tiny", model, forget, retain, yardstick, lambda m: {"values": {"weight": float(weight(m))}})


def weight(model: Any) -> Any:
    return model.model.layers[0].mlp.down_proj.weight.detach().abs().sum()


def test_points_are_what_other_measurements_say(task: Task) -> None:
    retrained = models.tiny("llama", scale=0.3)
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    config = BaselineConfig(method="npo", learning_rate=1e-2, epochs=3, warmup=0)
    found = runs.run(task, "npo", config, 1, OPTIONS)
    assert all(torch.equal(p, before[n]) for n, p in task.model.named_parameters())
    assert [p.step for p in found.points] == [0, 1, 2, 3]
    assert found.points[0].retain_kl == 0.0
    assert (found.seed, found.config["seed"]) == (1, 1)
    # The last point, from the update that the method itself returns.
    update = runs.run_baseline(task.model, task.forget, task.retain, replace(config, seed=1))
    update.apply_(task.model)
    last, forget, held = found.points[-1], task.yardstick.forget, task.yardstick.held
    expected = {
        "forget_nll": scores(task.model, forget).nll,
        "forget_kl_retrained": scores(task.model, forget, references(retrained, forget)).kl,
        "retain_kl_retrained": scores(task.model, held, references(retrained, held)).kl,
    }
    update.remove_(task.model)
    expected["retain_kl"] = scores_of_update(task, update, held)
    for name, value in expected.items():
        assert getattr(last, name) == pytest.approx(value, rel=1e-9), name  # float64; weights are re-added
    assert last.others["text"] > 0
    assert last.tokens == 3 * sum(int(b["attention_mask"].sum()) for b in (*task.forget, *task.retain)) + sum(
        int(b["attention_mask"].sum()) for b in task.forget
    )  # three pairs, and NPO's reference once


def scores_of_update(task: Task, update: Any, held: Any) -> float:
    reference = references(task.model, held)
    update.apply_(task.model)
    found = scores(task.model, held, reference).kl
    update.remove_(task.model)
    assert found is not None
    return found


@pytest.mark.parametrize("name", compare.NAMES)
def test_every_method_leaves_points_and_the_model(name: str, task: Task) -> None:
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    found = runs.run(task, name, tries(name, task.model, task.forget, OPTIONS)[0], 0, OPTIONS)
    assert all(torch.equal(p, before[n]) for n, p in task.model.named_parameters())
    assert found.points[0].step == 0 and len(found.points) > 1
    assert all(p.tokens > 0 and p.seconds > 0 for p in found.points[1:])
    assert json.dumps(found.to_json(), allow_nan=False)


def test_the_best_model_within_a_budget_is_inspected(task: Task) -> None:
    config = BaselineConfig(method="gradient_ascent", learning_rate=1e-4, epochs=3, warmup=0, schedule="constant")
    found = runs.run(task, "gradient_ascent", config, 0, OPTIONS)
    best = at_equal_kl(found.points, 0.1)["gradient_ascent"][0]
    assert best.step > 0
    seen = found.details["0.1"]["values"]["weight"]
    steps: list[tuple[int, float]] = []
    runs.run_baseline(
        task.model, task.forget, task.retain, config, every=1,
        observe=lambda step, _: steps.append((step, float(weight(task.model)))),
    )  # fmt: skip
    assert dict(steps)[best.step] == seen
    beaten = runs.run(task, "gradient_ascent", config, 0, OPTIONS, beat=dict.fromkeys(BUDGETS, -1.0))
    assert beaten.details == {}


def test_a_ruined_run_and_one_at_its_time_end_early(task: Task) -> None:
    config = BaselineConfig(method="gradient_ascent", learning_rate=0.5, epochs=200, warmup=0, schedule="constant")
    found = runs.run(task, "gradient_ascent", config, 0, OPTIONS)
    assert found.points[-1].step < 200
    assert "the retain KL is" in found.warnings[-1]
    found = runs.run(task, "gradient_ascent", config, 0, replace(OPTIONS, seconds=1e-9))
    assert [p.step for p in found.points] == [0]
    assert "limit of 1e-09 seconds" in found.warnings[-1]


# ---- going on after an interruption


def test_a_sweep_goes_on_where_it_was_interrupted(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {name: tries(name, task.model, task.forget, OPTIONS) for name in ("gradient_ascent", "npo")}
    whole = compare.sweep(task, methods, OPTIONS, tmp_path / "whole")
    started: list[tuple[str, int]] = []
    original = runs.run

    def until(stop: int) -> Any:
        def run(task: Task, label: str, config: Any, seed: int, *args: Any, **kwargs: Any) -> Run:
            if len(started) == stop:
                raise KeyboardInterrupt
            started.append((label, seed))
            return original(task, label, config, seed, *args, **kwargs)

        return run

    monkeypatch.setattr(runs, "run", until(5))
    with pytest.raises(KeyboardInterrupt):
        compare.sweep(task, methods, OPTIONS, tmp_path / "cut")
    files = sorted((tmp_path / "cut").iterdir())
    assert len(files) == 5 and all(f.suffix == ".json" for f in files)
    # One file is cut in half, and one is of another program.
    files[0].write_text(files[0].read_text()[: files[0].stat().st_size // 2])
    files[1].write_text('{"format": "something"}')
    monkeypatch.setattr(runs, "run", until(100))
    again = compare.sweep(task, methods, OPTIONS, tmp_path / "cut")
    assert len(started) == 5 + 3 + 2
    # Same inputs, same bits; only the clock differs.
    assert [[replace(p, seconds=0.0) for p in r.points] for r in again] == [
        [replace(p, seconds=0.0) for p in r.points] for r in whole
    ]
    assert [r.details for r in again] == [r.details for r in whole]
    # Another allowance is another run.
    compare.sweep_method(task, "npo", methods["npo"], 0, replace(OPTIONS, budgets=(0.2,)), tmp_path / "cut")
    assert len(started) == 12


# ---- the page


def checked(page: str) -> None:
    """No NaN, and nothing that a browser would fetch."""
    assert not re.search(r"\bnan\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL), re.IGNORECASE)
    assert "http" not in page and "<script" not in page and " src=" not in page
    assert not [href for href in re.findall(r'href="([^"]*)"', page) if not href.startswith("#")]


def test_the_page_fetches_nothing_and_escapes_all(tmp_path: Path) -> None:
    points = [point(m, seed, 10.0**-k, 1.0 + k + 0.1 * seed, seconds=2.0 / k) for m in ("kfade", "npo", "<b>")
              for seed in (0, 1) for k in (1, 2, 3)]  # fmt: skip
    details = {"0.1": {"values": {"utility": 0.5}, "replies": ["<i>yes</i>"]}}
    made = of(points, questions=["who?"], replies={"original": ["<u>me</u>"]})
    made = replace(made, runs=[replace(run, details=details, warnings=["<s>"]) for run in made.runs])
    page = report.write(tmp_path, "title", "lead", [made]).read_text(encoding="utf-8")
    checked(page)
    assert page.count("<svg") == 3
    for text in ("<b>", "<i>", "<u>", "<s>"):
        assert text not in page
    assert "the same in K-FADE&#x27;s time" in page
    rows = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert len(rows) == len(made.points)
    assert {row["task"] for row in (*rows, *made.rows())} == {"made by hand"}
    same = report.write(tmp_path / "again", "title", "lead", [made]).read_text(encoding="utf-8")
    assert same == page
    report.write(tmp_path / "two", "title", "lead", [made, replace(made, name="another")])
    tasks = [row["task"] for row in csv.DictReader((tmp_path / "two" / "points.csv").open())]
    assert tasks == ["made by hand"] * len(made.points) + ["another"] * len(made.points)


def test_a_page_without_a_retrained_model_and_with_one_run(tmp_path: Path) -> None:
    made = of([no_target(point("npo", 0, 0.05, 3.0))], retrained=[])
    made = replace(made, runs=[replace(r, points=[no_target(p) for p in r.points]) for r in made.runs])
    page = report.write(tmp_path, "title", "lead", [made]).read_text(encoding="utf-8")
    checked(page)
    assert "KL to retrained" not in page


# ---- the command


@pytest.mark.slow  # three models are loaded, six runs made
def test_the_command_compares_and_continues(tmp_path: Path, compare_home: Path) -> None:
    home = compare_home
    arguments = [
        "compare", "--model", home / "model", "--retrained", home / "retrained", "--forget", home / "forget.jsonl",
        "--retain", home / "retain.jsonl", "--text", home / "retain.jsonl", "--methods", "kfade,undial_kl",
        "--methods", "npo", "--budgets", "0.05,0.5", "--learning-rates", "1e-3", "--seeds", "2", "--epochs", "1",
        "--out", tmp_path, "--max-new-tokens", "4",
    ]  # fmt: skip
    first = CliRunner().invoke(app, [str(a) for a in [*arguments, "--json", "--quiet"]])
    assert first.exit_code == 0, first.output
    values = json.loads(first.stdout)
    assert {run["method"] for run in values["runs"]} == {"kfade", "undial_kl", "npo"}
    assert len(values["runs"]) == 6
    assert values["retrained"][0]["retain_kl"] > 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    checked(page)
    assert "Replies" in page
    assert read_json(next((tmp_path / "runs").iterdir()))["points"][0]["retain_kl"] == 0.0
    again = CliRunner().invoke(app, [str(a) for a in [*arguments[:-4], "--out", tmp_path, "--max-new-tokens", "4"]])
    assert again.exit_code == 0, again.output
    assert again.stderr.count("finished before") == 6
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


@pytest.fixture(scope="module")
def compare_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models with one tokenizer, and questions."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from kfade.demo import DATA

    folder = tmp_path_factory.mktemp("compare")
    inner = Tokenizer(BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    forget, retain = read_jsonl(DATA / "forget.jsonl")[:6], read_jsonl(DATA / "retain.jsonl")[:15]
    texts = (f"Question: {r.prompt}\nAnswer: {r.response}" for r in [*forget, *retain])
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    for seed, name in enumerate(("model", "retrained")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, records in (("forget", forget), ("retain", retain)):
        lines = "".join(json.dumps(dict(r.fields)) + "\n" for r in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "npo,magic"], "methods has 'magic'; it must have names among kfade"),
        (["--budgets", "0.1,lots"], "--budgets is 0.1, lots; it must be numbers with commas between them"),
        (["--budgets", "0"], "budgets is 0.0; it must be greater than 0"),
        (["--learning-rates", ","], "--learning-rates is empty; it must have at least one value"),
        (["--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["--epochs", "0"], "epochs is 0.0; it must be greater than 0"),
        (["--seconds", "-1"], "seconds is -1.0; it must be greater than 0"),
        (["--holdout", "1"], "holdout is 1.0; it must be below 1"),
        (["--loss-on", "none"], "loss_on is 'none'"),
    ],
)
def test_errors_name_the_option(arguments: list[str], message: str, tmp_path: Path, compare_home: Path) -> None:
    common = ["--model", compare_home / "model", "--forget", compare_home / "forget.jsonl", "--retain",
              compare_home / "retain.jsonl", "--out", tmp_path / "out"]  # fmt: skip
    found = CliRunner().invoke(app, ["compare", *(str(a) for a in common), *arguments])
    assert found.exit_code == 2
    assert message in found.output
    assert not (tmp_path / "out").exists()


def test_a_method_twice_and_an_infinite_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"methods is .* none twice"):
        CompareConfig(methods=("npo", "npo"))
    with pytest.raises(TypeError, match=r"budgets is .* it must be a tuple of numbers"):
        CompareConfig(budgets=[0.1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budgets is inf; it must be finite"):
        CompareConfig(budgets=(math.inf,))


def test_the_examples_of_the_page_run() -> None:
    run_examples("comparing.md")
