"""`FactorCallback`: a Hugging Face Trainer collects Kronecker factors while it trains."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import FitConfig
from ..training import FactorTracker, check_tracking

if TYPE_CHECKING:
    from ..curvature import Curvature

FILE = "kfade-factors.safetensors"


class FactorCallback(TrainerCallback):
    """Runs a `kfade.FactorTracker` beside a `transformers.Trainer`.

    Each checkpoint gets the running factors as one more file, `kfade-factors.safetensors`, and a run that is resumed
    from it goes on with the same bits. The model, the optimiser and the loop stay as they were.

    Args:
        config: options of the fit, as for `FactorTracker`. Where its `autocast` is `off` the passes run under the
            mixed precision of the Trainer (`bf16`, `fp16`), as the training does.
        every: collect at the first optimiser step and at each `every`-th after it.
        decay: weight in [0, 1] of the sums so far when new ones are added.
        resume: the checkpoint with the factors of a resumed run. None looks in
            `TrainingArguments.resume_from_checkpoint` and then in the checkpoint of that step in `output_dir`: a
            callback is not told the argument of `Trainer.train`. Without factors there they begin anew, with a warning.

    Attributes:
        tracker: of the last run; None before the first.

    Raises:
        TypeError, ValueError: an option has a wrong type, is out of range, or asks for what cannot be tracked.
    """

    def __init__(
        self,
        config: FitConfig | None = None,
        *,
        every: int = 10,
        decay: float = 0.95,
        resume: str | Path | None = None,
    ) -> None:
        self._config = check_tracking(config, every, decay)
        self._every, self._decay = every, decay
        self._resume = None if resume is None else Path(resume)
        self.tracker: FactorTracker | None = None

    def curvature(self) -> Curvature:
        """The K-FAC curvature of the running factors; see `FactorTracker.curvature`.

        Raises:
            RuntimeError: nothing was collected yet.
        """
        if self.tracker is None:
            raise RuntimeError("nothing was collected yet: the Trainer has not begun to train")
        return self.tracker.curvature()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.tracker is not None:
            # A run that ended by an error left its hook.
            self.tracker.close()
        model: nn.Module = kwargs["model"]
        kind = "bfloat16" if args.bf16 else "float16" if args.fp16 else "off"
        config = replace(self._config, autocast=kind) if self._config.autocast == "off" else self._config
        self.tracker = FactorTracker(model, config, every=self._every, decay=self._decay)
        if not state.global_step and self._resume is None:
            return
        path = (self._resume or self._checkpoint(args, state)) / FILE
        if path.is_file():
            self.tracker.load(path)
        elif self._resume is not None:
            raise FileNotFoundError(f"resume is {self._resume}; it must be a checkpoint with {FILE}")
        else:
            warnings.warn(f"{path} does not exist: the tracked factors begin anew", RuntimeWarning, stacklevel=2)

    @staticmethod
    def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
        given = args.resume_from_checkpoint
        if isinstance(given, str) and (Path(given) / FILE).is_file():
            return Path(given)
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.tracker is not None:
            self.tracker.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.tracker is None or not args.should_save:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            self.tracker.save(folder / FILE)
        else:
            warnings.warn(f"{folder} does not exist: the tracked factors were not saved", RuntimeWarning, stacklevel=2)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.tracker is not None:
            self.tracker.close()
