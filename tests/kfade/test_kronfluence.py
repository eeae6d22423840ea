"""The same kronfluence script with and without `accelerate()`: what it gives, what it writes, what stays its own."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, batch, loss_positions, tiny
from oracles import Sizes, assert_close, outer_sum, relative
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset

import kfade
from kfade import StorageError
from kfade.integrations import UnsupportedPeerError
from kfade.integrations import kronfluence as integration
from kfade.integrations.kronfluence import accelerate, covariances, eigenvalues, eigenvectors, inputs, peer
from kfade.integrations.kronfluence import scores as score_stage
from kfade.integrations.kronfluence_files import export_factors, import_factors

kronfluence = pytest.importorskip("kronfluence")
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model  # noqa: E402
from kronfluence.factor import covariance, eigen  # noqa: E402
from kronfluence.utils.state import State  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Sums of a hundred float32 products taken in another order.
SUMS = 1e-5
# Λ squares a gradient, and is measured in float32 eigenvectors.
CORRECTED = 1e-4
STRATEGIES = ["identity", "diagonal", "kfac", "ekfac"]
PAGE = Path(__file__).parents[2] / "docs" / "kronfluence.md"
COVARIANCES = ("activation_covariance", "gradient_covariance")
DTYPES = ("activation_covariance_dtype", "gradient_covariance_dtype", "per_sample_gradient_dtype", "lambda_dtype")
COUNTS = ("num_activation_covariance_processed", "num_gradient_covariance_processed")


@pytest.fixture(autouse=True)
def _no_acceleration_is_left() -> Iterator[None]:
    yield
    if integration._active is not None:
        integration._active.undo()
        raise AssertionError("the test left kronfluence accelerated")


@pytest.fixture(autouse=True, scope="module")
def _a_light_heap() -> Iterator[None]:
    """kronfluence collects garbage several times a stage, which a test process full of objects makes slow."""
    gc.freeze()
    yield
    gc.unfreeze()


# ------------------------------------------------------------------------------------ unchanged scripts


class Rows(Dataset[Any]):
    """Rows of tensors, as a data loader wants them."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class LanguageModelling(Task):
    """Next-token loss; `scale` multiplies it, as an AMP loss scaler does."""

    def __init__(self, modules: list[str] | None = None, scale: float = 1.0) -> None:
        self.modules, self.scale = modules, scale

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        mask = batch["attention_mask"]
        logits = model(input_ids=batch["input_ids"], attention_mask=(mask != 0).long()).logits[:, :-1]
        labels = batch["labels"][:, 1:].reshape(-1)
        logits = logits.reshape(-1, VOCABULARY)
        if sample:
            drawn = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            labels = torch.where(labels == -100, labels, drawn)
        return self.scale * nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str] | None:
        return self.modules

    def get_attention_mask(self, batch: Any) -> Tensor:
        return batch["attention_mask"]


class Classification(Task):
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(batch["x"])
        labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten() if sample else batch["y"]
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


class ProcessedGradients(Classification):
    enable_post_process_per_sample_gradient = True

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.1, 0.1)


def texts(sequences: int = 24, tokens: int = 11) -> Rows:
    """Sequences padded to the right and to the left, some with a prompt without loss."""
    parts = [batch(padding, 4, tokens, seed) for seed, padding in enumerate(["right", "left"] * (sequences // 8))]
    return Rows(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def images(number: int = 60) -> Rows:
    generator = torch.Generator().manual_seed(3)
    return Rows(
        x=torch.randn(number, 2, 6, 6, generator=generator), y=torch.randint(0, 5, (number,), generator=generator)
    )


def classifier() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(72, 20), nn.ReLU(inplace=True), nn.Linear(20, 12, bias=False), nn.Tanh(),
        nn.Linear(12, 5),
    )  # fmt: skip


def convolutional() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False), nn.Flatten(), nn.Linear(48, 5)
    )


Made = tuple[Callable[[], nn.Module], Callable[[], Task], Callable[[], Rows]]
CASES: dict[str, Made] = {
    "llama": (lambda: tiny("llama", torch.float32), LanguageModelling, texts),
    "llama MLP": (
        lambda: tiny("llama", torch.float32, mlp_bias=False),
        lambda: LanguageModelling([f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("gate", "up", "down")]),
        texts,
    ),
    "classifier": (classifier, Classification, images),
}


class Script:
    """What a user's script does; nothing in it knows of kfade."""

    def __init__(self, case: str | Made, folder: Path, **arguments: Any) -> None:
        make_model, make_task, make_data = CASES[case] if isinstance(case, str) else case
        self.data, task = make_data(), make_task()
        self.model = prepare_model(make_model(), task)
        self.analyzer = Analyzer(
            analysis_name="run", model=self.model, task=task, cpu=True, disable_tqdm=True, output_dir=str(folder)
        )
        self.arguments = FactorArguments(**arguments)

    def fit(self) -> Script:
        torch.manual_seed(6)
        self.analyzer.fit_all_factors(
            factors_name="f", dataset=self.data, per_device_batch_size=5, factor_args=self.arguments
        )
        return self

    def covariances(self) -> dict[str, dict[str, Tensor]]:
        torch.manual_seed(6)
        self.analyzer.fit_covariance_matrices(
            factors_name="f", dataset=self.data, per_device_batch_size=5, factor_args=self.arguments
        )
        return self.analyzer.load_covariance_matrices("f")

    def decompose(self) -> dict[str, dict[str, Tensor]]:
        self.analyzer.perform_eigendecomposition(factors_name="f", factor_args=self.arguments)
        return self.analyzer.load_eigendecomposition("f")

    def corrections(self) -> dict[str, dict[str, Tensor]]:
        torch.manual_seed(7)
        self.analyzer.fit_lambda_matrices(
            factors_name="f", dataset=self.data, per_device_batch_size=5, factor_args=self.arguments
        )
        return self.analyzer.load_lambda_matrices("f")

    def scores(self, damping: float | None = None, name: str = "s", **arguments: Any) -> dict[str, Tensor]:
        self.analyzer.compute_pairwise_scores(
            scores_name=name, factors_name="f", query_dataset=self.data, train_dataset=self.data,
            per_device_query_batch_size=7, per_device_train_batch_size=9, query_indices=list(range(8)),
            score_args=ScoreArguments(damping_factor=damping, **arguments),
        )  # fmt: skip
        return self.analyzer.load_pairwise_scores(name)


def pair(case: str | Made, folder: Path, **arguments: Any) -> tuple[Script, Script]:
    """The script by itself, and another for use within `accelerate()`."""
    return Script(case, folder / "theirs", **arguments), Script(case, folder / "ours", **arguments)


def assert_same_scores(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, truth in theirs.items():
        assert ours[name].dtype == truth.dtype
        assert_close(ours[name], truth, 1e-3, f"scores of {name}")
        assert spearmanr(ours[name].flatten(), truth.flatten()).statistic >= 0.9999


def assert_same_factors(
    ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]], tolerance: float
) -> None:
    assert set(ours) == set(theirs)
    for factor, modules in theirs.items():
        assert list(ours[factor]) == list(modules)
        for module, truth in modules.items():
            value = ours[factor][module]
            assert value.dtype == truth.dtype and value.shape == truth.shape, f"{factor} of {module}"
            assert_close(value, truth, 0 if factor.startswith("num_") else tolerance, f"{factor} of {module}")


# ------------------------------------------------------------------------------ same factors, same scores


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_an_unchanged_script_gives_the_same_scores(case: str, strategy: str, tmp_path: Path) -> None:
    theirs, ours = pair(case, tmp_path, strategy=strategy)
    truth = theirs.fit().scores()
    with accelerate(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing falls through
        warnings.filterwarnings("ignore", category=FutureWarning)
        scores = ours.fit().scores()
    assert_same_scores(scores, truth)
    if strategy in ("kfac", "ekfac"):
        factors = [s.analyzer.load_covariance_matrices("f") for s in (ours, theirs)]
        assert_same_factors(*factors, SUMS)
    if strategy == "diagonal":
        assert_same_factors(*(s.analyzer.load_lambda_matrices("f") for s in (ours, theirs)), CORRECTED)


@pytest.mark.parametrize("case", CASES)
def test_stage_by_stage(case: str, tmp_path: Path) -> None:
    """Each stage from the same files as theirs, so that differences of one do not enter the next."""
    theirs, ours = pair(case, tmp_path)
    truth = theirs.covariances()
    with accelerate():
        assert_same_factors(ours.covariances(), truth, SUMS)
    for name in (*COVARIANCES, *COUNTS):
        source = theirs.analyzer.factors_output_dir("f") / f"{name}.safetensors"
        (ours.analyzer.factors_output_dir("f") / f"{name}.safetensors").write_bytes(source.read_bytes())
    truth = theirs.decompose()
    with accelerate():
        factors = ours.decompose()
    for side in ("activation", "gradient"):
        for module, values in truth[f"{side}_eigenvalues"].items():
            assert_close(factors[f"{side}_eigenvalues"][module], values, SUMS, f"eigenvalues of {module}")
            ours_q, theirs_q = (f[f"{side}_eigenvectors"][module].double() for f in (factors, truth))
            spectral = [(q * values.double()) @ q.T for q in (ours_q, theirs_q)]
            assert_close(*spectral, SUMS, f"eigenvectors of {module}")
            assert bool((factors[f"{side}_eigenvalues"][module] >= 0).all())
    for name in truth:
        source = theirs.analyzer.factors_output_dir("f") / f"{name}.safetensors"
        (ours.analyzer.factors_output_dir("f") / f"{name}.safetensors").write_bytes(source.read_bytes())
    truth = theirs.corrections()
    with accelerate():
        assert_same_factors(ours.corrections(), truth, CORRECTED)


def test_covariances_are_those_of_autograd(tmp_path: Path) -> None:
    """Against sums written down here, in float64: masked inputs with a one for the bias, and all gradients."""
    made: Made = (lambda: tiny("llama"), lambda: LanguageModelling(["model.layers.0.mlp.up_proj"]), texts)
    both = {"activation_covariance_dtype": torch.float64, "gradient_covariance_dtype": torch.float64}
    ours = Script(made, tmp_path, use_empirical_fisher=True, **both)
    with accelerate():
        factors = ours.covariances()
    model, data = tiny("llama"), texts().columns
    seen: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen.extend((args[0].detach(), output))

    model.model.layers[0].mlp.up_proj.register_forward_hook(record)
    LanguageModelling().compute_train_loss(data, model).backward()
    a, output = seen
    (name,) = factors["activation_covariance"]
    assert_close(factors["activation_covariance"][name], outer_sum(a, data["attention_mask"], ones=True), 1e-9)
    assert_close(factors["gradient_covariance"][name], outer_sum(output.grad), 1e-9)
    assert int(factors[COUNTS[0]][name]) == int(factors[COUNTS[1]][name]) == int(data["attention_mask"].sum())


@pytest.mark.parametrize("case", CASES)
def test_float64_agrees_to_rounding(case: str, tmp_path: Path) -> None:
    make_model, make_task, make_data = CASES[case]

    def data() -> Rows:
        rows = make_data()
        return Rows(**{n: x.double() if x.is_floating_point() else x for n, x in rows.columns.items()})

    double: Made = (lambda: make_model().double(), make_task, data)
    dtypes = dict.fromkeys(DTYPES, torch.float64)
    theirs, ours = pair(double, tmp_path, strategy="diagonal", **dtypes)
    truth = theirs.corrections()
    with accelerate():
        assert_same_factors(ours.corrections(), truth, 1e-9)
    theirs, ours = pair(double, tmp_path / "kfac", **dtypes)
    with accelerate():
        factors = ours.covariances()
    assert_same_factors(factors, theirs.covariances(), 1e-9)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype, by_pairs", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)])
def test_sixteen_bit_dtypes_are_kept_and_are_nearer_to_float64(
    dtype: torch.dtype, by_pairs: bool, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files have the dtypes that were asked for; what they hold was summed in float32."""
    monkeypatch.setattr(eigenvalues, "_takes_pairs", lambda _: by_pairs)
    narrow = {"has_shared_parameters": shared, **dict.fromkeys(DTYPES, dtype)}
    exact = Script("llama MLP", tmp_path / "exact", **dict.fromkeys(DTYPES, torch.float64))
    theirs, ours = pair("llama MLP", tmp_path, **narrow)
    truth = exact.fit()
    theirs.fit()
    with accelerate():
        ours.fit()
    for stage, names in (("covariance", COVARIANCES), ("lambda", ("lambda_matrix",))):
        mine, other, right = (getattr(s.analyzer, f"load_{stage}_matrices")("f") for s in (ours, theirs, truth))
        for name in names:
            for module in right[name]:
                assert mine[name][module].dtype == other[name][module].dtype == dtype
            if stage == "covariance":
                errors = [max(relative(x[name][m], right[name][m]) for m in right[name]) for x in (mine, other)]
                # Inputs and the result are rounded once each.
                assert errors[0] <= min(errors[1], 2 * torch.finfo(dtype).eps)
    for module, values in ours.analyzer.load_eigendecomposition("f")["activation_eigenvectors"].items():
        assert values.dtype == dtype, module


@pytest.mark.parametrize("by_pairs", [False, True])
def test_sixteen_bit_gradients_of_one_basis(by_pairs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Λ from the same float32 eigenvectors, against float64 gradients: as near as kronfluence's."""
    monkeypatch.setattr(eigenvalues, "_takes_pairs", lambda _: by_pairs)
    dtypes = {"exact": torch.float64, "theirs": torch.bfloat16, "ours": torch.bfloat16}
    scripts = {n: Script("llama", tmp_path / n, per_sample_gradient_dtype=x) for n, x in dtypes.items()}
    scripts["exact"].covariances()
    scripts["exact"].decompose()
    source = scripts["exact"].analyzer.factors_output_dir("f")
    for name in ("theirs", "ours"):
        target = scripts[name].analyzer.factors_output_dir("f")
        target.mkdir(parents=True)
        for path in source.glob("*eigen*.safetensors"):
            (target / path.name).write_bytes(path.read_bytes())
    results = {name: scripts[name].corrections()["lambda_matrix"] for name in ("exact", "theirs")}
    with accelerate():
        results["ours"] = scripts["ours"].corrections()["lambda_matrix"]
    exact = results["exact"].items()
    ours, theirs = ([relative(results[name][m], truth) for m, truth in exact] for name in ("ours", "theirs"))
    # Both round rows to bfloat16 and one thing more: by a pair the rotated rows, in kronfluence the gradients.
    assert sum(ours) <= (2.0 if by_pairs else 1.1) * sum(theirs)
    assert max(ours) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_the_example_of_the_page(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert (integration._active is not None) == ("accelerate()" in example)
    if integration._active is not None:
        integration._active.undo()


def test_float64_gradients_with_a_float32_matrix(tmp_path: Path) -> None:
    mixed = {"per_sample_gradient_dtype": torch.float64, "lambda_dtype": torch.float32, "strategy": "diagonal"}
    theirs, ours = pair("classifier", tmp_path, **mixed)
    truth = theirs.corrections()
    with accelerate():
        assert_same_factors(ours.corrections(), truth, SUMS)


# ----------------------------------------------------------------------------------- options and files


def test_partitions(tmp_path: Path) -> None:
    partitions = {f"{x}_{y}_partitions": 2 for x in ("covariance", "lambda") for y in ("data", "module")}
    theirs, ours = pair("llama MLP", tmp_path, **partitions)
    truth = theirs.fit().scores(data_partitions=2, module_partitions=2)
    with accelerate():
        scores = ours.fit().scores(data_partitions=2, module_partitions=2)
    assert_same_scores(scores, truth)
    assert_same_factors(*(s.analyzer.load_covariance_matrices("f") for s in (ours, theirs)), SUMS)
    folders = [s.analyzer.factors_output_dir("f") for s in (ours, theirs)]
    written = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert written[0] == written[1] and any("data_partition1_module_partition1" in name for name in written[0])


@pytest.mark.parametrize("ours_first", [True, False])
def test_files_are_read_by_either(ours_first: bool, tmp_path: Path) -> None:
    """Stages alternate between the two, in one folder."""
    script, alone = Script("llama", tmp_path / "both"), Script("llama", tmp_path / "alone")
    for number, stage in enumerate(("covariances", "decompose", "corrections")):
        if (number % 2 == 0) == ours_first:
            with accelerate():
                getattr(script, stage)()
        else:
            getattr(script, stage)()
        getattr(alone, stage)()
    truth = alone.scores()
    assert_same_scores(script.scores(), truth)
    with accelerate():
        assert_same_scores(script.scores(name="again"), truth)
    folders = [s.analyzer.factors_output_dir("f") for s in (script, alone)]
    for path in folders[1].glob("*.safetensors"):
        ours, theirs = load_file(folders[0] / path.name), load_file(path)
        assert {n: (x.dtype, x.shape) for n, x in ours.items()} == {n: (x.dtype, x.shape) for n, x in theirs.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"compute_per_module_scores": True},
        {"query_gradient_low_rank": 4, "use_full_svd": True, "query_gradient_accumulation_steps": 2},
        {"aggregate_query_gradients": True},
        {"aggregate_train_gradients": True},
        {"compute_per_token_scores": True, "offload_activations_to_cpu": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_score_options(options: dict[str, Any], tmp_path: Path) -> None:
    script = Script("llama MLP", tmp_path).fit()
    truth = script.scores(name="theirs", **options)
    with accelerate():
        assert_same_scores(script.scores(name="ours", **options), truth)


def test_self_scores(tmp_path: Path) -> None:
    script = Script("classifier", tmp_path).fit()

    def scores(name: str) -> dict[str, Tensor]:
        script.analyzer.compute_self_scores(
            scores_name=name, factors_name="f", train_dataset=script.data, per_device_train_batch_size=9,
            score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        return script.analyzer.load_self_scores(name)

    truth = scores("theirs")
    with accelerate():
        assert_same_scores(scores("ours"), truth)


@pytest.mark.parametrize("option", ["use_iterative_lambda_aggregation", "offload_activations_to_cpu"])
def test_memory_options(option: str, tmp_path: Path) -> None:
    theirs, ours = pair("classifier", tmp_path, strategy="diagonal", **{option: True})
    truth = theirs.corrections()
    with accelerate():
        assert_same_factors(ours.corrections(), truth, CORRECTED)


class Repeats(nn.Module):
    """A layer that is called twice, and layers that are fed one tensor or, on odd batches, two."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.twice, self.left, self.right = (nn.Linear(8, 8, bias=x) for x in (True, False, False))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :8]
        h = self.twice(torch.tanh(self.twice(x)))
        self.calls += 1
        other = h if self.calls % 2 else h + 1
        return self.head((self.left(h) * self.right(other)).tanh())


class Once(Repeats):
    """Without the layer that is called twice; the input of two layers is changed in place after them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :8] + 0
        self.calls += 1
        other = x if self.calls % 3 else x.clone()
        h = self.left(x) * self.right(other)
        x.zero_()
        return self.head(self.twice(h).tanh())


@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
@pytest.mark.parametrize("model, repeated", [(Repeats, True), (Repeats, False), (Once, False)])
def test_shared_modules_and_inputs_that_are_shared_at_times(
    model: type[nn.Module], repeated: bool, strategy: str, tmp_path: Path
) -> None:
    """Without its option kronfluence takes one call of a layer for all in Λ; then that is what is given."""

    def made() -> nn.Module:
        torch.manual_seed(8)
        return model()

    options = {"has_shared_parameters": repeated, "strategy": strategy}
    theirs, ours = pair((made, Classification, images), tmp_path, **options)
    truth = theirs.fit().scores()
    with accelerate():
        scores = ours.fit().scores()
    assert_same_scores(scores, truth)
    if strategy == "ekfac":
        assert_same_factors(*(s.analyzer.load_covariance_matrices("f") for s in (ours, theirs)), SUMS)
    else:
        assert_same_factors(*(s.analyzer.load_lambda_matrices("f") for s in (ours, theirs)), CORRECTED)


def fitted(script: Script, stage: str) -> dict[str, dict[str, Tensor]]:
    """A stage of kronfluence over plain batches, without the analyzer around it."""
    rows = script.data.columns
    batches = [{n: x[i : i + 6] for n, x in rows.items()} for i in range(0, len(script.data), 6)]
    run = {
        "covariance": covariance.fit_covariance_matrices_with_loader,
        "lambda": eigen.fit_lambda_matrices_with_loader,
    }
    torch.manual_seed(9)
    _, factors = run[stage](
        model=script.model, state=State(cpu=True), task=script.analyzer.task, loader=batches,
        factor_args=script.arguments, disable_tqdm=True,
    )  # fmt: skip
    return factors


@pytest.mark.parametrize("stage", ["covariance", "lambda"])
def test_a_loss_scale_is_taken_out(stage: str, tmp_path: Path) -> None:
    make_model, _, make_data = CASES["llama"]
    scaled: Made = (make_model, lambda: LanguageModelling(scale=512.0), make_data)
    theirs, ours = (Script(case, tmp_path, strategy="diagonal") for case in ("llama", scaled))
    for module in ours.model.modules():
        if hasattr(module, "set_gradient_scale"):
            module.set_gradient_scale(1 / 512)
    truth = fitted(theirs, stage)
    with accelerate():
        assert_same_factors(fitted(ours, stage), truth, CORRECTED)


@pytest.mark.parametrize("kind", ["weights", "bool", "wrong size", "by module"])
def test_masks_of_other_kinds(kind: str, tmp_path: Path) -> None:
    class Masked(LanguageModelling):
        def get_attention_mask(self, batch: Any) -> Any:
            mask = batch["attention_mask"]
            if kind == "weights":  # numbers of packed documents
                return mask * torch.arange(1, mask.shape[1] + 1)
            if kind == "by module":
                return {"model.layers.0.mlp.gate_proj": mask, "model.layers.1.mlp.up_proj": 1 - mask}
            return mask.bool() if kind == "bool" else mask[:, :-1]

    make_model, _, make_data = CASES["llama"]
    theirs, ours = pair((make_model, Masked, make_data), tmp_path)
    truth = fitted(theirs, "covariance")
    with accelerate():
        assert_same_factors(fitted(ours, "covariance"), truth, SUMS)


def test_processes_synchronise_plain_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kronfluence reduces over processes before it reads factors is its own kind of tensor."""
    theirs, ours = pair("llama MLP", tmp_path)
    truth = fitted(theirs, "covariance")
    load_factors = covariance.load_factors
    kinds: set[type] = set()

    def synchronised(model: nn.Module, tracked_module_names: list[str], **arguments: Any) -> Any:
        covariance.synchronize_modules(model=model, tracked_module_names=tracked_module_names)
        tracked = [m for m in model.modules() if getattr(m, "name", None) in tracked_module_names]
        kinds.update(type(m.storage[name]) for m in tracked for name in COVARIANCES)
        return load_factors(model=model, tracked_module_names=tracked_module_names, **arguments)

    with accelerate():
        monkeypatch.setattr(covariance, "load_factors", synchronised)
        factors = fitted(ours, "covariance")
    assert_same_factors(factors, truth, SUMS)
    assert kinds == {Tensor, type(None)}  # None once it was read


# ---------------------------------------------------------------------------------- what it costs


def test_shared_inputs_are_added_and_decomposed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v and gate, up: of seven inputs a layer, four sums and decompositions are made."""
    added: list[int] = []
    decomposed: list[int] = []
    syrk_, decompose = inputs.syrk_, eigenvectors.decompose

    def counted_syrk_(accumulator: Any, *arguments: Any, **options: Any) -> Any:
        added.append(accumulator.n)
        return syrk_(accumulator, *arguments, **options)

    for place in (inputs, covariances):
        monkeypatch.setattr(place, "syrk_", counted_syrk_)
    monkeypatch.setattr(eigenvectors, "decompose", lambda acc, n: (decomposed.append(acc.n), decompose(acc, n))[1])
    layers = [f"model.layers.0.{x}_proj" for x in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")]
    layers += [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")]
    make_model, _, make_data = CASES["llama"]
    script = Script((make_model, lambda: LanguageModelling(layers), make_data), tmp_path)
    with accelerate():
        script.fit()
    batches = -(-len(script.data) // 5)
    assert len(added) == (4 + 7) * batches
    assert len(decomposed) == 4 + 7
    factors = script.analyzer.load_eigendecomposition("f")["activation_eigenvectors"]
    assert torch.equal(factors[layers[4]], factors[layers[5]])
    assert not torch.equal(factors[layers[0]], factors[layers[4]])


def test_no_gradient_of_a_sequence_is_made(tmp_path: Path) -> None:
    script = Script(RIGHT, tmp_path, strategy="diagonal")
    widths = {(6, 24, 16), (6, 16, 24)}
    with Sizes() as theirs:
        fitted(script, "lambda")
    assert widths & {tuple(shape) for _, shapes in theirs.calls for shape in shapes}
    with accelerate(), Sizes() as ours:
        fitted(script, "lambda")
    assert not widths & {tuple(shape) for _, shapes in ours.calls for shape in shapes}


def test_factors_stay_where_the_gradients_are_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from kronfluence.factor.config import FactorConfig

    def storage() -> dict[str, Any]:
        return {
            "activation_eigenvectors": torch.eye(3), "gradient_eigenvectors": torch.eye(2),
            "lambda_matrix": torch.ones(1, 2, 3),
        }  # fmt: skip

    gradient = torch.ones(4, 2, 3, device="meta")
    for strategy in ("kfac", "ekfac"):
        with accelerate():
            kept = storage()
            FactorConfig.CONFIGS[strategy].precondition_gradient(gradient=gradient, storage=kept)
            assert {x.device.type for x in kept.values()} == {"cpu"}
            monkeypatch.setattr(score_stage, "_has_room", lambda *_: True)
            result = FactorConfig.CONFIGS[strategy].precondition_gradient(gradient=gradient, storage=kept)
            assert {x.device.type for x in kept.values()} == {"meta"} and result.shape == (4, 2, 3)
            monkeypatch.undo()


# -------------------------------------------------------------------------------- what falls through


def test_convolutions_fall_through_and_say_so_once(tmp_path: Path) -> None:
    theirs, ours = pair((convolutional, Classification, images), tmp_path)
    truth = theirs.fit().scores()
    with accelerate(), pytest.warns(UserWarning, match="own code runs") as said:
        scores = ours.fit().scores()
    assert_same_scores(scores, truth)
    assert_same_factors(*(s.analyzer.load_covariance_matrices("f") for s in (ours, theirs)), SUMS)
    messages = [str(w.message) for w in said if "own code" in str(w.message)]
    assert messages == [
        "kronfluence's own code runs for the Lambda matrix of module 0 and of any like it:"
        " TrackedConv2d is not kronfluence's own TrackedLinear"
    ]


def test_processed_gradients_fall_through(tmp_path: Path) -> None:
    theirs, ours = pair((classifier, ProcessedGradients, images), tmp_path, strategy="diagonal")
    truth = theirs.fit().scores()
    with accelerate(), pytest.warns(UserWarning, match="post-processes per-sample gradients"):
        scores = ours.fit().scores()
    assert_same_scores(scores, truth)


def test_a_dtype_that_is_not_decomposed_falls_through(tmp_path: Path) -> None:
    script = Script("classifier", tmp_path, eigendecomposition_dtype=torch.bfloat16)
    script.covariances()
    with (
        accelerate(),
        pytest.warns(UserWarning, match="eigendecomposition_dtype is torch.bfloat16"),
        pytest.raises(RuntimeError, match="not implemented"),
    ):
        script.decompose()


# -------------------------------------------------------------------------------- taking it back


def patched() -> dict[str, Any]:
    return {place: getattr(*peer.find(place)) for place in integration._replacements(peer.Notices())}


def test_undo_restores_all_that_was_replaced() -> None:
    before = patched()
    assert len(before) == 12
    with accelerate() as acceleration:
        assert acceleration.active and all(before[place] is not now for place, now in patched().items())
        assert accelerate() is acceleration
    assert all(before[place] is now for place, now in patched().items())
    acceleration.undo()
    assert not acceleration.active
    again = accelerate()
    assert again is not acceleration and again.active
    again.undo()
    assert all(before[place] is now for place, now in patched().items())
    assert set(before) <= set(peer.SOURCES)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = patched()
    monkeypatch.setattr(kronfluence, "__version__", "1.1.0")
    with pytest.raises(UnsupportedPeerError, match=r"version 1\.1\.0; kfade accelerates kronfluence 1\.0\.1"):
        accelerate()
    assert all(before[place] is now for place, now in patched().items())


@pytest.mark.parametrize("how", ["replaced", "gone"])
def test_changed_internals_are_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kronfluence.module.tracker.factor import LambdaTracker

    before = patched()
    with monkeypatch.context() as patch:
        if how == "gone":
            patch.delattr(LambdaTracker, "register_hooks")
        else:
            patch.setattr(LambdaTracker, "register_hooks", lambda self: None)
        with pytest.raises(UnsupportedPeerError, match=r"factor:LambdaTracker\.register_hooks changed.*1\.0\.1"):
            accelerate()
    assert all(before[place] is now for place, now in patched().items())


def test_a_missing_kronfluence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kronfluence", None)
    with pytest.raises(UnsupportedPeerError, match=r"cannot be imported.*1\.0\.1"):
        accelerate()


# ------------------------------------------------------------------------------------------ factor files

MLP = r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj"


def right_padded() -> Rows:
    """Where the task's positions, which count padding on the left, are those of kfade."""
    parts = [batch("right", 8, 11, seed) for seed in range(3)]
    return Rows(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


RIGHT: Made = (CASES["llama MLP"][0], CASES["llama MLP"][1], right_padded)


def as_batches(data: Rows) -> list[dict[str, Tensor]]:
    whole = data.columns
    return [{name: column[i : i + 8] for name, column in whole.items()} for i in range(0, len(data), 8)]


@pytest.mark.parametrize("strategy", ["kfac", "ekfac", "diagonal"])
def test_exported_factors_are_kronfluences_own(strategy: str, tmp_path: Path) -> None:
    """Of labelled tokens, where both have the same gradients: file by file, and the scores that come of them."""
    theirs, ours = (Script(RIGHT, tmp_path / name, strategy=strategy, use_empirical_fisher=True) for name in ("a", "b"))
    truth = theirs.fit().scores()
    model = tiny("llama", torch.float32, mlp_bias=False)
    options = kfade.FitConfig(curvature=strategy, fisher="empirical", modules=MLP)
    curvature = kfade.fit(model, as_batches(theirs.data), options)
    export_factors(curvature, tmp_path / "b" / "run" / "factors_f", len(theirs.data))
    if strategy != "diagonal":
        read = [s.analyzer.load_covariance_matrices("f") for s in (ours, theirs)]
        assert_same_factors(*read, SUMS)
        values = [s.analyzer.load_eigendecomposition("f") for s in (ours, theirs)]
        for kind in ("activation_eigenvalues", "gradient_eigenvalues"):
            assert_same_factors({kind: values[0][kind]}, {kind: values[1][kind]}, SUMS)
    if strategy != "kfac":
        # In the eigenbasis of our own sums, whose columns turn where eigenvalues are close.
        tolerance = CORRECTED if strategy == "diagonal" else 1e-2
        assert_same_factors(*(s.analyzer.load_lambda_matrices("f") for s in (ours, theirs)), tolerance)
    assert_same_scores(ours.scores(), truth)


@pytest.mark.parametrize("strategy", ["kfac", "ekfac", "diagonal"])
def test_imported_factors_are_those_of_a_fit(strategy: str, tmp_path: Path) -> None:
    script = Script(RIGHT, tmp_path, strategy=strategy, use_empirical_fisher=True).fit()
    model, batches = tiny("llama", torch.float32, mlp_bias=False), as_batches(script.data)
    fitted = kfade.fit(model, batches, kfade.FitConfig(curvature=strategy, fisher="empirical", modules=MLP))
    read = import_factors(script.analyzer.factors_output_dir("f"), model, MLP, losses=loss_positions(batches))
    assert list(read) == list(fitted) and read.config == fitted.config
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(state.d_out, state.width_in, generator=generator) for name, state in fitted.items()}
    solved, truth = read.solve(gradients, 0.1), fitted.solve(gradients, 0.1)
    for name, state in fitted.items():
        assert read[name].losses == state.losses
        if strategy != "diagonal":
            assert read[name].positions == state.positions
            assert_close(read[name].input_factor(), state.input_factor(), SUMS, name)
            assert_close(read[name].output_factor(), state.output_factor(), SUMS, name)
        # As far as both agree on scores.
        assert_close(solved[name], truth[name], 1e-3, name)


def test_exported_factors_come_back(tmp_path: Path) -> None:
    model, batches = tiny("llama", torch.float32), as_batches(texts())
    fitted = kfade.fit(model, batches, kfade.FitConfig(modules="mlp", samples=2))
    export_factors(fitted, tmp_path, len(texts()))
    read = import_factors(tmp_path, model, losses=2 * loss_positions(batches))
    for name, state in fitted.items():
        assert torch.equal(read[name].input_factor(), state.input_factor())
        assert torch.equal(read[name].output_factor(), state.output_factor())
        assert torch.equal(read[name].eigenvalues(), state.eigenvalues())
        # There and back is two roundings.
        torch.testing.assert_close(read[name].lambda_out, state.lambda_out, rtol=3e-7, atol=0)


def test_factor_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, batches = tiny("llama", torch.float32), as_batches(texts())
    fitted = kfade.fit(model, batches, kfade.FitConfig(modules="mlp"))
    for value, kind in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="sequences is"):
            export_factors(fitted, tmp_path, value)  # type: ignore[arg-type]
        with pytest.raises(kind, match="losses is"):
            import_factors(tmp_path, model, losses=value)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=r"factor_arguments.json does not exist"):
        import_factors(tmp_path, model)
    conv = kfade.fit(tiny("gpt2", torch.float32), batches, kfade.FitConfig(modules="mlp", curvature="kfac"))
    with pytest.raises(ValueError, match="is a Conv1D"):
        export_factors(conv, tmp_path, 24)
    export_factors(fitted, tmp_path, 24)
    with pytest.raises(StorageError, match=r"differ in model\.layers\.0\.self_attn"):
        import_factors(tmp_path, model, "all-linear")
    with pytest.raises(StorageError, match=r"of shape \[17, 17\]; it must be \[16, 16\]"):
        import_factors(tmp_path, tiny("llama", torch.float32, mlp_bias=False))
    (tmp_path / "lambda_matrix.safetensors").write_bytes(b"half")
    with pytest.raises(StorageError, match=r"lambda_matrix.safetensors cannot be read"):
        import_factors(tmp_path, model)
    export_factors(kfade.fit(model, batches, kfade.FitConfig(curvature="diagonal")), tmp_path, 24)
    with pytest.raises(ValueError, match="losses is None; for the strategy diagonal"):
        import_factors(tmp_path, model)
