"""The shipped configurations, which of them a call gets, and what is refused."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kfade_kernels import configurations
from kfade_kernels.configurations import SIZE_EXAMPLES, Configuration, Entry, choose, forced, read, unfit, write
from kfade_kernels.devices import A100, ARCHITECTURES, B200, H100, MI300X, Device, by_architecture
from kfade_kernels.tune import SEARCHES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = configurations.kernels()


def entry(**changes: Any) -> Entry:
    values: dict[str, Any] = {
        "device": "sm_90", "dtype": "16-bit", "size": "any", "triton": "any", "configuration": Configuration(),
        "source": "test",
    }  # fmt: skip
    return Entry(**{**values, **changes})


def numbered(*changes: dict[str, Any]) -> list[Entry]:
    """Entries that can be told apart by their `group`."""
    return [entry(**c, configuration=Configuration(group=number)) for number, c in enumerate(changes, 1)]


def chosen(entries: list[Entry], dtype: torch.dtype = torch.bfloat16, extent: int = 2048, triton: str = "3.7.1") -> int:
    device = replace(H100, name="NVIDIA H100 80GB HBM3")
    return choose("syrk", device, dtype, extent, triton, entries).group


# ---------------------------------------------------------------------------------------------- shipped


@pytest.mark.parametrize("kernel", KERNELS)
def test_shipped_files_parse(kernel: str) -> None:
    entries = read(configurations.path_of(kernel))
    assert entries
    keys = [(e.device, e.dtype, e.size, e.triton) for e in entries]
    assert len(set(keys)) == len(keys), "two entries for the same calls"
    assert all(e.source == "unmeasured" or e.source.startswith("measured 2") for e in entries)


@pytest.mark.parametrize("extent", SIZE_EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_call_has_a_configuration_that_fits(
    kernel: str, architecture: str, dtype: torch.dtype, extent: int
) -> None:
    device = by_architecture(architecture)
    found = choose(kernel, device, dtype, extent, "3.7.1")
    assert any(e.device == architecture and e.configuration == found for e in configurations.shipped(kernel))
    accumulators = SEARCHES[kernel].accumulators
    assert unfit(found, device, dtype.itemsize if accumulators else 0, accumulators) is None
    assert SEARCHES[kernel].sound(found)


def test_there_is_a_search_for_every_kernel() -> None:
    assert set(KERNELS) <= set(SEARCHES)


# ------------------------------------------------------------------------------------------- precedence


def test_the_more_telling_key_wins() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert chosen(numbered({"device": "sm_90"}, {"device": name})) == 2
    assert chosen(numbered({"dtype": "any"}, {"dtype": "16-bit"}, {"dtype": "bfloat16"})) == 3
    assert chosen(numbered({"dtype": "any"}, {"dtype": "16-bit"}, {"dtype": "float16"})) == 2
    assert chosen(numbered({"dtype": "any"}, {"dtype": "16-bit"}), torch.float32) == 1
    assert chosen(numbered({"size": "any"}, {"size": "medium"})) == 2
    assert chosen(numbered({"triton": "any"}, {"triton": "3.7"}, {"triton": "3.7.1"})) == 3
    assert chosen(numbered({"triton": "any"}, {"triton": "3.7"}, {"triton": "3.7.0"})) == 2


def test_device_beats_dtype_beats_size_beats_triton() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert chosen(numbered({"dtype": "bfloat16"}, {"device": name, "dtype": "any"})) == 2
    assert chosen(numbered({"size": "medium", "dtype": "16-bit"}, {"dtype": "bfloat16"})) == 2
    assert chosen(numbered({"triton": "3.7.1"}, {"size": "medium"})) == 2
    assert chosen(numbered({}, {})) == 1, "of equals the first"


def test_what_does_not_apply_is_passed_over() -> None:
    others = numbered({"device": "sm_80"}, {"dtype": "float32"}, {"size": "large"}, {"triton": "3.6"})
    assert chosen(others) == Configuration().group
    assert chosen([*others, *numbered({}, {}, {}, {}, {})[4:]]) == 5


@pytest.mark.parametrize(("extent", "size"), [(1, 1), (1023, 1), (1024, 2), (6143, 2), (6144, 3), (10**6, 3)])
def test_size_classes(extent: int, size: int) -> None:
    assert chosen(numbered({"size": "small"}, {"size": "medium"}, {"size": "large"}), extent=extent) == size


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_unknown_device_gets_a_tile_that_runs_anywhere(kernel: str) -> None:
    for architecture in ("sm_75", "sm_120", "gfx1100", "gfx90a"):
        device = by_architecture(architecture)
        found = choose(kernel, device, torch.float32, 2048, "3.7.1")
        assert found == Configuration()
        assert unfit(found, device, 4) is None


# --------------------------------------------------------------------------------------------- forced


def test_forced_configurations() -> None:
    mine, other = Configuration(group=3), Configuration(group=5)
    shipped = choose("syrk", H100, torch.bfloat16, 2048, "3.7.1")
    elsewhere: list[Configuration] = []
    with forced("syrk", mine):
        assert choose("syrk", H100, torch.bfloat16, 2048, "3.7.1") == mine
        assert choose("product", H100, torch.bfloat16, 2048, "3.7.1").group == Configuration().group
        thread = threading.Thread(target=lambda: elsewhere.append(choose("syrk", H100, torch.bfloat16, 2048, "3.7.1")))
        thread.start()
        thread.join()
        with forced("syrk", other), forced("product", other):
            assert choose("syrk", A100, torch.float32, 1, "3.7.1") == other
            assert choose("product", A100, torch.float32, 1, "3.7.1") == other
        assert choose("syrk", H100, torch.bfloat16, 2048, "3.7.1") == mine
        with forced("syrk", other, torch.float32):
            assert choose("syrk", H100, torch.float32, 2048, "3.7.1") == other
            assert choose("syrk", H100, torch.bfloat16, 2048, "3.7.1") == mine
    with forced("syrk", other, torch.float32):
        assert choose("syrk", H100, torch.bfloat16, 2048, "3.7.1") == shipped
    assert elsewhere == [shipped] == [choose("syrk", H100, torch.bfloat16, 2048, "3.7.1")]
    with pytest.raises(KeyError), forced("syrk", mine):
        raise KeyError
    assert choose("syrk", H100, torch.bfloat16, 2048, "3.7.1") == shipped


# --------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize(
    ("device", "changes", "itemsize", "accumulators", "reason"),
    [
        # 4 stages of (128 + 256) × 64 in 4 bytes
        (H100, {"block_m": 128, "block_n": 256, "block_k": 64, "stages": 4, "warps": 8}, 4, 1,
         "needs 393216 bytes of shared memory; H100 has 232448"),
        (H100, {"block_m": 128, "block_n": 256, "warps": 4}, 2, 1,
         "keeps 256 registers a thread for accumulators; at most 207 are free"),
        (H100, {"block_m": 128, "block_n": 128, "warps": 4}, 2, 2,
         "keeps 256 registers a thread for accumulators; at most 207 are free"),
        (H100, {"warps": 64}, 2, 1, "has 2048 threads; a program may have 1024"),
        (MI300X, {"warps": 32}, 2, 1, "has 2048 threads; a program may have 1024"),
        (A100, {"descriptors": True}, 2, 1, "loads by descriptors; sm_80 has no tensor memory accelerator"),
        (MI300X, {"descriptors": True}, 2, 1, "loads by descriptors; gfx942 has no tensor memory accelerator"),
    ],
)  # fmt: skip
def test_the_pruner_refuses(
    device: Device, changes: dict[str, Any], itemsize: int, accumulators: int, reason: str
) -> None:
    assert unfit(Configuration(**changes), device, itemsize, accumulators) == reason


def test_the_pruner_knows_devices_apart() -> None:
    wide = Configuration(block_m=128, block_n=256, block_k=32, warps=4)
    # Blackwell accumulates in tensor memory, and AMD's threads have twice the registers.
    assert unfit(wide, H100, 2) is not None
    assert unfit(wide, B200, 2) is None
    assert unfit(wide, MI300X, 2) is None
    assert unfit(wide, B200, 2, accumulators=2) is not None
    assert unfit(Configuration(descriptors=True), H100, 2) is None
    assert unfit(Configuration(block_n=4096, warps=16), H100, 0, accumulators=0) is None


# ------------------------------------------------------------------------------------------ the files


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "configurations.json"
    entries = tuple(numbered({}, {"device": "NVIDIA H100", "dtype": "float32", "size": "large", "triton": "3.7"}))
    assert read(path) == ()
    write(path, entries)
    assert read(path) == entries
    assert json.loads(path.read_text())[0]["configuration"]["precision"] == "ieee"
    write(path, [])
    assert read(path) == ()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configurations.json"
    write(path, numbered({}))
    before = path.read_bytes()

    class Broken(Entry):
        def to_json(self) -> dict[str, Any]:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write(path, [*numbered({}), Broken("a", "b", "any", "any", Configuration(), "c")])
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no rename")))
    with pytest.raises(OSError, match="no rename"):
        write(path, [])
    assert path.read_bytes() == before


def test_kernels_without_a_file_have_no_entries() -> None:
    assert configurations.shipped("no such kernel") == ()
    assert choose("no such kernel", H100, torch.bfloat16, 2048, "3.7.1") == Configuration()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": ""}, "device of entry 1 of c.json is ''; it must be a text"),
        ({"dtype": 16}, "dtype of entry 1 of c.json is 16; it must be a text"),
        ({"size": "huge"}, "size of entry 1 of c.json is 'huge'; it must be a size class or any"),
        ({"colour": "red"}, "entry 1 of c.json has fields ['colour', 'configuration'"),
        ({"source": None}, "source of entry 1 of c.json is None; it must be a text"),
        ({"configuration": {"block": 1}}, "configuration of entry 1 of c.json has 'block'; it must be one of block_m,"),
        ({"configuration": {"block_m": 96}}, "block_m of entry 1 of c.json is 96; it must be a power of two"),
        ({"configuration": {"warps": 0}}, "warps of entry 1 of c.json is 0; it must be a power of two"),
        ({"configuration": {"block_k": 32.0}}, "block_k of entry 1 of c.json is 32.0; it must be of type int"),
        ({"configuration": {"descriptors": 1}}, "descriptors of entry 1 of c.json is 1; it must be of type bool"),
        ({"configuration": {"warps": True}}, "warps of entry 1 of c.json is True; it must be of type int"),
        ({"configuration": {"stages": 0}}, "stages of entry 1 of c.json is 0; it must be at least 1"),
        ({"configuration": {"flush": -1}}, "flush of entry 1 of c.json is -1; it must be at least 1"),
        ({"configuration": {"precision": "half"}}, "precision of entry 1 of c.json is 'half'; it must be one of"),
    ],
)  # fmt: skip
def test_bad_entries_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "c.json"
    good = entry().to_json()
    path.write_text(json.dumps([good, {**good, **changes}]))
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(message)
