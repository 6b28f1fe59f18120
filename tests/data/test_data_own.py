"""Files and folders of a user: what is read, how it is divided, and what is refused."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix
from small_runs import TINY, finished, read_json, run

from iwae_cli.core.errors import UserError
from iwae_cli.data.base import SPLITS
from iwae_cli.data.digits import Digits
from iwae_cli.data.own import ArrayFile, ImageFolder

RANDOM = np.random.default_rng(0)
SIZES = {"train": 20, "validation": 6, "test": 9}


def bits(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 2, shape, dtype=np.uint8)


def reals(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


def greys(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def splits(make: Callable[..., np.ndarray], *shape: int) -> dict[str, np.ndarray]:
    return {name: make(n, *shape) for name, n in SIZES.items()}


def save(path: str, arrays: dict[str, np.ndarray]) -> str:
    if path.endswith(".npz"):
        np.savez(path, **arrays)
    elif path.endswith(".npy"):
        np.save(path, *arrays.values())
    elif path.endswith(".mat"):
        savemat(path, arrays)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


@pytest.mark.parametrize("ending", ["npz", "pt", "mat"])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 2, 2)])
def test_every_format_and_shape_holds_what_was_saved(ending: str, shape: tuple[int, ...]) -> None:
    for levels, make, kind in (
        (2, lambda *s: bits(*s).astype(bool if ending == "pt" else float), (2, "fixed")),
        (256, greys, (256, "dynamic")),
        ("real", reals, (None, "none")),
    ):
        arrays = splits(make, *shape)
        data = ArrayFile(save(f"x.{ending}", arrays), levels=levels).load()
        for name in SPLITS:
            expected = torch.from_numpy(arrays[name]).flatten(1)
            assert torch.equal(getattr(data, name), expected.float() if levels == "real" else expected)
        assert (data.name, data.image_shape) == ("file_x", shape)
        assert (data.levels, data.binarization) == kind


def test_grey_values_divided_by_white_are_the_levels_again() -> None:
    arrays = splits(greys, 3, 3)
    whole = ArrayFile(save("x.npz", arrays), levels=256, binarization="none").load()
    divided = {name: (array / 255).astype(np.float32) for name, array in arrays.items()}
    parts = ArrayFile(save("y.npz", divided), levels=256, binarization="none").load()
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in SPLITS)
    assert parts.name == "file_y_grey" and "not binarized" in parts.protocol


@pytest.mark.parametrize("save_one", [np.save, lambda path, x: torch.save(torch.from_numpy(x), path)])
def test_one_array_is_divided_by_a_permutation_that_its_length_alone_decides(save_one: Callable[..., None]) -> None:
    path = "x.npy" if save_one is np.save else "x.pt"
    numbers = np.arange(100.0)[:, None].repeat(3, 1)
    save_one(path, numbers)
    data = ArrayFile(path, "real", [0.7, 0.2, 0.1]).load()
    found = [getattr(data, name)[:, 0].tolist() for name in SPLITS]
    assert [len(part) for part in found] == [70, 20, 10]
    assert sorted(number for part in found for number in part) == list(range(100)) and found[0] != list(range(70))
    save_one(path, numbers[:, :2] + 1000)
    again = ArrayFile(path, "real", [0.7, 0.2, 0.1]).load()
    assert (again.test[:, 0] - 1000).tolist() == found[2]
    assert "split 0.7/0.2/0.1 by one permutation" in data.protocol


@pytest.mark.parametrize("kind", [ArrayFile, Digits])
def test_the_first_training_images_are_in_name_and_protocol(kind: type[ArrayFile] | type[Digits]) -> None:
    how = {"path": save("x.npz", splits(bits, 4))} if kind is ArrayFile else {}
    whole, few = kind(**how).load(), kind(**how, limit=5).load()
    assert few.name == f"{whole.name}_first5"
    assert few.protocol.startswith(f"5 training (the first of {len(whole.train):,}), {len(whole.validation)} valid")
    assert torch.equal(few.train, whole.train[:5]) and torch.equal(few.test, whole.test)
    assert few.sha256() != whole.sha256()
    for limit in (0, len(whole.train) + 1):
        with pytest.raises(UserError, match=r"^data\.limit must be null or from 1 to "):
            kind(**how, limit=limit).load()


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_a_folder_is_read_in_natural_order_at_any_depth() -> None:
    for split, n in SIZES.items():
        for i in range(n):
            picture(Path("own", split, "abc"[i // 12], f"im{i}.png"), np.full((4, 6), i, dtype=np.uint8))
    (Path("own") / "train" / "notes.txt").write_text("no image")
    for hidden in (".ipynb_checkpoints/im1-checkpoint.png", ".im2.png"):
        picture(Path("own", "train", hidden), np.full((4, 6), 99, dtype=np.uint8))
    data = ImageFolder("own").load()
    assert (data.name, data.image_shape, data.levels) == ("folder_own", (4, 6), 256)
    assert [data.train[:, 0].tolist(), data.test[:, 7].tolist()] == [list(range(20)), list(range(9))]
    pool = ImageFolder("own/train", splits=[0.5, 0.25, 0.25]).load()
    assert sorted(torch.cat([pool.train, pool.validation, pool.test])[:, 0].tolist()) == list(range(20))


def test_colour_grey_and_size() -> None:
    for i in range(10):
        picture(Path("own", f"{i}.png"), np.stack([np.full((4, 4), c, dtype=np.uint8) for c in (200, 100, i)], -1))
    how: dict[str, Any] = {"splits": [0.8, 0.1, 0.1]}
    colour = ImageFolder("own", colour=True, binarization="none", **how).load()
    assert colour.image_shape == (3, 4, 4)
    channels = torch.cat([colour.train, colour.validation, colour.test]).view(10, 3, 16)
    assert (channels[:, 0] == 200).all() and (channels[:, 1] == 100).all()
    assert sorted(channels[:, 2, 0].tolist()) == list(range(10))
    grey = ImageFolder("own", size=[2, 3], **how).load()
    assert grey.image_shape == (2, 3)
    # The luma of ITU-R 601, rounded.
    assert abs(int(grey.train[0, 0]) - (0.299 * 200 + 0.587 * 100)) <= 2


def test_content_decides_the_identity_and_the_path_does_not() -> None:
    arrays = splits(bits, 4)
    save("x.npz", arrays)
    first = ArrayFile("x.npz").fingerprint()
    Path("x.npz").rename("moved.npz")
    assert ArrayFile("moved.npz").fingerprint() == first
    arrays["test"][0, 0] ^= 1
    assert ArrayFile(save("x.npz", arrays)).fingerprint() != first
    for i in range(3):
        picture(Path("own", f"{i}.png"), greys(4, 4))
    whole = ImageFolder("own").fingerprint()
    assert ImageFolder(str(Path("own").rename("other"))).fingerprint() == whole
    Path("other/2.png").rename("other/3.png")
    assert ImageFolder("other").fingerprint() != whole


def wrong_dtype() -> dict[str, np.ndarray]:
    return {**splits(bits, 4), "train": np.array([["a", "b", "c", "d"]])}


def with_nan() -> dict[str, np.ndarray]:
    arrays = {name: array.astype(np.float32) for name, array in splits(bits, 4).items()}
    arrays["validation"][3, 1] = np.nan
    return arrays


REAL = "write data.levels=real model.likelihood=gaussian"
WRONG: dict[str, tuple[Callable[[], dict[str, np.ndarray]], dict[str, Any], str]] = {
    "grey levels as binary": (lambda: splits(greys, 4), {}, "uint8 values from to 25 write data.levels=256"),
    "few levels": (lambda: splits(lambda *s: greys(*s) % 17, 40), {}, "write data.levels=17"),
    "too many levels": (
        lambda: splits(lambda *s: greys(*s) * np.int64(9), 4),
        {"levels": 256},
        f"save floats and {REAL}",
    ),
    "binary as grey": (lambda: splits(bits, 4), {"levels": 256}, "write data.levels=2"),
    "integers as real": (lambda: splits(greys, 4), {"levels": "real"}, "write data.levels=256"),
    "real as binary": (lambda: splits(reals, 4), {}, f"float64 {REAL}"),
    "shares as grey": (lambda: splits(lambda *s: RANDOM.random(s), 4), {"levels": 256}, REAL),
    "negative": (lambda: splits(lambda *s: greys(*s).astype(int) - 300, 4), {"levels": 256}, "from - save floats"),
    "huge": (lambda: splits(lambda *s: reals(*s) * 1e39, 4), {"levels": "real"}, "float32"),
    "text": (wrong_dtype, {}, "train holds <U1 np.savez"),
    "complex": (lambda: splits(lambda *s: bits(*s) * 1j, 4), {}, "complex128 np.savez"),
    "NaN": (with_nan, {"levels": "real"}, "validation[3] NaN"),
    "one dimension": (lambda: splits(bits), {}, "train has shape (20,) (n, pixels)"),
    "no image": (lambda: {**splits(bits, 4), "test": bits(0, 4)}, {}, "test is empty (shape (0, 4))"),
    "black": (lambda: splits(lambda *s: 0 * bits(*s), 4), {}, "all values are 0: there is nothing to learn"),
    "black grey": (lambda: splits(lambda *s: 0 * bits(*s), 4), {"levels": 256}, "all values are 0: nothing to learn"),
    "two scales": (
        lambda: {**splits(bits, 4), "test": np.array([[0, 255, 255, 0]] * 9, np.uint8)},
        {"levels": 256},
        "train holds values up to 1, test up to 255: save all splits on one scale",
    ),
    "offset": (
        lambda: splits(lambda *s: 1e9 + np.linspace(0, 1, 80)[: np.prod(s)].reshape(s), 4),
        {"levels": "real"},
        "float32 would lose: subtract their mean",
    ),
    "offset that float32 has lost": (
        lambda: splits(lambda *s: (1e7 + RANDOM.normal(size=s)).astype(np.float32), 4),
        {"levels": "real"},
        "float32 would lose: subtract their mean",
    ),
    "offset of one column": (
        lambda: splits(lambda *s: np.array([1.7e9, 0, 0, 0.1]) + [1, 1, 1, 0] * RANDOM.normal(size=s), 4),
        {"levels": "real"},
        "train in position 0 float32 would lose: subtract their mean",
    ),
    "huge values": (lambda: splits(lambda *s: (1e30 * reals(*s)).astype(np.float32), 4), {"levels": "real"}, ""),
    "float32, which loses nothing": (
        lambda: splits(lambda *s: (np.array([1.7e6, 0]) + RANDOM.integers(0, 4, s)).astype(np.float32), 2),
        {"levels": "real"},
        "",
    ),
    "a constant pixel that rounding moves": (
        lambda: splits(lambda *s: np.array([0, 0.1]) + [1, 1e-12] * RANDOM.normal(size=s), 2),
        {"levels": "real"},
        "",
    ),
    "unequal sizes": (lambda: {**splits(bits, 4), "test": bits(3, 5)}, {}, "test (3, 5) train (20, 4)"),
    "channels last": (lambda: splits(bits, 8, 8, 3), {}, "(20, 8, 8, 3) transpose(0, 3, 1, 2)"),
    "unknown name": (lambda: {**splits(bits, 4), "val": bits(3, 4), "validation": bits(3, 4)}, {}, ""),
    "a split is missing": (lambda: {"train": bits(3, 4), "val": bits(3, 4)}, {}, "rename val to validation, add test"),
    "other names": (lambda: {f"x_{n[:5]}": x for n, x in splits(bits, 4).items()}, {}, "rename x_valid to validation"),
    "labels": (lambda: {"x": bits(9, 4), "y": bits(9)}, {}, "labels are not read, so save x alone"),
    "weights": (lambda: {"net.weight": reals(9, 4), "net.bias": reals(9)}, {}, "weights of a network"),
    "no splits": (lambda: {"x": bits(9, 4)}, {}, "9 images data.splits=[0.8,0.1,0.1]"),
    "splits twice": (lambda: splits(bits, 4), {"splits": [0.8, 0.1, 0.1]}, "leave data.splits out"),
    "an empty split": (lambda: {"x": bits(5, 4)}, {"splits": [0.98, 0.01, 0.01]}, "none for validation"),
}
"""Arrays, keys, and the words of the line; an empty text: they are read."""


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_one_line_that_says_what_to_write(case: str) -> None:
    make, keys, words = WRONG[case]
    kind = ArrayFile(save("x.npz", make()), **keys)
    if not words:
        kind.load()
        return
    with pytest.raises(UserError) as refusal:
        kind.load()
    message = str(refusal.value)
    assert message.startswith("data.path=x.npz: ") and "\n" not in message and len(message) <= 300, message
    assert not [word for word in words.split() if word not in message], message


def test_sparse_matrices_are_read_and_what_is_no_dict_is_named() -> None:
    arrays = splits(bits, 6)
    savemat("x.mat", {name: csc_matrix(array.astype(float)) for name, array in arrays.items()})
    assert torch.equal(ArrayFile("x.mat").load().test, torch.from_numpy(arrays["test"]))
    torch.save(tuple(map(torch.from_numpy, arrays.values())), "x.pt")
    with pytest.raises(
        UserError, match=r"^data.path=x.pt: holds a tuple, not a tensor or a dict .* torch.save\(\{'train'"
    ):
        ArrayFile("x.pt").load()


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.pt", "x.mat", "x.csv", "x"])
def test_other_content_is_one_line_and_nothing_is_unpickled(name: str) -> None:
    array = np.array([Trap()])
    whole = b""
    if name[1:] in (".npz", ".npy"):
        (np.savez if name == "x.npz" else np.save)(name, array, allow_pickle=True)
        whole = Path(name).read_bytes()
    for content in (b"1,2,3\n4,5,6\n", b"", pickle.dumps(Trap()), whole, whole[:-9]):
        Path(name).write_bytes(content)
        with pytest.raises(UserError) as refusal:
            ArrayFile(name, "real", [0.8, 0.1, 0.1]).load()
        message = str(refusal.value)
        assert message.startswith(f"data.path={name}: ") and "\n" not in message and len(message) <= 300, message
        assert "np.savez" in message
    assert not Path("sprung").exists()


def png_of_16_bits(colours: np.ndarray) -> bytes:
    """Return a file that Pillow reads and cannot write (PNG specification, sections 5 and 11)."""
    height, width, _ = colours.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colours)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(lines),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_wrong_images_are_one_line() -> None:
    def refused(words: str, **keys: Any) -> None:
        with pytest.raises(UserError) as refusal:
            ImageFolder("own", **keys).load()
        message = str(refusal.value)
        assert message.startswith("data.path=own") and "\n" not in message and len(message) <= 300, message
        assert not [word for word in words.split() if word not in message], message

    shares = {"splits": [0.8, 0.1, 0.1]}
    refused("no such folder")
    Path("own").mkdir()
    refused("no image .png")
    for i in range(10):
        picture(Path("own", f"{i}.png"), greys(4, 4))
    refused("10 images data.splits=[0.8,0.1,0.1]")
    for i in range(3):
        picture(Path("black", f"{i}.png"), np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="all values are 0: there is nothing to learn"):
        ImageFolder("black", **shares).load()
    picture(Path("own", "9.png"), greys(4, 5))
    refused("9.png 4x5 4x4 data.size=", **shares)
    assert ImageFolder("own", size=[4, 4], **shares).load().image_shape == (4, 4)
    picture(Path("own", "9.png"), greys(4, 4).astype(np.uint16) * 200)
    refused("9.png 8 bits", **shares)
    Path("own", "9.png").write_bytes(png_of_16_bits(RANDOM.integers(0, 2**16, (4, 4, 3))))
    refused("9.png 8 bits", **shares)
    Path("own", "9.png").unlink()
    deep = b"P6 4 4 65535\n" + RANDOM.integers(0, 2**16, (4, 4, 3)).astype(">u2").tobytes()
    Path("own", "9.ppm").write_bytes(deep)
    refused("9.ppm 8 bits", **shares)
    Path("own", "9.ppm").write_bytes(b"P6 4 4 255\n" + greys(4, 4, 3).tobytes())
    ImageFolder("own", **shares).load()
    Path("own", "9.ppm").unlink()
    Image.fromarray(greys(4, 4, 3)).save("own/9.tif", compression="tiff_lzw")
    ImageFolder("own", **shares).load()
    Path("own", "9.tif").unlink()
    picture(Path("own", "9.png"), np.concatenate([greys(4, 4, 3), np.full((4, 4, 1), 9, np.uint8)], -1))
    refused("9.png transparent", **shares)
    picture(Path("own", "9.png"), np.concatenate([greys(4, 4, 3), np.full((4, 4, 1), 255, np.uint8)], -1))
    ImageFolder("own", **shares).load()
    Path("own", "9.png").write_text("text")
    refused("9.png image", **shares)
    Path("own", "9.png").unlink()
    Path("own", "train").mkdir()
    refused("has train, not train, validation data.splits")
    (Path("own") / "train").rmdir()
    Path("own.npz").mkdir()
    with pytest.raises(UserError, match=r"own\.npz: is a folder: write data=folder"):
        ArrayFile("own.npz").load()
    with pytest.raises(ValueError, match=r"^size must be \[height,width\]"):
        ImageFolder("own", size=[4])
    with pytest.raises(ValueError, match=r"^colour=true needs data\.binarization=none"):
        ImageFolder("own", colour=True)


def test_the_command_line_reads_and_refuses(tmp_path: Path) -> None:
    save("x.npz", splits(bits, 8, 8))
    folder = finished(tmp_path / "out", *TINY, "data=file", "data.path=x.npz", "data.limit=15")
    assert folder.name.startswith("file_x_first15-gaussian_mlp_3-")
    # A finished run needs no file, and another content is another run.
    Path("x.npz").rename("y.npz")
    code, out, err = run(*TINY, "data=file", "data.path=x.npz", "data.limit=15", f"output_dir={tmp_path / 'out'}")
    assert code == 0 and "trained already" in out, err
    assert read_json(folder / "result.json")["dataset"]["name"] == "file_x_first15"
    for line, words in {
        ("data=file",): "data.path=PATH",
        ("data=file", "data.path=no.npz"): "data.path=no.npz: there is no such file",
        ("data=file", "data.path=y.npz", "data.levels=257"): "data.levels must be <= 256",
        ("data=file", "data.path=y.npz", "data.splits=[0.8,0.1]"): "data.splits must be the shares",
        ("data=file", "data.path=y.npz", "data.levels=real"): "model.likelihood=gaussian",
        ("data=file", "data.path=y.npz", "data.levels=17", "data.binarization=none"): "discretized_logistic",
        ("data=folder", "data.path=y.npz"): "is a file: write data=file",
    }.items():
        before = sorted(Path().iterdir())
        code, out, err = run(*line, "logger=disabled")
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1 and len(err) <= 320, err
        assert sorted(Path().iterdir()) == before
