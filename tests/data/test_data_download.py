"""Downloads from a server in this process: complete or not at all, once, and an error without a network."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from iwae_cli.core.errors import UserError
from iwae_cli.data import files
from iwae_cli.data.base import Dataset
from iwae_cli.data.mnist import KMNIST
from iwae_cli.data.mnist_fixed import Amat, FixedMNIST
from iwae_cli.data.omniglot import Omniglot

NEEDS_NONE = "data=digits needs no files"


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


AMAT = {
    split: "".join(" ".join(map(str, row)) + "\n" for row in np.random.default_rng(n).integers(0, 2, (n, 784))).encode()
    for n, split in ((30, "train"), (11, "validation"), (12, "test"))
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
    for part, n in (("train", 60), ("t10k", 20)):
        images = bytes.fromhex(f"00000803{n:08x}0000001c0000001c") + bytes([n]) * (n * 784)
        labels = bytes.fromhex(f"00000801{n:08x}") + bytes(n)
        server.contents[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(images)
        server.contents[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in server.contents.items()]
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [server.url])
    monkeypatch.setattr(datasets.KMNIST, "resources", resources)
    monkeypatch.setattr(KMNIST, "sizes", (60, 20))
    monkeypatch.setattr(KMNIST, "validation", 7)
    monkeypatch.setattr(KMNIST, "md5", {})


def offer_omniglot(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    savemat(tmp_path / "made.mat", {"data": np.eye(784)[:, :50], "testdata": np.eye(784)[:, :20]})
    server.contents["chardata.mat"] = (tmp_path / "made.mat").read_bytes()
    monkeypatch.setattr(Omniglot, "url", server.url + "chardata.mat")
    monkeypatch.setattr(Omniglot, "md5", hashlib.md5(server.contents["chardata.mat"]).hexdigest())


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_torchvisions_sets_are_fetched_by_torchvision(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer_kmnist(server, monkeypatch)
    root = tmp_path / "not" / "there"
    data = KMNIST(str(root)).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (53, 7, 20)
    assert set(data.test.flatten().tolist()) == {20}
    raw = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    assert everything(root) == {f"KMNIST/raw/{name}" for name in raw}
    asked = len(server.asked)
    KMNIST(str(root)).load()
    assert len(server.asked) == asked


def test_only_what_is_missing_is_put_there(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_fixed(server, monkeypatch)
    kept = tmp_path / "BinaryMNIST" / AMAT_FILES["test"].name
    kept.parent.mkdir()
    kept.write_bytes(AMAT["test"])
    os.utime(kept, ns=(5, 5))
    FixedMNIST(str(tmp_path)).load()
    assert kept.stat().st_mtime_ns == 5
    assert everything(tmp_path) == {f"BinaryMNIST/{file.name}" for file in AMAT_FILES.values()}


def test_a_link_to_another_place_is_followed(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_fixed(server, monkeypatch)
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "BinaryMNIST").symlink_to(tmp_path / "disk")
    assert len(FixedMNIST(str(tmp_path / "data")).load().test) == 12
    assert everything(tmp_path / "disk") == {file.name for file in AMAT_FILES.values()}


def test_omniglot_is_fetched(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_omniglot(server, monkeypatch, tmp_path)
    data = Omniglot(str(tmp_path / "data")).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 5, 20)
    assert everything(tmp_path / "data") == {"OMNIGLOT/chardata.mat"}


SCRIPT = """
import sys
from iwae_cli.data.digits import Digits
from iwae_cli.data.mnist_fixed import Amat, FixedMNIST
url, root, *rest = sys.argv[1:]
FixedMNIST.url = url
FixedMNIST.files = {split: Amat(name, int(n), sha) for split, name, n, sha in zip(*[iter(rest)] * 4)}
Digits().load()
print(sorted({"sklearn", "scipy", "torchvision"} & set(sys.modules)), flush=True)
print(FixedMNIST(root).load().evaluation_split("test", 0).sha256, flush=True)
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


def test_processes_that_race_download_once(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another process and this one.

    The other one imports torchvision for its download, also where torch lacks the operators of its detection models.
    """
    offer_fixed(server, monkeypatch)
    server.wait.clear()
    root = tmp_path / "data"
    other = process(server, root)
    assert other.stdout is not None
    # The digits are read without scikit-learn, and nothing needs torchvision yet.
    assert other.stdout.readline() == "[]\n"
    until(lambda: server.asked)
    with ThreadPoolExecutor() as pool:
        mine = pool.submit(FixedMNIST(str(root)).load)
        time.sleep(0.5)  # this one reaches the lock; without one, it would reach the server
        assert len(server.asked) == 1
        server.wait.set()
        out, err = other.communicate(timeout=60)
        assert other.returncode == 0, err
        assert out == f"{mine.result().evaluation_split('test', 0).sha256}\n"
    # torchvision asks twice: once for redirections, once for the file.
    assert sorted(server.asked) == sorted(2 * [file.name for file in AMAT_FILES.values()])
    assert everything(root) == {f"BinaryMNIST/{file.name}" for file in AMAT_FILES.values()}


def test_files_of_a_killed_process_do_no_harm(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_fixed(server, monkeypatch)
    server.wait.clear()
    killed = process(server, tmp_path)
    until(lambda: server.asked)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    server.wait.set()
    assert ".download.lock" in everything(tmp_path)
    assert len(FixedMNIST(str(tmp_path)).load().train) == 30
    assert everything(tmp_path) == {f"BinaryMNIST/{file.name}" for file in AMAT_FILES.values()}
    assert not [path for path in tmp_path.rglob("*") if "download" in path.name]


def refused(dataset: Dataset, names: list[str], folder: Path) -> str:
    """The message of a download that fails, after checking what every such message says."""
    with pytest.raises(UserError) as caught:
        dataset.load()
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in names)
    assert f"in {folder}, and the download failed (" in message
    assert message.endswith(NEEDS_NONE)
    return message


def test_a_damaged_download_is_not_kept(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_fixed(server, monkeypatch)
    name = AMAT_FILES["validation"].name
    server.contents[name] = server.contents[name].replace(b"1", b"0", 1)
    root = tmp_path / "data"
    message = refused(FixedMNIST(str(root)), [file.name for file in AMAT_FILES.values()], root / "BinaryMNIST")
    assert f"({name} is altered or damaged: its sha256 is " in message
    assert not root.exists()


def test_a_download_that_torchvision_rejects(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_kmnist(server, monkeypatch)
    server.contents["t10k-images-idx3-ubyte.gz"] = gzip.compress(b"rubbish")
    message = refused(KMNIST(str(tmp_path)), ["train-images-idx3-ubyte"], tmp_path / "KMNIST" / "raw")
    assert "t10k-images-idx3-ubyte.gz" in message
    assert everything(tmp_path) == set()


def test_a_download_that_breaks_off(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_omniglot(server, monkeypatch, tmp_path)
    server.contents["chardata.mat"] = server.contents["chardata.mat"][:-10]
    server.lie = 10
    message = refused(Omniglot(str(tmp_path / "data")), ["chardata.mat"], tmp_path / "data" / "OMNIGLOT")
    assert "(chardata.mat is altered or damaged" in message
    assert not (tmp_path / "data").exists()


def test_a_file_that_is_no_longer_offered(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer_omniglot(server, monkeypatch, tmp_path)
    server.contents.clear()
    assert "404" in refused(Omniglot(str(tmp_path / "data")), ["chardata.mat"], tmp_path / "data" / "OMNIGLOT")


def test_a_server_that_says_nothing_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer_fixed(server, monkeypatch)
    server.wait.clear()
    monkeypatch.setattr(files, "TIMEOUT", 0.2)
    start = time.monotonic()
    message = refused(FixedMNIST(str(tmp_path)), [AMAT_FILES["train"].name], tmp_path / "BinaryMNIST")
    assert time.monotonic() - start < 10
    assert "timed out" in message
    assert socket.getdefaulttimeout() is None


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    datasets = files.import_torchvision("torchvision.datasets")
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [url, url])
    monkeypatch.setattr(FixedMNIST, "url", url)
    monkeypatch.setattr(Omniglot, "url", url + "chardata.mat")
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "not" / "there"
    images = ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte", ".gz"]
    amats = [f"binarized_mnist_{part}.amat" for part in ("train", "valid", "test")]
    for dataset, names, folder in (
        (KMNIST("not/there"), images, "KMNIST/raw"),
        (FixedMNIST("not/there"), amats, "BinaryMNIST"),
        (Omniglot("not/there"), ["chardata.mat"], "OMNIGLOT"),
    ):
        assert "refused" in refused(dataset, names, root / folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    root = tmp_path / "file" / "data"
    message = refused(FixedMNIST(str(root)), ["binarized_mnist_train.amat"], root / "BinaryMNIST")
    assert "Not a directory" in message


def test_no_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("torchvision", "torchvision.datasets", "torchvision.datasets.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    message = refused(Omniglot(str(tmp_path)), ["chardata.mat"], tmp_path / "OMNIGLOT")
    assert "torchvision" in message


def test_another_fault_of_torchvision_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("iwae_cli.data.files.importlib.import_module", broken)
    with pytest.raises(RuntimeError, match="something else"):
        files.import_torchvision("torchvision")
