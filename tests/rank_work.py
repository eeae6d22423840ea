"""What ranks do in tests: functions of a module that their processes can import."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import oracles
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from typer.testing import CliRunner

import kfade
from kfade import Curvature, FitConfig, UnlearnConfig, decomposition, journal, ranks, resume, storage
from kfade.cli import app
from kfade.errors import RankError
from kfade.loss import Head
from kfade.progress import return_freed_memory
from kfade.sharding import load_shards, reshard, whole
from kfade.storage import tensors_sha256

CASES = {
    "ekfac": FitConfig(modules="all-linear"),
    "kfac": FitConfig(modules="all-linear", curvature="kfac"),
    "diagonal": FitConfig(modules="all-linear", curvature="diagonal"),
    "identity": FitConfig(modules="all-linear", curvature="identity"),
    "passes": FitConfig(modules="all-linear", layers_per_pass=3, samples=2),
    "low rank": FitConfig(modules="all-linear", rank=4),
    "blocks": FitConfig(modules="all-linear", max_factor_order=9),
    "empirical": FitConfig(modules="mlp", fisher="empirical"),
    "one pass": FitConfig(modules="mlp", basis_share=0.5),
    "cholesky": FitConfig(modules="all-linear", curvature="kfac", decomposition="cholesky", layers_per_pass=5),
}
# In float64 the order of a sum changes its last bits, and eigenvectors by those over the gaps of the spectrum.
ROUNDING = 1e-11
# Of these, with a basis that was fitted on other batches.
WITH_BASIS = ("ekfac", "passes", "low rank", "blocks")


def batches() -> list[models.Batch]:
    """Of three lengths and paddings, so that two ranks have unlike shares and the fourth of four has none."""
    shapes = (("none", 4, 9), ("right", 3, 12), ("left", 2, 7))
    return [models.batch(p, sequences=s, tokens=t, seed=i) for i, (p, s, t) in enumerate(shapes)]


def values_of(state: kfade.LayerCurvature) -> dict[str, Tensor]:
    """What a fit measures of a layer. Signs of eigenvectors, and bases of multiple eigenvalues, are nobody's."""
    values = {name: getattr(state, name) for name in ("lambda_in", "lambda_out", "lambda_sum")}
    for name, total in (("A", state.a_sum), ("S", state.s_sum)):
        values[name] = None if total is None else total.to_dense()
    return {name: value for name, value in values.items() if value is not None}


def require_close(found: Curvature, truth: Curvature, tolerance: float = ROUNDING) -> None:
    assert list(found) == list(truth)
    for name, state in truth.items():
        here, there = values_of(found[name]), values_of(state)
        assert here.keys() == there.keys()
        assert (found[name].positions, found[name].losses) == (state.positions, state.losses)
        assert found[name].lambda_losses == state.lambda_losses
        for key, value in there.items():
            oracles.assert_close(here[key], value, tolerance, f"{key} of {name}")


def fit_and_save(group: ProcessGroup, folder: Path, kind: str = "llama", names: tuple[str, ...] = tuple(CASES)) -> Any:
    told = {}
    for name in names:
        fitted = kfade.fit(models.tiny(kind), batches(), CASES[name], group=group)
        fitted.save(folder / name)
        told[name] = list(fitted.layers)
    return told


def fit_with_basis(group: ProcessGroup, folder: Path) -> None:
    """From a basis that each rank has whole."""
    model = models.tiny("llama")
    for name in WITH_BASIS:
        basis = kfade.fit(model, batches()[:2], CASES[name])
        kfade.fit(model, batches(), CASES[name], group=group, basis=basis).save(folder / name)


def unlike_bases(group: ProcessGroup) -> None:
    """A fit that rank 1 is given another basis for."""
    model = models.tiny("llama")
    basis = kfade.fit(model, batches()[: 1 + group.rank()], CASES["ekfac"])
    kfade.fit(model, batches(), CASES["ekfac"], group=group, basis=basis)


def look_around(group: ProcessGroup) -> dict[str, Any]:
    """What a rank can do with its part of a curvature, and how the rest is refused."""
    model, config = models.tiny("llama"), CASES["ekfac"]
    one = kfade.fit(model, batches(), config)
    fitted = kfade.fit(model, batches(), config, group=group)
    gradients = {name: torch.randn(s.d_out, s.width_in, dtype=torch.float64) for name, s in one.items()}
    other = next(name for name in one if name not in fitted.layers)
    told: dict[str, Any] = {"held": set(fitted), "all": set(fitted.owners), "factor": ""}
    told["missing"] = message(lambda: fitted[other])
    told["solve"] = message(lambda: fitted.solve(gradients))
    own = {name: gradients[name] for name in fitted}
    here, there = (c.solve_matrices(own, 0.1, "relative") for c in (fitted, one))
    told["solved"] = max(float((here[n] - there[n]).norm() / there[n].norm()) for n in own)
    for state in fitted.values():
        if state.a_sum is None:
            told["factor"] = message(state.input_factor)
    return told


def message(action: Callable[[], Any]) -> str:
    """Of the error that an action raises; empty if it raises none."""
    try:
        action()
    except Exception as error:
        return str(error)
    return ""


def fingerprint(group: ProcessGroup) -> float:
    """The values of all tensors of a rank, in float32."""
    fitted = kfade.fit(models.tiny("llama", torch.float32), batches(), CASES["ekfac"], group=group)
    tensors = [t for s in fitted.values() for t in (s.q_in, s.q_out, s.lambda_sum, s.lambda_in) if t is not None]
    return [t.double().sum().item() for t in tensors]  # type: ignore[return-value]


def unlike(group: ProcessGroup, what: str) -> None:
    """A fit that rank 1 is given something else for."""
    odd = group.rank() == 1
    model, data = models.tiny("llama"), batches()
    if what == "batches" and odd:
        data = data[:2]
    if what == "weights" and odd:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-12
    kfade.fit(model, data, FitConfig(seed=int(what == "options" and odd)), group=group)


def fit_into(group: ProcessGroup, folder: Path) -> None:
    kfade.fit(models.tiny("llama"), batches(), store=folder, group=group)


def fit_saved(
    group: ProcessGroup, folder: Path, name: str, rank: int, fatal: int, how: str, model: str = "plain"
) -> int | RankError:
    """A fit that saves itself; `rank` ends at its event of this number. How many events there were, or the error."""
    ranks.BEAT_SECONDS, ranks.SILENT_SECONDS, resume.CHECKPOINT_SHARE = 0.2, 4.0, 1e9
    events = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal events
            events += 1
            if events == fatal and group.rank() == rank:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError
            return function(*arguments, **named)

        return call

    storage.save_file, storage.sync = watched(storage.save_file), watched(storage.sync)
    journal.sync, Head.sampled = storage.sync, watched(Head.sampled)  # type: ignore[method-assign]
    decomposition.decompose = watched(decomposition.decompose)
    decomposition.decompose_sketch = watched(decomposition.decompose_sketch)
    try:
        fitted = wrapped(model, models.tiny("llama"), group)
        kfade.fit(fitted, batches(), replace(CASES[name], checkpoint_seconds=0), store=folder, group=group)
    except RankError as error:
        return error
    return events


def fit_interrupted(
    group: ProcessGroup,
    folder: Path,
    name: str,
    count: int,
    rank: int,
    when: str,
    number: int,
    who: str,
    model: str = "plain",
) -> dict[str, Any]:
    """A fit on `count` batches that gets SIGINT at a moment of `rank`, beside which all others are slow or fast.

    Args:
        group: of the ranks.
        folder: in which the fit saves itself.
        name: of its options.
        count: of batches.
        rank: whose moment it is.
        when: `sampled` or `decompose`, of which the `number`-th call is meant; or `meeting`, when it waits for others.
        number: see above.
        who: `all` ranks get the signal, as from a launcher, this `one` alone, or this one `twice`.
        model: how it is wrapped.

    Returns:
        The error, the stages of the last pass and how many batches of it were added, the stages that were put, and how
        many factors were decomposed.
    """
    ranks.BEAT_SECONDS, ranks.SILENT_SECONDS, resume.CHECKPOINT_SHARE = 0.05, 4.0, 1e9
    signal.signal(signal.SIGINT, signal.default_int_handler)
    processes: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(processes, os.getpid(), group=group)
    told: dict[str, Any] = {"stages": [], "batches": 0, "put": [], "factors": 0, "error": None}
    calls = {"sampled": 0, "decompose": 0, "meeting": 0}

    def reach(what: str) -> None:
        calls[what] += 1
        if group.rank() == rank and (what, calls[what]) == (when, number):
            for process in processes if who == "all" else [os.getpid()] * (1 + (who == "twice")):
                os.kill(process, signal.SIGINT)
        elif group.rank() != rank and when == "meeting" and what == "sampled":
            time.sleep(0.5)

    watch, put, meet = resume.FitStore.watch, resume.FitStore.put, resume.FitStore._meet
    sampled, decompose = Head.sampled, decomposition.decompose

    def counted(self: Any, rest: Any) -> Any:
        told["stages"], told["batches"] = list(self._stages), self._begun
        for batch in watch(self, rest):
            yield batch
            told["batches"] += 1

    def noted(self: Any, states: Any, stages: Any) -> None:
        told["put"].append(list(stages))
        put(self, states, stages)

    def reached(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            reach(what)
            found = function(*arguments, **named)
            told["factors"] += what == "decompose"
            return found

        return call

    resume.FitStore.watch, resume.FitStore.put = counted, noted  # type: ignore[method-assign]
    resume.FitStore._meet = reached("meeting", meet)  # type: ignore[method-assign]
    Head.sampled, decomposition.decompose = reached("sampled", sampled), reached("decompose", decompose)  # type: ignore[method-assign]
    options = replace(CASES[name], checkpoint_seconds=600)
    try:
        fitted = wrapped(model, models.tiny("llama"), group)
        kfade.fit(fitted, batches()[:count], options, store=folder, group=group)
    except KeyboardInterrupt as error:
        told["error"] = error
    return told


def go_on(group: ProcessGroup, folder: Path, name: str, count: int, model: str = "plain") -> None:
    kfade.fit(wrapped(model, models.tiny("llama"), group), batches()[:count], CASES[name], store=folder, group=group)


def fail(group: ProcessGroup, when: str, how: str) -> Any:
    """A fit in which rank 1 ends; the others say what they raise and after how many seconds."""
    ranks.BEAT_SECONDS, ranks.SILENT_SECONDS = 0.2, 4.0
    model, begin = wrapped("fsdp" if when == "sharded" else "plain", models.tiny("llama"), group), time.monotonic()
    if group.rank() == 1:
        _end_at(model, when, how)
    try:
        kfade.fit(model, batches(), CASES["ekfac"], group=group)
    except RankError as error:
        return error, time.monotonic() - begin


def _end_at(model: nn.Module, when: str, how: str) -> None:
    """Let this process end at a point of a fit."""

    def end(*_: Any, **__: Any) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("in the midst of it")

    if when in ("forward", "sharded"):
        model.model.layers[1].register_full_backward_hook(end)  # type: ignore[union-attr, index]
    elif when == "decomposition":
        torch.linalg.eigh = end
    else:
        ranks.dist.reduce = end


def wrapped(how: str, model: Any, group: ProcessGroup) -> Any:
    """A model as it is, in DDP, or sharded by FSDP2: its blocks and the rest, the blocks alone, or all at once."""
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (group.size(),))
    if how in ("blocks", "fsdp"):
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
    if how in ("fsdp", "root"):
        fully_shard(model, mesh=mesh)
    return model


def fit_wrapped(group: ProcessGroup, folder: Path, how: str, name: str) -> dict[str, Any]:
    """A fit of a wrapped model, saved; and what was found afterwards of its parameters and hooks."""
    model = wrapped(how, models.tiny("llama"), group)
    kfade.fit(model, batches(), CASES[name], group=group).save(folder / f"{how} {name}")
    reshard(model)
    named = {n.removeprefix("module."): whole(p.detach()) for n, p in model.named_parameters()}
    same = all(torch.equal(named[n], p) for n, p in models.tiny("llama").named_parameters())
    trainable = all(p.requires_grad and p.grad is None for p in model.parameters())
    return {"weights": same, "flags": trainable}


def forget_and_retain() -> tuple[list[models.Batch], list[models.Batch]]:
    """Three batches to forget and five to keep, of unlike lengths."""
    return batches(), [models.batch("right", tokens=8 + i, seed=10 + i) for i in range(5)]


UNLEARNING = {
    "one step": UnlearnConfig.published(kl_budget=0.01, holdout=0.3, fit=CASES["ekfac"]),
    "steps": UnlearnConfig(steps=3, refit_every=2, holdout=0.3),
    "npo": UnlearnConfig.published(
        objective="npo", steps=2, kl_budget=None, step_size=1e-3, holdout=0.3, retain_weight=1.0
    ),
    "cholesky": UnlearnConfig.published(kl_budget=0.01, holdout=0.3, fit=CASES["cholesky"]),
    "cg": UnlearnConfig.published(kl_budget=0.01, holdout=0.3, fit=CASES["ekfac"], cg_iterations=3),
}


def unlearn_wrapped(group: ProcessGroup, folder: Path, how: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Updates of a wrapped model, applied to it, saved, removed, and applied as loaded."""
    told = {}
    for name in names:
        model = wrapped(how, models.tiny("llama"), group)
        update = kfade.unlearn(model, *forget_and_retain(), UNLEARNING[name], group=group)
        update.apply_(model)
        applied = digest(model)
        norm, file = update.norm(), folder / f"{how} {name}.safetensors"
        if how != "plain" or group.rank() == 0:
            update.save(file)
        torch.distributed.barrier(group)
        update.remove_(model)
        removed = digest(model)
        kfade.Update.load(file).apply_(model)
        told[name] = {"applied": applied, "removed": removed, "loaded": digest(model), "norm": norm}
        told[name]["outcome"] = measured(update)
    return told


def unlearn_stored(group: ProcessGroup, folder: Path, name: str) -> None:
    """The update of a sharded model whose fit saves itself."""
    model = wrapped("fsdp", models.tiny("llama"), group)
    update = kfade.unlearn(model, *forget_and_retain(), UNLEARNING["one step"], store=folder / "s", group=group)
    update.save(folder / name)


def measured(update: kfade.Update) -> tuple[float, ...]:
    """What the run that made an update ended with."""
    end = update.report.outcome
    return end.scale, end.measured_kl, end.predicted_kl, end.forget_nll, end.retain_nll


def digest(model: nn.Module) -> str:
    """Of all bits of a model's weights."""
    reshard(model)
    state = {n.removeprefix("module."): whole(p.detach()) for n, p in model.named_parameters()}
    return tensors_sha256([state])


def refused(group: ProcessGroup) -> list[str]:
    """The errors of what a group cannot do."""
    data, sharded = forget_and_retain(), wrapped("fsdp", models.tiny("llama"), group)
    half = torch.distributed.new_group([0])
    plain, cg = models.tiny("llama"), UnlearnConfig.published(cg_iterations=2)
    found = [
        message(lambda: kfade.unlearn(sharded, *data, cg, group=group)),
        message(lambda: kfade.fit(sharded, batches())),
        message(lambda: kfade.fit(sharded, batches(), FitConfig(device_memory=1.0), group=group)),
        message(lambda: kfade.fit(plain, batches(), group=group, basis=kfade.fit(plain, batches(), group=group))),
    ]
    if group.rank() == 0:
        found.append(message(lambda: kfade.fit(sharded, batches(), group=half)))
    return found


def command(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command line; exit code, standard output and standard error."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def interrupted_command(arguments: list[str], rank: int) -> tuple[int, str, str]:
    """The same, of which one rank gets SIGINT in its first batch."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sampled = Head.sampled

    def interrupting(*given: Any, **named: Any) -> Any:
        Head.sampled = sampled  # type: ignore[method-assign]
        if int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGINT)
        return sampled(*given, **named)

    Head.sampled = interrupting  # type: ignore[method-assign]
    return command(arguments)


def large_config() -> LlamaConfig:
    """A model of 303 MB in float32, nearly all of it in blocks of 9 MB."""
    return LlamaConfig(
        vocab_size=256, hidden_size=384, intermediate_size=1536, num_hidden_layers=32, num_attention_heads=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip


LARGE = UnlearnConfig.published(
    kl_budget=None, step_size=0.01, holdout=0.4, fit=FitConfig(modules=r"layers\.(0|31)\.self_attn\.o_proj$")
)


def large_data() -> tuple[list[models.Batch], list[models.Batch]]:
    """Forget and retain set of the large model."""
    return [models.batch(seed=i) for i in range(2)], [models.batch(seed=10 + i) for i in range(4)]


def save_in_parts(model: nn.Module, folder: Path) -> None:
    """A file a block, as large checkpoints come; the limit counts a file that is mapped."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = tensor
    for name, tensors in parts.items():
        save_file(tensors, folder / f"model-{name}.safetensors")


def data_bytes() -> int:
    """Private writable memory of this process, which is what `RLIMIT_DATA` limits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData:")) * 1024


def unlearn_within(group: ProcessGroup, folder: Path, room: int) -> dict[str, Any]:
    """Unlearning of a model from `folder` by a process that may take so many bytes beyond what it has at the start."""
    mesh = init_device_mesh("cpu", (group.size(),))
    # What libraries import and keep at their first use is not the model's.
    kfade.unlearn(wrapped("fsdp", models.tiny("llama"), group), *large_data(), UNLEARNING["npo"], group=group)
    # Of freed blocks that glibc keeps, as many as the model has bytes; how many depends on the order of threads.
    return_freed_memory(1 << 17)
    limit = data_bytes() + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    whole_model = message(lambda: torch.empty(75_000_000))
    with torch.device("meta"):
        model = LlamaForCausalLM(large_config()).eval()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    # No file has what is computed when a model is built.
    model.model.rotary_emb = LlamaRotaryEmbedding(large_config())
    load_shards(model, folder)
    update = kfade.unlearn(model, *large_data(), LARGE, group=group)
    update.save(folder / "update")
    return {"whole": whole_model, "outcome": measured(update), "limit": resource.getrlimit(resource.RLIMIT_DATA)[0]}


def misread(group: ProcessGroup, folder: Path) -> list[str]:
    """The errors of files that are not those of a model."""
    model = wrapped("fsdp", models.tiny("llama"), group)
    found = [message(lambda: load_shards(model, folder / "none"))]
    before = digest(model)
    found.append(message(lambda: load_shards(model, folder / "other")))
    load_shards(model, folder / "same")
    return [*found, before, digest(model)]
