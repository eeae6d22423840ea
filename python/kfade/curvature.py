"""The fitted curvature of a model: a mapping of its layers, which solves, is saved and is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from .config import DAMPINGS, FitConfig
from .layer_curvature import LayerCurvature, check_damping, solve_layers
from .layers import Layer, WeightAndBias, select
from .storage import load_curvature, save_curvature


class Curvature(Mapping[str, LayerCurvature]):
    """Fitted curvature of a model: a mapping from layer names to `LayerCurvature`.

    Attributes:
        config: the FitConfig it was fitted with.
        model_id: name of the model.
        layers: the states.
    """

    def __init__(self, config: FitConfig, model_id: str, layers: Mapping[str, LayerCurvature]) -> None:
        self.config = config
        self.model_id = model_id
        self.layers = dict(layers)

    def __getitem__(self, name: str) -> LayerCurvature:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def solve(
        self,
        gradients: Mapping[str, Tensor | Sequence[Tensor]],
        damping: float = 0.1,
        kind: str = "relative",
    ) -> dict[str, Tensor | WeightAndBias]:
        """`(F + λI)⁻¹` applied to the gradients of some layers.

        Args:
            gradients: by layer name, in the layout of the parameter; for a layer with a bias the
                pair (weight, bias), or both joined as `[d_out, d_in + 1]`.
            damping: λ ≥ 0.
            kind: `relative` multiplies λ by each layer's mean eigenvalue, `absolute` does not.

        Returns:
            By layer name, a tensor in the layout of the parameter; weight and bias apart for a
            layer that has a bias.

        Raises:
            ValueError: an unknown layer, a wrong shape, a bad damping or kind.
        """
        if kind not in DAMPINGS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(DAMPINGS)}")
        check_damping(damping)
        unknown = sorted(set(gradients) - set(self.layers))
        if unknown:
            raise ValueError(f"gradients has unknown layers {unknown}; the curvature has {sorted(self.layers)}")
        solved = self.solve_matrices({n: self.layers[n].join(value) for n, value in gradients.items()}, damping, kind)
        return {name: self.layers[name].part(matrix) for name, matrix in solved.items()}

    def solve_matrices(self, matrices: Mapping[str, Tensor], damping: float, kind: str) -> dict[str, Tensor]:
        """The same for gradients `[d_out, d_in (+ 1)]` by layer name, with the solutions in that form too."""
        layers = [self.layers[name] for name in matrices]
        for layer, matrix in zip(layers, matrices.values(), strict=True):
            layer.check_matrix(matrix)
        dampings = [layer.damping(damping, kind) for layer in layers]
        return dict(zip(matrices, solve_layers(layers, list(matrices.values()), dampings), strict=True))

    def save(self, directory: str | Path) -> None:
        """Write a directory that `load` reads; see `kfade.storage`."""
        save_curvature(self.config, self.model_id, self.layers, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, model: nn.Module | None = None) -> Curvature:
        """Read a saved curvature; with `model`, refuse one whose layers do not fit it.

        Raises:
            StorageError: missing, incomplete, corrupt, of a future version, or of another model.
        """
        return Curvature(*load_curvature(Path(directory), model))


def fitted_layers(model: nn.Module, curvature: Curvature) -> list[Layer]:
    """The layers of the curvature in this model; ValueError where they differ."""
    layers = select(model, curvature.config.modules)
    ours = {x.name: (x.d_out, x.d_in, x.has_bias, x.transposed) for x in layers}
    fitted = {n: (s.d_out, s.d_in, s.has_bias, s.transposed) for n, s in curvature.items()}
    wrong = sorted(name for name in ours.keys() | fitted.keys() if ours.get(name) != fitted.get(name))
    if wrong:
        raise ValueError(
            f"curvature does not fit the model: {', '.join(wrong[:4])} {'differ' if len(wrong) > 1 else 'differs'}"
            " between them; it must have been fitted on a model with the same layers"
        )
    return layers
