"""Data that a user brings: the arrays of one file, or a folder of images."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwae_cli.core.errors import UserError, check_range, clip
from iwae_cli.core.files import shown
from iwae_cli.core.noise import numpy_generator
from iwae_cli.data.base import SPLITS, Data, GreyBinarization, GreyDataset
from iwae_cli.data.files import read_bytes

ENDINGS = (".npz", ".npy", ".pt", ".mat")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SAVE = "write one with np.savez('x.npz', train=..., validation=..., test=...)"
SAVE_PT = "write one with torch.save({'train': ..., 'validation': ..., 'test': ...}, 'x.pt')"
SHARES = "data.splits=[0.8,0.1,0.1]"
EXACT_REAL = 100
"""Least standard deviation of real values, in steps of float32 at the largest; of one pixel, in its largest error."""
EXACT = 1e-3
"""How far a grey value in [0, 1] may be from a level, in levels."""


class _Own(GreyDataset, ABC):
    """What a file and a folder share; a missing ``path`` is refused when it is needed."""

    def __init__(
        self, path: str | None, splits: list[float] | None, binarization: GreyBinarization, limit: int | None
    ) -> None:
        super().__init__(binarization, limit)
        if splits is not None and not (len(splits) == 3 and min(splits) > 0 and abs(sum(splits) - 1) < 1e-6):
            raise ValueError(f"splits must be the shares of train, validation and test, with sum 1, got {splits}")
        self._shares, self._kind = splits, self.name
        self._path = Path(path).expanduser().absolute() if path else None
        if self._path is not None:
            self.name = f"{self._kind}_{self._path.stem}"

    @cached_property
    def _place(self) -> Path:
        if self._path is None:
            raise UserError(f"data={self._kind} needs a path: write data.path=PATH")
        if not self._path.exists():
            raise self._wrong(f"there is no such {self._kind}")
        if self._path.is_dir() != (self._kind == "folder"):
            raise self._wrong(f"is a {'folder: write data=folder' if self._path.is_dir() else 'file: write data=file'}")
        return self._path

    def _wrong(self, what: str) -> UserError:
        return UserError(f"data.path={shown(self._path or Path())}: {what}")

    @property
    @abstractmethod
    def _sha256(self) -> str:
        """A hash of what decides the data."""

    def fingerprint(self) -> str | None:
        """Return a hash of the content."""
        return self._sha256

    def _made(self, found: Mapping[str, Tensor], image_shape: tuple[int, ...]) -> Data:
        """Return the data of images by split, or of one tensor of images that is divided."""
        source, how, splits = f"the {self._kind} {self._place.name}", "", list(found.values())
        if len(splits) > 1 and self._shares is not None:
            raise self._wrong("has train, validation and test of its own: leave data.splits out")
        if len(splits) == 1:
            (pool,), shares = splits, self._shares
            if shares is None:
                raise self._wrong(f"{len(pool):,} images without splits: write {SHARES}")
            order = torch.from_numpy(numpy_generator("data.splits").random(len(pool)).argsort(kind="stable"))
            ends = [round(len(pool) * share) for share in (shares[0], shares[0] + shares[1])]
            splits = [pool[part] for part in order.tensor_split(ends)]
            for name, part in zip(SPLITS, splits, strict=True):
                if not len(part):
                    raise self._wrong(f"data.splits={shares} of {len(pool):,} images leaves none for {name}")
            how = f", split {'/'.join(f'{share:g}' for share in shares)} by one permutation, which their number decides"
        return self.data([x.flatten(1) for x in splits], image_shape, source, how=how, sha256=self._sha256)


@final
class ArrayFile(_Own):
    """One file with arrays ``train``, ``validation`` and ``test``, or with one array.

    Shapes are (n, pixels), (n, height, width) or (n, channels, height, width). Nothing is unpickled.

    Args:
        path: ``.npz``, ``.npy``, ``.pt`` (a tensor or a dict of them) or ``.mat`` (up to version 7).
        levels: 2: values are 0 and 1. 3 to 256: integers 0 to ``levels`` - 1, or these divided by ``levels`` - 1.
            ``real``: floating point numbers.
        splits: shares of train, validation and test, for one array.
        binarization: of 3 to 256 levels: ``dynamic`` or ``none``.
        limit: training images that are used, from the first; None is all.
    """

    name = "file"

    def __init__(
        self,
        path: str | None = None,
        levels: int | Literal["real"] = 2,
        splits: list[float] | None = None,
        binarization: GreyBinarization = "dynamic",
        limit: int | None = None,
    ) -> None:
        if levels != "real":
            check_range("levels", levels, 2, 256)
        self.levels = None if levels == "real" else levels
        super().__init__(path, splits, binarization, limit)

    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(read_bytes(self._place)).hexdigest()

    def load(self) -> Data:
        """Return the data, see the base class."""
        arrays = self._read()
        if arrays.keys() >= set(SPLITS):
            arrays = {name: arrays[name] for name in SPLITS}
        elif len(arrays) != 1:
            held = clip(", ".join(f"{name} {array.shape}" for name, array in arrays.items()), 100) or "none"
            wanted = f"must hold train, validation and test, or one array for {SHARES}"
            raise self._wrong(f"{wanted}, got {held}{_remedy(arrays)}")
        first = next(iter(arrays))
        image_shape = arrays[first].shape[1:]
        for name, array in arrays.items():
            shape, has = array.shape, f"{name} has shape {array.shape}"
            if shape and not shape[0]:
                raise self._wrong(f"{name} is empty (shape {shape}): every split needs an image")
            if array.dtype.kind not in "biuf":
                raise self._wrong(f"{name} holds {array.dtype}, not numbers: {SAVE}")
            if not 2 <= len(shape) <= 4 or 0 in shape:
                raise self._wrong(f"{has}, not (n, pixels), (n, height, width) or (n, channels, height, width)")
            if shape[1:] != image_shape:
                raise self._wrong(f"{has} and {first} {arrays[first].shape}: all images must be alike")
            if len(shape) == 4 and shape[1] > 4 >= shape[3]:
                raise self._wrong(f"{has}, channels last: save x.transpose(0, 3, 1, 2)")
            finite = np.isfinite(array).reshape(len(array), -1).all(1)
            if not finite.all():
                raise self._wrong(f"{name}[{finite.argmin()}] holds NaN or infinity: all values must be finite")
        return self._made({name: torch.from_numpy(x) for name, x in self._values(arrays).items()}, image_shape)

    def _read(self) -> dict[str, np.ndarray]:
        path = self._place
        if path.suffix not in ENDINGS:
            raise self._wrong(f"must end with {', '.join(ENDINGS)}: {SAVE}")
        content = BytesIO(read_bytes(path))
        try:
            if path.suffix == ".pt":
                found = torch.load(content, map_location="cpu", weights_only=True)
            elif path.suffix == ".mat":
                from scipy.io import loadmat  # which takes longer to import than most files to read

                found = {name: array for name, array in loadmat(content).items() if not name.startswith("__")}
            else:
                found = np.load(content, allow_pickle=False)
            if isinstance(found, list | tuple):
                raise self._wrong(f"holds a {type(found).__name__}, not a tensor or a dict of tensors: {SAVE_PT}")
            named = {"the array": found} if isinstance(found, np.ndarray | Tensor) else dict(found.items())
            return {name: _dense(x) for name, x in named.items()}
        except UserError:
            raise
        except Exception as error:  # damaged files raise errors of many kinds, from struct to zlib
            why = (str(error).splitlines() or [""])[0][:80] or type(error).__name__
            raise self._wrong(f"holds no arrays that can be read without pickle ({why}); {SAVE}") from error

    def _values(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return arrays of uint8, or of float32 if the values are real."""
        least = float(min(array.min() for array in arrays.values()))
        most = float(max(array.max() for array in arrays.values()))
        if least == most:
            raise self._wrong(f"all values are {least:g}: there is nothing to learn")
        if self.levels is not None:
            integers = _integers(arrays, self.levels)
            if integers is not None:
                self._check_scale(integers, arrays)
                return integers
        floating, largest = all(array.dtype.kind == "f" for array in arrays.values()), max(-least, most)
        if self.levels is None and floating and largest <= torch.finfo(torch.float32).max:
            spread = max(float(array.std(dtype=np.float64)) for array in arrays.values())
            if spread < EXACT_REAL * float(np.spacing(np.float32(largest))):
                raise self._wrong(
                    f"holds values from {least:.9g} to {most:.9g}, whose differences float32 would lose: "
                    "subtract their mean before you save them"
                )
            for name, array in arrays.items():
                pixels = array.reshape(len(array), -1)
                spreads, loss = pixels.std(0, dtype=np.float64), np.abs(pixels.astype(np.float32) - pixels).max(0)
                # A pixel that varies by rounding alone may lose that.
                lost = (loss * EXACT_REAL > spreads) & (spreads > 1e-6 * spreads.max())
                if lost.any():
                    first = pixels[:, lost.argmax()]
                    raise self._wrong(
                        f"{name} holds values from {first.min():.9g} to {first.max():.9g} in position {lost.argmax()}, "
                        "whose differences float32 would lose: subtract their mean before you save them"
                    )
            return {name: array.astype(np.float32) for name, array in arrays.items()}
        # Neither fits: say what would.
        few = (2, 256) if most <= 1 or most >= 128 else (int(most) + 1, 256)
        fits = next((n for n in few if _integers(arrays, n) is not None), None)
        way = f"{'' if floating else 'save floats and '}write data.levels=real model.likelihood=gaussian"
        if fits is not None:
            grey = " (and data.binarization=none model.likelihood=discretized_logistic for the levels themselves)"
            way = f"write data.levels={fits}{grey if fits > 2 else ''}"
        elif self.levels is None and floating:
            way = "divide them"
        wanted = "float32 numbers" if self.levels is None else f"{self.levels} levels"
        kinds = " and ".join(sorted({str(array.dtype) for array in arrays.values()}))
        raise self._wrong(f"holds {kinds} values from {least:g} to {most:g}, not {wanted}: {way}")

    def _check_scale(self, integers: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
        tops = {name: int(array.max()) for name, array in integers.items()}
        darkest, brightest = min(tops, key=tops.__getitem__), max(tops, key=tops.__getitem__)
        if tops[darkest] <= 1 < tops[brightest]:
            low, high = arrays[darkest].max(), arrays[brightest].max()
            ends = f"{darkest} holds values up to {low:g}, {brightest} up to {high:g}"
            raise self._wrong(f"{ends}: save all splits on one scale")


def _dense(array: Any) -> np.ndarray:
    if isinstance(array, Tensor):
        return array.detach().to_dense().numpy()
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array)  # MATLAB's sparse matrices


def _remedy(arrays: Mapping[str, np.ndarray]) -> str:
    """Return what is to be done about the names of arrays; empty where that cannot be known."""
    if any(re.search(r"(^|[._])(weight|bias|state_dict)$", name) for name in arrays):
        return ": these are the weights of a network, not its data"
    images = {name: array for name, array in arrays.items() if array.ndim > 1}
    if len(images) == 1 and all(array.ndim != 0 for array in arrays.values()):
        return f": labels are not read, so save {next(iter(images))} alone"
    plain = {name: re.sub(r"^x_?|_?(x|images|data)$", "", name.lower()) for name in images}
    beginnings = {"tr": "train", "va": "validation", "de": "validation", "te": "test"}
    meant = {name: beginnings[text[:2]] for name, text in plain.items() if text[:2] in beginnings}
    missing = [split for split in SPLITS if split not in arrays and split not in meant.values()]
    what = [f"rename {name} to {split}" for name, split in meant.items() if split not in arrays]
    return f": {', '.join(what + [f'add {split}' for split in missing])}" if len(missing) < 3 else ""


def _integers(arrays: Mapping[str, np.ndarray], levels: int) -> dict[str, np.ndarray] | None:
    """Return integers 0 to ``levels`` - 1 as uint8; None if there are others, or 0 and 1 alone of more levels."""
    found = {}
    in_units = all(array.dtype.kind == "f" and array.max() <= 1 for array in arrays.values())
    for name, array in arrays.items():
        scaled = array * np.float64(levels - 1) if in_units else array
        whole = np.rint(scaled)
        if whole.min() < 0 or whole.max() >= levels or abs(whole - scaled).max() > EXACT:
            return None
        found[name] = whole.astype(np.uint8)
    return None if levels > 2 and all(np.isin(array, (0, 1)).all() for array in arrays.values()) else found


@final
class ImageFolder(_Own):
    """The images of a folder, with 8 bits a channel, in natural order: 2.png comes before 10.png.

    Args:
        path: a folder with subfolders train, validation and test, or, with ``splits``, with images at any depth.
        size: height and width to which images are stretched; None: all have one size already.
        colour: three channels; otherwise one.
        splits: shares of train, validation and test.
        binarization: ``dynamic`` or ``none``.
        limit: training images that are used, from the first; None is all.
    """

    name = "folder"
    levels = 256

    def __init__(
        self,
        path: str | None = None,
        size: list[int] | None = None,
        colour: bool = False,
        splits: list[float] | None = None,
        binarization: GreyBinarization = "dynamic",
        limit: int | None = None,
    ) -> None:
        super().__init__(path, splits, binarization, limit)
        if size is not None and not (len(size) == 2 and all(1 <= side <= 4096 for side in size)):
            raise ValueError(f"size must be [height,width], each from 1 to 4096, got {size}")
        if colour and binarization == "dynamic":
            raise ValueError("colour=true needs data.binarization=none, with model.likelihood=discretized_logistic")
        self._size, self._colour = size, colour

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The files of each subfolder that is a split; all of them, if there are no such folders."""
        there = [name for name in SPLITS if (self._place / name).is_dir()]
        if 0 < len(there) < 3 and self._shares is None:
            raise self._wrong(f"has {' and '.join(there)}, not train, validation and test: add them, or write {SHARES}")
        found = {}
        for name in SPLITS if len(there) == 3 else ("",):
            top = self._place / name
            inner = [path.relative_to(top) for path in top.rglob("*") if path.name.lower().endswith(IMAGE_ENDINGS)]
            seen = [path for path in inner if not any(part.startswith(".") for part in path.parts)]
            found[name] = [top / path for path in sorted(seen, key=lambda path: (_natural(str(path)), str(path)))]
            if not found[name]:
                raise self._wrong(f"no image{' in ' * bool(name)}{name} (endings {', '.join(IMAGE_ENDINGS)})")
        return found

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for path in chain(*self._files.values()):
            content = read_bytes(path)
            digest.update(f"{path.relative_to(self._place).as_posix()} {len(content)} ".encode())
            digest.update(content)
        return digest.hexdigest()

    def load(self) -> Data:
        """Return the data, see the base class."""
        found = {name: [self._image(path) for path in files] for name, files in self._files.items()}
        first = next(iter(found.values()))[0]
        for name, images in found.items():
            for path, image in zip(self._files[name], images, strict=True):
                if image.shape != first.shape:
                    sizes = f"is {_size(image.shape)} and the first image {_size(first.shape)}"
                    raise self._wrong(f"{path.name} {sizes}: write data.size=[HEIGHT,WIDTH]")
        if all((image == first.flat[0]).all() for images in found.values() for image in images):
            raise self._wrong(f"all values are {first.flat[0]}: there is nothing to learn")
        return self._made({name: torch.from_numpy(np.stack(images)) for name, images in found.items()}, first.shape)

    def _image(self, path: Path) -> UInt8[np.ndarray, "*image"]:
        from PIL import Image

        name = path.relative_to(self._place).as_posix()
        try:
            with Image.open(path) as image:
                deep = _more_than_8_bits(image)
                sheer = image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255
                fault = "transparent pixels" if sheer else "more than 8 bits" if deep else ""
                flat = image.convert("RGB" if self._colour else "L")
        except Exception as error:  # damaged files raise errors of many kinds
            raise self._wrong(f"{name} cannot be read as an image; mend it or move it away") from error
        if fault:
            raise self._wrong(f"{name} has {fault}: save it without")
        if self._size is not None:
            height, width = self._size
            flat = flat.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(flat)
        return pixels.transpose(2, 0, 1) if self._colour else pixels


def _more_than_8_bits(image: Any) -> bool:
    """Return whether a picture that is not read yet has more than 8 bits a channel.

    Pillow calls colours of 16 bits "RGB" and keeps 8; the layout in the file tells.
    """
    bits = getattr(image, "tag_v2", {}).get(258, (8,))  # BitsPerSample of TIFF
    png = any(re.search(";16[BLN]", str(part.args)) for part in image.tile)  # 'RGB;16B'
    ppm = any(part.codec_name.startswith("ppm") and part.args[-1] > 255 for part in image.tile)  # ('RGB', 65535)
    return image.mode[0] in "IF" or max(bits) > 8 or png or ppm


def _natural(name: str) -> list[int | str]:
    return [int(part) if number % 2 else part for number, part in enumerate(re.split("([0-9]+)", name))]


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[-2:]))
