"""A cluster of several nodes on this machine, the job as a process on it, and faults that hit it.

Everything that dies is a real process and dies by SIGKILL: workers, raylets with all that is under
them, drivers, the object store's server. Workers have no GPU: a worker that is promised one
computes on it, and a fake one can not.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from p48ray.run import run_root
from p48ray.store.base import TEMP_PREFIX, Store
from p48ray.store.open import open_store
from tests.conftest import REPO
from tests.jobs.command import HELD_OUT, arguments, launch

NUM_NODES = 2
CPUS_PER_NODE = 2
NODE_ROOM = {"object_store_memory": 80 * 2**20}
# A node that is gone is found out within about two seconds, not the fifteen of Ray's defaults.
QUICK_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 3,
}
WAIT_S = 240.0
BUSY_S = 30.0
"""In which some worker has to be at work again: a new one starts in ten seconds or more."""

# The small job with all its stages; calibration is cut into enough parts for a fault to find
# capture and gradients in the middle of their work.
SETTINGS = {
    "calibration.num_sequences": "8",
    "calibration.sequence_length": "256",
    "calibration.sequences_per_part": "1",
    "calibration.sequences_per_micro_batch": "1",
    "compression.output_curvature": "true",
    "compression.refine_steps": "1",
    "evaluation": HELD_OUT,
    "run.root_is_shared": "true",
}
# So that streams delete boundaries in the forward pass too.
DELETING = {"run.keep": "units", "run.boundary_every": "2"}
NUM_PARTS = 32  # 8 parts in each of 4 layers
NUM_UNITS = 16
NUM_SHARDS = 6


def wait_until(
    is_true: Callable[[], bool], timeout_s: float = WAIT_S, pause_s: float = 0.02
) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


class Site:
    """A Ray cluster whose nodes can be lost: the head has no room for workers, so that the drivers
    are not lost with a node."""

    def __init__(self, health_check: dict[str, int]) -> None:
        """A machine of the scene.

        Args:
            health_check: Ray's settings of how it finds out that a node is gone; empty: its
                defaults.
        """
        head = NODE_ROOM | {
            "num_cpus": 0,
            "include_dashboard": False,
            "_system_config": health_check,
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self.mend()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def mend(self) -> None:
        """Add fresh nodes for those that were lost."""
        while len(self.nodes) < NUM_NODES:
            self.nodes.append(self.cluster.add_node(num_cpus=CPUS_PER_NODE, **NODE_ROOM))

    def close(self) -> None:
        self.cluster.shutdown()

    def family(self, node: Any) -> list[psutil.Process]:
        """A node's raylet and all that it started."""
        with suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            return [raylet, *raylet.children(recursive=True)]
        return []

    def workers(self, node: Any, is_busy: bool = True) -> list[psutil.Process]:
        """A node's workers of ours that are in the middle of a task, by the title that Ray gives
        them. is_busy: False for those between two tasks as well."""
        return [process for process in self.family(node)[1:] if is_worker(process, is_busy)]

    def busy_workers(self, is_busy: bool = True) -> list[psutil.Process]:
        """Of all nodes; is_busy: as `workers` takes it."""
        return [worker for node in self.nodes for worker in self.workers(node, is_busy)]

    def kill_node(self, node: Any) -> None:
        """The whole node at once, as a machine that is switched off."""
        kill(self.family(node))
        self.cluster.remove_node(node, allow_graceful=False)
        if node in self.nodes:
            self.nodes.remove(node)


def is_worker(process: psutil.Process, is_busy: bool = True) -> bool:
    title = "ray::WorkerProcess.execute" if is_busy else "ray::WorkerProcess"
    with suppress(psutil.Error):
        return "".join(process.cmdline()[:1]).startswith(title)
    return False


def kill(processes: Iterable[psutil.Process]) -> int:
    """SIGKILL to each. Returns how many there still were."""
    count = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            count += 1
    return count


class Driver:
    """The command as a process; its output is read all the time, so that it never waits for a
    reader."""

    def __init__(
        self,
        args: list[str],
        env: dict[str, str],
        start: Callable[..., subprocess.Popen[str]] = launch,
    ) -> None:
        self.process = start(*args, env=env)
        self.out, self.err = "", ""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        self.out, self.err = self.process.communicate()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.finish() == -signal.SIGKILL

    def finish(self) -> int:
        """Wait for its end. Returns its exit code."""
        self.reader.join(WAIT_S)
        assert not self.reader.is_alive(), "the driver does not come to an end"
        return self.process.returncode


def launch_deadly(unit: str) -> Callable[..., subprocess.Popen[str]]:
    """How to start a job one of whose units kills every worker that takes it."""
    return launcher("tests.chaos.deadly_compress", unit)


def launch_slow(pause_s: float, log: Path) -> Callable[..., subprocess.Popen[str]]:
    """How to start a job whose blobs take that long to write; see tests.chaos.slow_compress for
    what is written to the log."""
    return launcher("tests.chaos.slow_compress", str(pause_s), str(log))


def launcher(module: str, *first: str) -> Callable[..., subprocess.Popen[str]]:
    """How to start a module that stands for jobs/compress.py and takes some arguments of its own
    before the job's."""

    def start(*args: str, env: dict[str, str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", module, *first, *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            command, cwd=REPO, env=os.environ | env, text=True, start_new_session=True, **pipes
        )

    return start


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault that hit: what had been done by then, how many tasks were under way, and how many
    processes were killed."""

    name: str
    stage: str
    done: dict[str, bytes]
    in_flight: int
    killed: int


@dataclass(slots=True)
class Scene:
    """One run root and all that happens to it. `endpoint_url`: of the server of an s3:// root."""

    site: Site
    root: str
    rng: random.Random
    endpoint_url: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    drivers: list[Driver] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    frozen: list[tuple[Any, list[psutil.Process]]] = field(default_factory=list)
    start: Callable[..., subprocess.Popen[str]] = launch

    @property
    def store(self) -> Store:
        return open_store(self.root, self.endpoint_url)

    @property
    def keep(self) -> str:
        return self.settings.get("run.keep", "all")

    @property
    def driver(self) -> Driver:
        """The newest."""
        return self.drivers[-1]

    @property
    def logs(self) -> str:
        """What all drivers printed that have ended."""
        return "".join(driver.out for driver in self.drivers)

    def submit(self) -> Driver:
        """Start the command, the same each time."""
        where = {"run.endpoint_url": self.endpoint_url} if self.endpoint_url else {}
        args = [*arguments(self.root, SETTINGS | where | self.settings), "--verbose"]
        # else Ray shows one of the units' lines and counts the rest
        env = {"RAY_ADDRESS": self.site.address, "RAY_DEDUP_LOGS": "0"}
        self.drivers.append(Driver(args, env, self.start))
        return self.driver

    def listing(self) -> frozenset[str]:
        return frozenset(info.key for info in self.store.list())

    def manifests(self, keys: Iterable[str] | None = None) -> dict[str, bytes]:
        """Unit -> its manifest's bytes, which name the attempt that counts."""
        found = self.listing() if keys is None else keys
        return {key.split("/")[1]: self.store.get(key) for key in found if is_unit_manifest(key)}

    def wait_for(self, stage: str, share: float) -> None:
        """Until a stage has done a share of its work (0: its first piece)."""
        wanted = 1 + int(share * (PIECES[stage].total - 2))

        def is_there() -> bool:
            return PIECES[stage].count(self.listing()) >= wanted or not self.driver.is_running

        assert wait_until(is_there, pause_s=0.005), f"{stage} does not get to {wanted} pieces"
        assert self.driver.is_running, (
            f"the driver ended with {self.driver.finish()}:"
            f" {self.driver.out[-3000:]}\n{self.driver.err[-3000:]}"
        )

    def hit(self, name: str, stage: str, share: float, strike: Callable[["Scene"], int]) -> Hit:
        """Strike when a stage has done a share of its work. `strike` returns how many processes it
        killed, none if it found nothing to hit."""
        self.wait_for(stage, share)
        # a worker between two tasks has the next before it can be hit
        in_flight = len(self.site.busy_workers(is_busy=False))
        killed = strike(self)
        done = self.manifests()
        assert killed, f"{name} in {stage}: nothing was there to be hit"
        self.hits.append(
            Hit(name, stage, done, in_flight if PIECES[stage].is_beside_units else 0, killed)
        )
        return self.hits[-1]

    def finish(self) -> int:
        """The newest driver's exit code."""
        return self.driver.finish()


def is_unit_manifest(key: str) -> bool:
    return key.startswith(run_root.UNITS) and key.endswith("/manifest.json")


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a stage leaves behind, by key."""

    total: int
    prefix: str
    suffix: str
    is_beside_units: bool = False

    def count(self, keys: Iterable[str]) -> int:
        return sum(
            key.startswith(self.prefix)
            and key.endswith(self.suffix)
            and not key.endswith("scales.json")
            for key in keys
        )


PIECES = {
    "capture": Pieces(NUM_PARTS, run_root.ACTIVATIONS, ".json", is_beside_units=True),
    "gradients": Pieces(NUM_PARTS, run_root.GRADIENTS, ".json", is_beside_units=True),
    "compress": Pieces(NUM_UNITS, run_root.UNITS, "/manifest.json", is_beside_units=True),
    "reduce": Pieces(NUM_SHARDS, run_root.CHECKPOINT, ".safetensors"),
    "verify": Pieces(NUM_SHARDS, run_root.VERIFICATION, ".json"),
}


# Faults.


def until_hit(scene: Scene, strike: Callable[[], int]) -> int:
    """What `strike` says that it has hit. It is tried again and again: whoever was busy when one
    looked may be between two tasks when one strikes."""
    hit = 0

    def has_struck() -> bool:
        nonlocal hit
        hit = strike()
        return bool(hit) or not scene.driver.is_running

    wait_until(has_struck, timeout_s=BUSY_S, pause_s=0.001)
    return hit


def kill_a_worker(scene: Scene) -> int:
    """One of those that are in the middle of a task."""
    return until_hit(scene, lambda: kill(pick(scene.rng, scene.site.busy_workers())))


def kill_a_writer(*kinds: str) -> Callable[["Scene"], int]:
    """A worker that is in the middle of writing blobs of these kinds."""

    def strike(scene: Scene) -> int:
        found = (
            path for kind in kinds for path in Path(scene.root).glob(f"{kind}/*/{TEMP_PREFIX}*")
        )
        return next((killed for path in found if (killed := kill_while_there(path))), 0)

    return lambda scene: until_hit(scene, lambda: strike(scene))


def kill_while_there(path: Path) -> int:
    """Kill the worker that writes this temporary file, and nobody where it has been written. The
    worker is stopped first: on a busy machine it may be done before it is killed."""
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(int(path.name.removeprefix(TEMP_PREFIX).split("-")[0]))
        if not is_worker(worker):
            return 0
        worker.suspend()
        if path.exists():
            return kill([worker])
        worker.resume()
    return 0


def kill_all_workers(scene: Scene) -> int:
    return until_hit(scene, lambda: kill(scene.site.busy_workers()))


def kill_a_node(scene: Scene) -> int:
    """One with a busy worker; another node takes its place."""

    def strike() -> int:
        killed = 0
        for node, num_busy in pick(scene.rng, with_busy_workers(scene)):
            scene.site.kill_node(node)
            killed = num_busy
        return killed

    killed = until_hit(scene, strike)
    scene.site.mend()
    return killed


def with_busy_workers(scene: Scene) -> list[tuple[Any, int]]:
    """Nodes, each with how many there are."""
    found = [(node, len(scene.site.workers(node))) for node in scene.site.nodes]
    return [(node, num_busy) for node, num_busy in found if num_busy]


def freeze_a_node(scene: Scene) -> int:
    """One with a busy worker stops in the middle of what it does, as a machine whose network is
    gone; another takes its place. See thaw."""

    def strike() -> int:
        frozen = 0
        for node, num_busy in pick(scene.rng, with_busy_workers(scene)):
            family = scene.site.family(node)
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            scene.site.nodes.remove(node)
            scene.frozen.append((node, family))
            frozen = num_busy
        return frozen

    frozen = until_hit(scene, strike)
    scene.site.mend()
    return frozen


def thaw(scene: Scene) -> None:
    """The frozen go on with what they did, until Ray tells their raylet that it was given up."""
    for node, family in scene.frozen:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        wait_until(
            lambda family=family: not any(is_worker(process) for process in family[1:]),
            timeout_s=20,
        )
        scene.site.kill_node(node)
    scene.frozen.clear()


def kill_the_driver(scene: Scene) -> int:
    """And submit the same command again, at once: what the first one started may still be at
    work."""
    killed = 1 + len(scene.site.busy_workers())
    if scene.driver.is_running:
        scene.driver.kill()
    scene.submit()
    return killed


def stop_the_driver(scene: Scene) -> int:
    """Ask it to end, wait until it has, and submit the same command again."""
    killed = 1 + len(scene.site.busy_workers())
    scene.driver.process.send_signal(signal.SIGTERM)
    scene.driver.finish()
    scene.submit()
    return killed


def pick(rng: random.Random, choices: list[Any]) -> list[Any]:
    """One of them, none if there are none."""
    return [rng.choice(choices)] if choices else []


def flip_a_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def corrupt_a_unit(damaged: list[str]) -> Callable[[Scene], int]:
    """The shard of a unit that is done gets another bit, before anything is stitched of it: nobody
    reads it again afterwards. damaged: takes the unit's id."""

    def strike(scene: Scene) -> int:
        driver = psutil.Process(scene.driver.process.pid)
        driver.suspend()  # so that it does not go on to reduce meanwhile
        try:
            done = sorted(scene.manifests())
            if len(done) == NUM_UNITS:
                return 0
            unit = scene.rng.choice(done)
            (shard,) = Path(scene.root, "units", unit).glob("*/shard.safetensors")
            flip_a_bit(shard, scene.rng)
        finally:
            driver.resume()
        damaged.append(unit)
        return 1

    return strike
