"""Downloads from a server in this process: complete or not at all, once, and an error without a network."""

from __future__ import annotations

import gzip
import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iwae_cli.core.errors import UserError
from iwae_cli.data import files
from iwae_cli.data.base import Dataset
from iwae_cli.data.mnist import KMNIST
from iwae_cli.data.mnist_fixed import Amat, FixedMNIST


class Server(ThreadingHTTPServer):
    """Serves ``contents`` by name; ``wait`` holds every answer back; ``asked`` lists the requests."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.lie = 0  # bytes promised and not sent
        self.wait = threading.Event()
        self.wait.set()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or lost patience is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        self.server.asked.append(name)
        self.server.wait.wait(20)
        content = self.server.contents.get(name)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"") + self.server.lie))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.wait.set()
        running.shutdown()
        thread.join()


PICTURES = {
    split: np.random.default_rng(n).integers(0, 2, (n, 784))
    for n, split in ((30, "train"), (11, "validation"), (12, "test"))
}
AMAT = {
    split: "".join(" ".join(map(str, row)) + "\n" for row in pictures).encode() for split, pictures in PICTURES.items()
}
AMAT_FILES = {
    split: Amat(f"binarized_mnist_{split[:5]}.amat", content.count(b"\n"), hashlib.sha256(content).hexdigest())
    for split, content in AMAT.items()
}


def offer_fixed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.contents = {AMAT_FILES[split].name: content for split, content in AMAT.items()}
    monkeypatch.setattr(FixedMNIST, "url", server.url)
    monkeypatch.setattr(FixedMNIST, "files", AMAT_FILES)


def offer_kmnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = files.import_torchvision("torchvision.datasets")
    for part, n in (("train", 460), ("t10k", 20)):
        images = bytes.fromhex(f"00000803{n:08x}0000001c0000001c") + bytes([n % 256]) * (n * 784)
        labels = bytes.fromhex(f"00000801{n:08x}") + bytes(n)
        server.contents[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(images)
        server.contents[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in server.contents.items()]
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [server.url])
    monkeypatch.setattr(datasets.KMNIST, "resources", resources)
    monkeypatch.setattr(KMNIST, "sizes", (460, 20))
    monkeypatch.setattr(KMNIST, "md5", {})


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_torchvisions_sets_are_fetched_by_torchvision(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer_kmnist(server, monkeypatch)
    root = tmp_path / "not" / "there"
    data = KMNIST(str(root)).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (60, 400, 20)
    assert set(data.test.flatten().tolist()) == {20}
    raw = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    assert everything(root) == {f"KMNIST/raw/{name}" for name in raw}
    asked = len(server.asked)
    KMNIST(str(root)).load()
    assert len(server.asked) == asked


SCRIPT = """
import sys
from iwae_cli.data.digits import Digits
from iwae_cli.data.mnist_fixed import Amat, FixedMNIST
url, root, *rest = sys.argv[1:]
FixedMNIST.url = url
FixedMNIST.files = {split: Amat(name, int(n), sha) for split, name, n, sha in zip(*[iter(rest)] * 4)}
Digits().load()
print(sorted({"sklearn", "scipy", "torchvision"} & set(sys.modules)), flush=True)
FixedMNIST(root).load()
"""


def process(server: Server, root: Path) -> subprocess.Popen[str]:
    arguments = [str(part) for split, file in AMAT_FILES.items() for part in (split, *file)]
    command = [sys.executable, "-c", SCRIPT, server.url, str(root), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_racing_loads_download_once_and_the_files_of_a_killed_process_do_no_harm(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another process is killed while it downloads and two threads of this one wait for its lock."""
    offer_fixed(server, monkeypatch)
    server.wait.clear()
    root = tmp_path / "data"
    other = process(server, root)
    assert other.stdout is not None
    # The digits are read without scikit-learn, and nothing needs torchvision yet.
    assert other.stdout.readline() == "[]\n"
    until(lambda: server.asked)
    with ThreadPoolExecutor() as pool:
        mine = [pool.submit(FixedMNIST(str(root)).load) for _ in range(2)]
        time.sleep(0.5)  # both reach the lock; without one, they would reach the server
        assert len(server.asked) == 1
        other.kill()
        other.communicate()
        server.wait.set()
        for load in mine:
            data = load.result(60)
            for split, pictures in PICTURES.items():
                assert np.array_equal(getattr(data, split), pictures)
                assert np.array_equal(data.evaluation_split(split, 0).x, pictures)
    assert (data.name, data.levels, data.binarization, data.image_shape) == ("mnist_fixed", 2, "fixed", (28, 28))
    # torchvision asks twice: once for redirections, once for the file.
    assert len(server.asked) == 1 + 2 * len(AMAT_FILES)
    assert everything(root) == {f"BinaryMNIST/{file.name}" for file in AMAT_FILES.values()}
    assert not [path for path in root.rglob("*") if "download" in path.name]


def test_a_truncated_or_altered_file_is_named(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_fixed(server, monkeypatch)
    FixedMNIST(str(tmp_path)).load()
    path = tmp_path / "BinaryMNIST" / AMAT_FILES["test"].name
    for wrong in (AMAT["test"][:-1], AMAT["test"].replace(b"1", b"0", 1)):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=f"^{path} "):
            FixedMNIST(str(tmp_path)).load()


def rubbish(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.contents["t10k-images-idx3-ubyte.gz"] = gzip.compress(b"rubbish")


def breaks_off(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "train-images-idx3-ubyte.gz"
    server.contents[name] = server.contents[name][:-10]
    server.lie = 10


def gone(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.contents.clear()


def silent(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.wait.clear()


def altered(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = AMAT_FILES["validation"].name
    server.contents[name] = server.contents[name].replace(b"1", b"0", 1)


def no_folder(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.write_text("not a folder")


def no_torchvision(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.datasets", "torchvision.datasets.utils"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("fault", "kind", "named"),
    [
        (rubbish, KMNIST, "t10k-images-idx3-ubyte.gz"),
        (breaks_off, KMNIST, "train-images-idx3-ubyte"),
        (gone, FixedMNIST, "404"),
        (silent, FixedMNIST, "timed out"),
        (altered, FixedMNIST, AMAT_FILES["validation"].name),
        (no_folder, FixedMNIST, "data_dir=DIR"),
        (no_torchvision, FixedMNIST, "torchvision"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_no_file(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: Callable[[Server, Path, pytest.MonkeyPatch], None],
    kind: type[Dataset],
    named: str,
) -> None:
    (offer_kmnist if kind is KMNIST else offer_fixed)(server, monkeypatch)
    monkeypatch.setattr(files, "TIMEOUT", 0.2)
    root = tmp_path / "data"
    fault(server, root, monkeypatch)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        kind(str(root)).load()  # type: ignore[call-arg]
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert named in message and str(root) in message and "data=digits" in message and "\n" not in message
    assert not root.is_dir() or everything(root) == set()
    assert socket.getdefaulttimeout() is None
