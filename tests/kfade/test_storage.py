"""A saved curvature is whole, or it is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from manifests import manifest, rewrite
from models import batch, hand_made, tiny
from safetensors.torch import load_file, save_file

import kfade
import kfade.storage
from kfade import StorageError

OPTIONS = kfade.FitConfig(fisher="empirical", modules="first|gate|up|down")


@pytest.fixture(scope="module")
def curvature() -> kfade.Curvature:
    return kfade.fit(hand_made(), [batch()], OPTIONS)


@pytest.fixture
def saved(curvature: kfade.Curvature, tmp_path: Path) -> Path:
    curvature.save(tmp_path / "curvature")
    return tmp_path / "curvature"


# --------------------------------------------------------------------------------------- what is written


def test_manifest_says_what_there_is(curvature: kfade.Curvature, saved: Path) -> None:
    content = manifest(saved)
    assert (content["format"], content["version"]) == ("kfade-curvature", 1)
    assert content["model_id"] == "HandMade"
    assert content["config"]["fisher"] == "empirical" and content["config"]["modules"] == OPTIONS.modules
    assert {"a_sum", "s_sum", "lambda_sum", "packing"} <= set(content["conventions"])
    assert list(content["layers"]) == list(curvature)
    for name, layer in curvature.items():
        entry = content["layers"][name]
        assert all(entry[key] == getattr(layer, key) for key in ("d_in", "d_out", "has_bias", "positions", "losses"))


def test_every_file_is_in_the_manifest_with_its_digest(saved: Path) -> None:
    files = manifest(saved)["files"]
    assert {p.name for p in saved.iterdir()} == {*files, "manifest.json"}
    for name, entry in files.items():
        assert name.endswith(".safetensors")
        assert hashlib.sha256((saved / name).read_bytes()).hexdigest() == entry["sha256"]
        assert entry["layer"] in manifest(saved)["layers"] and entry["stage"]


def test_a_shared_factor_is_written_once_and_packed(curvature: kfade.Curvature, saved: Path) -> None:
    files = manifest(saved)["files"].items()
    stored = [(entry["layer"], key, value) for name, entry in files for key, value in load_file(saved / name).items()]
    inputs = {layer: value for layer, key, value in stored if key == "a_sum"}
    assert "up" not in inputs and {"first", "gate", "down"} <= set(inputs)
    assert all(value.ndim == 1 and value.shape == curvature[layer].a_sum.data.shape for layer, value in inputs.items())
    loaded = kfade.Curvature.load(saved)
    assert loaded["up"].a_sum is loaded["gate"].a_sum
    assert torch.equal(loaded["up"].input_factor(), curvature["up"].input_factor())


def test_saving_again_replaces(curvature: kfade.Curvature, saved: Path) -> None:
    smaller = kfade.fit(hand_made(), [batch("left")], kfade.FitConfig(modules="up", curvature="kfac"))
    smaller.save(saved)
    loaded = kfade.Curvature.load(saved)
    assert list(loaded) == ["up"] and loaded["up"].lambda_sum is None
    assert torch.equal(loaded["up"].output_factor(), smaller["up"].output_factor())


def test_directories_are_made(curvature: kfade.Curvature, tmp_path: Path) -> None:
    curvature.save(str(tmp_path / "a" / "b"))
    assert list(kfade.Curvature.load(str(tmp_path / "a" / "b"))) == list(curvature)


# ------------------------------------------------------------------------------------------ what is refused


def first_file(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def flip_last_byte(directory: Path) -> None:
    content = bytearray(first_file(directory).read_bytes())
    content[-1] ^= 1
    first_file(directory).write_bytes(content)


def foreign_file(directory: Path) -> None:
    """Well-formed and with a digest that fits, but not what belongs there."""
    save_file({"s_sum": torch.zeros(3)}, first_file(directory))
    digest = hashlib.sha256(first_file(directory).read_bytes()).hexdigest()
    rewrite(directory, lambda m: m["files"][first_file(directory).name].update(sha256=digest))


def pickled_file(directory: Path) -> None:
    """A pickle that would leave a mark if anything unpickled it."""
    first_file(directory).write_bytes(pickle.dumps(Mark(str(directory / "unpickled"))))
    digest = hashlib.sha256(first_file(directory).read_bytes()).hexdigest()
    rewrite(directory, lambda m: m["files"][first_file(directory).name].update(sha256=digest))


class Mark:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def truncate(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name if name else first_file(directory)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def entry_of_nothing(directory: Path) -> None:
    name = first_file(directory).name
    rewrite(directory, lambda m: m["files"][name].update(layer="nothing"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json does not exist"),
    "truncated manifest": (truncate("manifest.json"), "manifest.json cannot be read"),
    "empty manifest": (lambda d: (d / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "binary manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json cannot be read"),
    "a list": (lambda d: (d / "manifest.json").write_text("[]"), "holds a list"),
    "empty object": (lambda d: (d / "manifest.json").write_text("{}"), "has format None"),
    "foreign format": (lambda d: rewrite(d, lambda m: m.update(format="weights")), "has format 'weights'"),
    "future version": (lambda d: rewrite(d, lambda m: m.update(version=3)), "has version 3; this kfade reads 1 and 2"),
    "no layers": (lambda d: rewrite(d, lambda m: m.pop("layers")), "is not a manifest"),
    "no files": (lambda d: rewrite(d, lambda m: m.pop("files")), "is not a manifest"),
    "layer without counts": (lambda d: rewrite(d, lambda m: m["layers"]["up"].pop("d_in")), "is not a manifest"),
    "unknown option": (lambda d: rewrite(d, lambda m: m["config"].update(speed=11)), "is not a manifest"),
    "bad option": (lambda d: rewrite(d, lambda m: m["config"].update(fisher="true")), "is not a manifest"),
    "layer of no group": (lambda d: rewrite(d, lambda m: m["layers"]["up"].update(group="nothing")), "manifest"),
    "file of no layer": (entry_of_nothing, "manifest"),
    "digest left out": (
        lambda d: rewrite(d, lambda m: m["files"][first_file(d).name].pop("sha256")), "manifest"),
    "file left out": (lambda d: rewrite(d, lambda m: m["files"].pop(first_file(d).name)), "manifest|missing"),
    "file missing": (lambda d: first_file(d).unlink(), "is missing"),
    "file truncated": (truncate(""), "is corrupt"),
    "one bit flipped": (flip_last_byte, "is corrupt"),
    "file of another layer": (foreign_file, "s_sum|shape|cannot be read"),
    "a pickle": (pickled_file, "cannot be read"),
    "path outside": (
        lambda d: rewrite(d, lambda m: m["files"].update({"../x.safetensors": {"layer": "up", "sha256": ""}})),
        "not a file of this directory"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(saved: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(saved)
    with pytest.raises(StorageError, match=message):
        kfade.Curvature.load(saved)
    assert not (saved / "unpickled").exists()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        kfade.Curvature.load(tmp_path / "nothing")


def test_nothing_is_ever_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    assert list(kfade.Curvature.load(saved))


def test_another_model_is_refused_with_the_differences(saved: Path) -> None:
    assert list(kfade.Curvature.load(saved, hand_made()))
    other = hand_made()
    other.up = torch.nn.Linear(12, 21)
    del other.down
    with pytest.raises(StorageError, match=r"model: .*up: \[20, 12\] saved, \[21, 12\].*down: not in the model"):
        kfade.Curvature.load(saved, other)
    with pytest.raises(StorageError, match="first: not in the model"):
        kfade.Curvature.load(saved, tiny("llama"))


def test_a_model_that_lost_its_bias_is_refused(saved: Path) -> None:
    other = hand_made(bias=False)
    with pytest.raises(StorageError, match="another model"):
        kfade.Curvature.load(saved, other)


# ----------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("fresh", [True, False])
def test_disk_full(
    curvature: kfade.Curvature, saved: Path, monkeypatch: pytest.MonkeyPatch, after: int, fresh: bool, tmp_path: Path
) -> None:
    """Half of a file is written, then there is no space: neither a new directory nor an old one loads."""
    calls = []

    def full(tensors: Any, path: Any, *rest: Any) -> None:
        calls.append(path)
        if len(calls) > after:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, *rest)

    monkeypatch.setattr(kfade.storage, "save_file", full)
    directory = tmp_path / "new" if fresh else saved
    with pytest.raises(OSError, match="No space left"):
        curvature.save(directory)
    with pytest.raises(StorageError, match="does not exist"):
        kfade.Curvature.load(directory)
    assert not list(directory.glob(".*")), "half-written files stay behind"


def test_disk_full_while_the_manifest_is_written(
    curvature: kfade.Curvature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        curvature.save(tmp_path / "new")
    monkeypatch.undo()
    with pytest.raises(StorageError, match="does not exist"):
        kfade.Curvature.load(tmp_path / "new")


CHILD = """
import sys, time
import kfade, kfade.storage
curvature = kfade.Curvature.load(sys.argv[1])
write, done = kfade.storage.write_tensors, []
def slow(path, *rest):
    write(path, *rest)
    done.append(path)
    if len(done) == int(sys.argv[3]):
        print("now", flush=True)
        time.sleep(60)
kfade.storage.write_tensors = slow
curvature.save(sys.argv[2])
"""


@pytest.mark.parametrize("again", [False, True])
def test_killed_while_saving(saved: Path, tmp_path: Path, again: bool) -> None:
    """A process killed with SIGKILL after the third file: what is there does not load, not even over an old one."""
    target = tmp_path / "target"
    if again:
        kfade.Curvature.load(saved).save(target)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(saved), str(target), "3"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == b"now"
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=30) == -signal.SIGKILL
    child.stdout.close()
    assert len(list(target.glob("*.safetensors"))) >= 3
    with pytest.raises(StorageError, match=r"manifest.json does not exist"):
        kfade.Curvature.load(target)
    begin = time.monotonic()
    kfade.Curvature.load(saved).save(target)
    assert list(kfade.Curvature.load(target)) and time.monotonic() - begin < 30
