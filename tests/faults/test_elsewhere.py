"""A crafted checkpoint's arrays aren't read from outside its folder, or unpacked to more than they have."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
import zstandard

from jaxlm import checkpoint, files
from jaxlm.checkpoint import _folder
from jaxlm.types import TrainState

OWN = b"ocdbt.process_0/"


def crc32c(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def rewrite(path: Path, old: bytes, new: bytes) -> int:
    """Replaces bytes in a file of TensorStore's OCDBT, with length and checksum that fit; returns its size.

    It has a magic number of 4 bytes, its length in 8, a version, how it is compressed, the content, and a CRC-32C.
    """
    before = path.read_bytes()
    content = zstandard.ZstdDecompressor().decompressobj().decompress(before[14:-4])
    assert old in content
    packed = zstandard.ZstdCompressor().compress(content.replace(old, new))
    after = before[:4] + struct.pack("<Q", 14 + len(packed) + 4) + before[12:14] + packed
    path.write_bytes(after + struct.pack("<I", crc32c(after)))
    return len(after) + 4


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128, number >> 7])


def save(folder: Path) -> tuple[np.ndarray, Path]:
    """Saves eight arrays, `w0` plus 0 to 7; returns that and the folder of their files."""
    w = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    state = TrainState(jnp.zeros((), jnp.int32), {f"w{i}": jnp.asarray(w + i) for i in range(8)}, {"m": jnp.zeros(1)})
    with checkpoint.Checkpoints(folder, {}) as checkpoints:
        checkpoints.save(state)
    return w, folder / "0" / "params"


def forge(params: Path) -> None:
    """Writes the manifest anew, without the checksums of the files."""
    path = params.parent / _folder.MANIFEST
    manifest = {**json.loads(path.read_text()), "files": {}}
    del manifest["checksum"]
    path.write_text(files.signed(manifest))


def load(folder: Path) -> str:
    """What loading says, and the MiB that it takes besides what is imported.

    In a process of its own, since Orbax leaves coroutines behind when one of many reads fails, of which Python warns
    when they are collected: in whatever test that is.
    """
    program = f"""
import atexit, pathlib, re
from jaxlm import checkpoint
def peak(): return int(re.findall(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[0]) >> 10
atexit.register(lambda before: print(peak() - before), peak())
checkpoint.load_params({str(folder)!r})
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return result.stderr + result.stdout


@pytest.mark.parametrize("base", [OWN, b"../../../secret/", b"//tmp/../secret/"], ids=["own", "above", "root"])
def test_arrays_are_read_from_the_checkpoint_alone(
    base: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_folder, "SMALL", -1)
    w, params = save(tmp_path / "c")
    (node,) = (params / "d").iterdir()
    size = node.stat().st_size
    rewrite(params / "manifest.ocdbt", varint(size), varint(rewrite(node, OWN, base)))
    forge(params)
    if base == OWN:  # so that it is not the way of rewriting that is refused
        loaded, _ = checkpoint.load_params(tmp_path / "c")
        np.testing.assert_array_equal(loaded["w3"], w + 3)
        return
    (params / OWN.decode()).rename(tmp_path / "secret")
    said = load(tmp_path / "c")
    assert "damaged and not used" in said
    assert "RuntimeError: " in said
    assert "no checkpoint that is whole" in said


@pytest.mark.parametrize("which", ["of the array", "of a piece"])
def test_a_piece_that_is_larger_than_its_array_is_refused(which: str, tmp_path: Path) -> None:
    w, params = save(tmp_path / "c")
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{params}/"}).result()
    about = json.loads(store.read(b"w3/zarr.json").result().value)
    for size in (40, 12288):
        part = about["chunk_grid"] if which == "of the array" else about["codecs"][0]
        part["configuration"]["chunk_shape"] = [40, size]
        store.write(b"w3/zarr.json", json.dumps(about).encode()).result()
        forge(params)
        if size == 40:  # so that it is not the way of writing that is refused
            loaded, _ = checkpoint.load_params(tmp_path / "c")
            np.testing.assert_array_equal(loaded["w3"], w + 3)
    assert "w3/zarr.json has pieces of [40, 12288] of [40, 40]" in load(tmp_path / "c")


def test_arrays_that_are_stored_in_another_way_are_refused(tmp_path: Path) -> None:
    _, params = save(tmp_path / "c")
    about = json.loads((params / "_METADATA").read_text())
    (params / "_METADATA").write_text(json.dumps({**about, "use_ocdbt": False}))
    forge(params)
    assert "stored in another way than they should be" in load(tmp_path / "c")


def test_what_unpacks_to_more_than_an_array_has_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    w, params = save(tmp_path / "c")
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{params}/"}).result()
    key = next(key for key in store.list().result() if key.startswith(b"w3") and not key.endswith(b".zarray"))
    store.write(key, store.read(key).result().value).result()  # so that it is not the way of writing that is refused
    forge(params)
    loaded, _ = checkpoint.load_params(tmp_path / "c")
    np.testing.assert_array_equal(loaded["w3"], w + 3)
    packer = zstandard.ZstdCompressor().compressobj()
    store.write(key, b"".join(packer.compress(bytes(2**20)) for _ in range(2**10)) + packer.flush()).result()
    forge(params)
    said = load(tmp_path / "c")
    assert "damaged and not used" in said
    assert "no checkpoint that is whole" in said
    assert int(said.split()[-1]) < 2**9, said
