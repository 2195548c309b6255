"""Remote shards: a real HTTP server and an S3 endpoint on loopback, with cut connections."""

import errno
import hashlib
import multiprocessing
import os
import socket
import socketserver
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import ClientTimeout
from filelock import FileLock
from http_server import Server
from loader_helpers import jpeg, open_loader, write_shards

from pipeline.data import shard_cache as cache_module
from pipeline.data.batch import LoaderConfig
from pipeline.data.crops import Crop
from pipeline.data.datasets import steps_ahead
from pipeline.data.order import Order
from pipeline.data.shard_cache import CacheError, ShardCache
from shard_tools import remote
from shard_tools.manifest import Manifest, Shard, read_manifest

SHARD = 200_000  # bytes of the plain shards below


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.stopping.set()
        server.shutdown()


def plain(server: Server, count: int = 5) -> Manifest:
    """A manifest of `count` shards of random bytes, and the server that has them."""
    rng, shards = np.random.default_rng(0), []
    for number in range(count):
        data = rng.bytes(SHARD)
        server.files[f"/s{number}.tar"] = data
        shards.append(Shard(f"s{number}.tar", 1, SHARD, hashlib.sha256(data).hexdigest()))
    return Manifest(server.url, tuple(shards), home=server.url)


def cached(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def test_a_shard_is_fetched_once_and_whole(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(plain(server), tmp_path)
    for _ in range(3):
        assert cache.read(2, 1000, 50) == server.files["/s2.tar"][1000:1050]
    assert cache.read(2, SHARD - 5, 50) == server.files["/s2.tar"][-5:]
    assert server.counts["/s2.tar"] == 1
    assert cached(tmp_path) == [tmp_path / f"{cache.manifest.shards[2].sha256}.tar"]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("fault", ["cut", "flip", "stall", "busy"])
def test_faults_on_the_way_are_tried_again(server, tmp_path, fault, caplog, monkeypatch) -> None:
    monkeypatch.setattr(remote, "STALL", 1.0)
    cache = ShardCache(plain(server), tmp_path, pause=0.01)
    server.faults["/s0.tar"] = [fault] * 3
    assert cache.read(0, 0, SHARD) == server.files["/s0.tar"]
    assert server.counts["/s0.tar"] == 4
    assert caplog.text.count("trying again") == 3


def test_an_index_may_take_its_time(server: Server, tmp_path: Path, monkeypatch) -> None:
    """aiohttp ends a download after five minutes, however large it is."""
    monkeypatch.setenv("RELAXMIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", ClientTimeout(total=0.5))
    server.put(write_shards(tmp_path, [[jpeg(n) for n in range(9)]]))
    folder = read_manifest(server.url)

    def slowly(out: Any, data: bytes) -> None:
        for first in range(0, len(data), 32):
            out.write(data[first : first + 32])
            out.flush()
            time.sleep(0.1)

    monkeypatch.setattr(server, "write", slowly)
    assert len(folder.index) == 9


@pytest.mark.parametrize("fault", ["cut", "stall", "busy"])
def test_a_manifest_and_its_index_are_asked_for_again(
    server: Server, tmp_path: Path, fault: str, caplog, monkeypatch
) -> None:
    monkeypatch.setenv("RELAXMIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "STALL", 1.0)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    server.put(write_shards(tmp_path, [[jpeg(n) for n in range(9)]]))
    server.faults = {"/manifest.json": [fault] * 2, "/index.bin": [fault] * 2}
    assert len(read_manifest(server.url).index) == 9
    assert server.counts == {"/manifest.json": 3, "/index.bin": 3}
    assert caplog.text.count("trying again") == 4


def test_faults_without_end_are_one_sentence(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(plain(server), tmp_path, pause=0.001)
    server.faults["/s0.tar"] = ["flip"] * 99
    with pytest.raises(
        CacheError, match=r"/s0\.tar: cannot be fetched, 6 tries .* sha256"
    ) as error:
        cache.fetch(0)
    assert "\n" not in str(error.value)
    server.faults["/s1.tar"] = ["cut"] * 99
    with pytest.raises(CacheError, match="6 tries failed, the last one: "):
        cache.fetch(1)
    del server.files["/s2.tar"]
    with pytest.raises(CacheError, match=r"/s2\.tar: cannot be fetched \(not found\)"):
        cache.fetch(2)
    assert server.counts["/s2.tar"] == 1  # what is not there is not asked for again
    assert not cached(tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_the_bound_holds_and_the_oldest_goes(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(plain(server), tmp_path, limit=3 * SHARD + 10)
    for shard in (0, 1, 2, 0, 3):  # 1 is the one unused for longest when 3 comes
        cache.read(shard, 0, 1)
        time.sleep(0.01)
        assert sum(path.stat().st_size for path in cached(tmp_path)) <= cache.limit
    names = {path.stem for path in cached(tmp_path)}
    assert names == {cache.manifest.shards[s].sha256 for s in (0, 2, 3)}
    cache.read(1, 0, 1)
    assert server.counts["/s1.tar"] == 2
    with pytest.raises(
        CacheError, match=f"a cache of 10 bytes cannot hold s0.tar of {SHARD} bytes"
    ):
        ShardCache(cache.manifest, tmp_path, limit=10)


def _reader(manifest: Manifest, folder: Path, limit: int, seed: int, results) -> None:
    rng, cache = np.random.default_rng(seed), ShardCache(manifest, folder, limit, pause=0.01)
    digests, most = set(), 0
    for _ in range(12):
        shard = int(rng.integers(len(manifest.shards)))
        data = cache.read(shard, 0, SHARD)
        digests.add(hashlib.sha256(data).hexdigest() == manifest.shards[shard].sha256)
        sizes = []
        for path in folder.glob("*.tar"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # evicted as we looked
                continue
        most = max(most, sum(sizes))
    results.put((digests, most))


@pytest.mark.parametrize("limit", [2 * SHARD, 9 * SHARD])
def test_processes_share_one_cache(server: Server, tmp_path: Path, limit: int) -> None:
    manifest = plain(server)
    server.delay = 0.02
    server.faults = {f"/s{n}.tar": ["cut"] for n in range(5)}
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [
        context.Process(target=_reader, args=(manifest, tmp_path, limit, seed, results))
        for seed in range(4)
    ]
    for reader in readers:
        reader.start()
    outcomes = [results.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join(10)
    assert all(digests == {True} for digests, _ in outcomes)
    assert max(most for _, most in outcomes) <= limit
    if limit > 5 * SHARD:  # nothing is evicted: two requests each, the cut one and a whole one
        assert server.counts == {f"/s{n}.tar": 2 for n in range(5)}


def test_a_shard_that_is_complete_as_we_look_counts(server, tmp_path, monkeypatch) -> None:
    cache = ShardCache(plain(server), tmp_path, limit=2 * SHARD)
    cache.fetch(0)
    partial = tmp_path / f"{cache.manifest.shards[1].sha256}.{SHARD}.part"
    partial.write_bytes(server.files["/s1.tar"])

    def completed(path: Path) -> bool:  # another process names it and frees its lock just now
        path.rename(cache._path(1))
        return True

    monkeypatch.setattr(cache_module, "_abandoned", completed)
    cache.fetch(2)
    assert cached(tmp_path) == sorted(cache._path(n) for n in (1, 2))


def test_leftovers_of_a_killed_process_are_no_burden(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(plain(server), tmp_path, limit=2 * SHARD)
    own, other = (cache.manifest.shards[n].sha256 for n in (0, 1))
    (tmp_path / f"{own}.{SHARD}.part").write_bytes(b"half")
    (tmp_path / f"{other}.{SHARD}.part").write_bytes(b"half")
    cache.fetch(0)
    cache.fetch(2)
    assert len(cached(tmp_path)) == 2
    assert not list(tmp_path.glob("*.part"))


def test_a_reservation_of_a_living_process_counts(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(plain(server), tmp_path, limit=2 * SHARD)
    cache.fetch(0)
    held = cache.manifest.shards[1].sha256
    with FileLock(tmp_path / f"{held}.lock"):
        (tmp_path / f"{held}.{SHARD}.part").touch()
        cache.fetch(2)  # shard 0 must go
        assert len(cached(tmp_path)) == 1


def test_a_full_disk_is_one_sentence(server: Server, tmp_path: Path, monkeypatch) -> None:
    def full(url: str, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "copy_file", full)
    with pytest.raises(CacheError, match="the disk of the cache is full"):
        ShardCache(plain(server), tmp_path).fetch(0)


def test_a_disk_smaller_than_the_limit_bounds_the_cache(
    server: Server, tmp_path: Path, monkeypatch
) -> None:
    others = 0  # bytes of other programs on a disk of 3.5 shards

    def usage(folder: Path) -> SimpleNamespace:
        held = sum(path.stat().st_size for path in folder.iterdir())
        return SimpleNamespace(free=7 * SHARD // 2 - others - held)

    monkeypatch.setattr(cache_module.shutil, "disk_usage", usage)
    cache = ShardCache(plain(server), tmp_path)
    for shard in range(5):
        cache.fetch(shard)
    assert len(cached(tmp_path)) == 3
    others = SHARD // 2
    cache.fetch(0)
    assert cached(tmp_path) == sorted(cache._path(shard) for shard in (0, 4))
    for path in cached(tmp_path):
        path.unlink()
    others = 7 * SHARD // 2
    with pytest.raises(CacheError, match="the disk of the cache is full; make room"):
        cache.fetch(1)
    with pytest.raises(CacheError, match=r"cannot hold s0.tar .* folder on a larger disk"):
        ShardCache(plain(server), tmp_path)


def test_names_from_a_manifest_stay_in_the_folder(tmp_path: Path) -> None:
    wrong = Manifest("http://127.0.0.1:1", (Shard("a.tar", 1, 10, "../../evil"),), home="here")
    with pytest.raises(CacheError, match=r"here: a\.tar has no valid sha256"):
        ShardCache(wrong, tmp_path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [[jpeg(10 * s + i) for i in range(6)] for s in range(6)]
    return write_shards(tmp_path_factory.mktemp("shards"), images)


def pixels(folder: object, workers: int = 0, **options: object) -> torch.Tensor:
    loader = open_loader(
        folder, batch_size=12, micro_batch=12, rank=0, world=1, seed=0, start_step=1,
        total_steps=6, crop=Crop(16), workers=workers, partitions=2, window=2, **options,
    )  # fmt: skip
    return torch.cat([batch.image for batch in loader])


def test_training_from_http_equals_training_from_disk(server, shards, tmp_path) -> None:
    server.put(shards)
    server.faults = {f"/t-{n:06d}.tar": ["cut", "flip"] for n in range(3)}
    expected = pixels(shards)
    assert torch.equal(pixels(server.url, workers=2, cache=tmp_path), expected)
    before = sum(server.counts.values())
    assert torch.equal(pixels(server.url, cache=tmp_path), expected)  # all is there now
    assert sum(server.counts.values()) <= before + 4  # manifest and index only
    assert len(cached(tmp_path)) == 6


def test_after_closing_nothing_is_fetched(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(plain(server), tmp_path)
    server.delay = 0.3
    for shard in range(5):
        cache.fetch_ahead(shard)
    cache.close()  # at the latest the first shard was under way
    there = cached(tmp_path)
    assert len(there) < 5
    time.sleep(0.7)
    assert cached(tmp_path) == there
    cache.fetch(4)  # what is read is still fetched


def test_ahead_of_need_another_process_is_left_alone(server: Server, tmp_path: Path) -> None:
    """A shard that is being fetched elsewhere is not waited for: the next ones come."""
    cache = ShardCache(plain(server), tmp_path)
    with FileLock(tmp_path / f"{cache.manifest.shards[0].sha256}.lock"):
        for shard in range(5):
            cache.fetch_ahead(shard)
        assert arrived(tmp_path, 4)
        assert server.counts["/s0.tar"] == 0
    cache.fetch_ahead(0)  # asked for again, since it has not come
    assert arrived(tmp_path, 5)
    cache.close()
    assert max(server.counts.values()) == 1


def arrived(folder: Path, count: int) -> bool:
    """Whether so many shards come within ten seconds."""
    for _ in range(200):
        if len(cached(folder)) == count:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("local", "held", "steps"),
    [("2", 40, 50), ("2", 39, 32), ("", 40, 50), ("", 39, 32), ("1", 22, 50), ("1", 21, 32)],
)
def test_a_window_is_fetched_ahead_where_two_fit(monkeypatch, local, held, steps) -> None:
    """4 partitions, windows of 5 of 40 shards of 20 samples, 2 of a partition in a batch: 50 steps.
    Two ranks of one node need 4 x 11 shards, so all 40; a rank alone on its node half of 44."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    shards = tuple(Shard(f"{n}.tar", 20, 1000, "0" * 64) for n in range(40))
    manifest, order = Manifest("x", shards, home="x"), Order(np.full(40, 20), 0, 8, 4, 5)
    config = LoaderConfig("x", 8, 8, Crop(16), cache_bytes=held * 1000)
    assert steps_ahead(order, manifest, config, 2) == steps


def test_a_small_cache_still_serves_everything(server, shards, tmp_path, caplog) -> None:
    server.put(shards)
    limit = 2 * max(path.stat().st_size for path in shards.glob("*.tar"))
    assert torch.equal(pixels(server.url, cache=tmp_path, cache_bytes=limit), pixels(shards))
    assert "fetched again and again" in caplog.text
    assert sum(path.stat().st_size for path in cached(tmp_path)) <= limit


class CuttingProxy(socketserver.ThreadingTCPServer):
    """Relays TCP to `target` and breaks the connection in the middle of the first `cuts` tars."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int], cuts: int) -> None:
        super().__init__(("127.0.0.1", 0), CuttingRelay)
        self.target, self.cuts, self.cut = target, cuts, 0
        self.lock = threading.Lock()


class CuttingRelay(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server: CuttingProxy = self.server  # type: ignore[assignment]
        doomed = threading.Event()
        with socket.create_connection(server.target) as upstream:
            back = threading.Thread(target=self.answer, args=(upstream, doomed), daemon=True)
            back.start()
            while data := self.request.recv(65536):
                wanted = data.startswith(b"GET ") and b".tar" in data.split(b"\r\n")[0]
                with server.lock:
                    if wanted and server.cut < server.cuts:
                        server.cut += 1
                        doomed.set()
                upstream.sendall(data)

    def answer(self, upstream: socket.socket, doomed: threading.Event) -> None:
        try:
            while data := upstream.recv(65536):
                self.request.sendall(data[:1500] if doomed.is_set() else data)
                if doomed.is_set():
                    break
            self.request.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the client has gone


def test_training_from_s3(shards: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    s3fs = pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    endpoint = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    endpoint.start()
    try:
        host, port = endpoint.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in shards.iterdir():
            client.upload_file(str(path), "bucket", f"imagenet/{path.name}")
        expected = pixels(shards)
        for workers in (0, 1):
            ours = pixels("s3://bucket/imagenet", workers=workers, cache=tmp_path / str(workers))
            assert torch.equal(ours, expected)
        with CuttingProxy((host, port), cuts=3) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
            s3fs.S3FileSystem.clear_instance_cache()  # it keeps clients of the old endpoint
            assert torch.equal(pixels("s3://bucket/imagenet", cache=tmp_path / "cut"), expected)
            assert proxy.cut == 3
            proxy.shutdown()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        client.put_object(Bucket="bucket", Key="imagenet/t-000000.tar", Body=b"other content")
        monkeypatch.setattr(cache_module, "TRIES", 2)
        with pytest.raises(CacheError, match=r"t-000000\.tar: cannot be fetched, 2 tries failed"):
            pixels("s3://bucket/imagenet", cache=tmp_path / "other")
    finally:
        endpoint.stop()
