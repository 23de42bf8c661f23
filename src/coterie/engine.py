"""Where units of work run: in this process, or as Ray tasks on many machines.

A unit is the name of a function and JSON for it: paths, offsets, small numbers. Weights and activations never pass
through here; they are read from files and written into files, which all machines have to see under one name. A unit
may run twice, or be cut off and run again, and leaves the same bytes. The journal stays with the driver: it notes a
file or a layer when all units of it are back.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError, check_choice, writing
from coterie.options import Help

NAMES = ("local", "ray")
SCRATCH = "work"  # folder in OUT.partial for what units tell each other in files; never part of a result
RETRIES = 3  # by Ray, of a task whose process or machine died
RESUBMITTED = 2  # by the driver, of a task that Ray gave up
DISK = 4.0  # of the resource `disk`, where the cluster is started here
OBJECT_STORE = 80 << 20  # bytes, about Ray's least: only units and their results go through it
ANSWER = 5.0  # seconds for a cluster's head to be found
CANCELLING = 10.0  # seconds that units of a failed run have to end


@dataclass(frozen=True)
class Unit:
    """One idempotent piece of work: `function` is "module:name", whose arguments and result are JSON."""

    function: str
    arguments: dict[str, object]
    disk: float = 1.0  # of a node's resource `disk`
    cpus: int = 1


@dataclass(frozen=True)
class Cluster:
    """Where units of work run: the engine's name, and HOST:PORT of a Ray cluster, or auto."""

    engine: Annotated[str, Help(f"Where work is done: {', '.join(NAMES)} (ray: on many machines).")] = "local"
    ray_address: Annotated[
        str | None, Help("Of a Ray cluster [default: one is started on this machine].", "HOST:PORT")
    ] = None


class Engine:
    """`local`: the caller does its work as ever, and no unit is made. `ray`: `run` carries units out elsewhere."""

    @classmethod
    def of(cls, cluster: Cluster) -> Engine:
        return cls(cluster.engine, cluster.ray_address)

    def __init__(self, name: str = "local", address: str | None = None) -> None:
        """address: HOST:PORT of a Ray cluster, or auto; without it one is started on this machine.

        Raises: CoterieError for an unknown name, an address that would be ignored, or where Ray is not installed.
        """
        check_choice("--engine", name, NAMES)
        if address is not None and name != "ray":
            raise CoterieError("--ray-address would be ignored: it is of --engine ray")
        if address is not None and (not address or "://" in address):
            raise CoterieError(f"--ray-address {address!r:.80}: expected HOST:PORT of the cluster's head node, or auto")
        self.name, self.address, self.spread = name, address, name == "ray"
        self.notes: list[str] = []
        self.scratch = Path()
        self._disk, self._most_cpus, self._ahead = False, 1, 1
        self._count = {"units": 0, "resubmitted": 0}
        self._ray: Any = _import_ray() if self.spread else None

    @contextmanager
    def connected(self) -> Iterator[None]:
        """While entered, the process is on the cluster. Raises: CoterieError where there is none to be had."""
        if not self.spread:
            yield
            return
        started = self._connect()
        try:
            self._look()
            yield
        finally:
            if started:
                self._ray.shutdown()

    @contextmanager
    def opened(self, folder: Path) -> Iterator[None]:
        """While entered, units can run; `scratch` is then a folder of a new name in `folder`, empty at first."""
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # of a killed run, whichever engine goes on
        if not self.spread:
            yield
            return
        self.scratch = folder.absolute() / SCRATCH / uuid.uuid4().hex
        try:
            with writing(folder):
                self.scratch.mkdir(parents=True)
            yield
            with writing(folder):
                shutil.rmtree(folder / SCRATCH)
        finally:
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)

    def _connect(self) -> bool:
        """Starts or joins a cluster. Returns whether it was this that connected the process."""
        if self._ray.is_initialized():
            if self.address:
                raise CoterieError("--ray-address: this process is connected to a Ray cluster already; leave it out")
            self.notes.append("--engine ray: units ran on the cluster that this process was connected to")
            return False
        log = logging.getLogger("ray")
        level = log.level
        try:
            log.setLevel(logging.ERROR)  # warnings of a cluster that starts are printed otherwise
            self._init()
        except Exception as error:  # connection, time-out, version, value: Ray has an exception for each
            self._ray.shutdown()  # what was started of it
            where = self.address or "a cluster of its own"
            raise CoterieError(f"--engine ray: {where} cannot be reached or started ({error!s:.200})") from error
        finally:
            log.setLevel(level)
        return True

    def _init(self) -> None:
        quiet = {"log_to_driver": False, "configure_logging": False}
        if self.address:
            if self.address != "auto":  # where nothing listens, Ray would try again for minutes
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host, int(port)), ANSWER).close()
            self._ray.init(address=self.address, **quiet)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # whoever starts a cluster decides this
        self._ray.init(
            address="local", num_cpus=len(os.sched_getaffinity(0)), resources={"disk": DISK},
            object_store_memory=OBJECT_STORE, include_dashboard=False, **quiet,
        )  # fmt: skip
        self.notes.append(
            "--engine ray without --ray-address: a Ray cluster was started on this machine alone, for this run"
        )

    def _look(self) -> None:
        """What the cluster has: whether nodes limit disks, the CPUs of the largest node, and how much runs at once."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        with_disk, cpus = sum("disk" in node for node in nodes), [int(node.get("CPU", 0)) for node in nodes]
        self._nodes, self._disk, self._most_cpus = len(nodes), with_disk > 0, max(cpus, default=0)
        if self._most_cpus < 1:
            raise CoterieError("--engine ray: no node of the cluster offers a CPU; start one with `ray start`")
        self._ahead = 2 * sum(cpus)
        if not with_disk:
            self.notes.append(
                "no node of the Ray cluster has the resource `disk`, so nothing limits how many units use one disk at "
                "a time; start nodes with: ray start --resources='{\"disk\": 4}'"
            )
        elif with_disk < len(nodes):
            self.notes.append(
                f"{len(nodes) - with_disk} of {len(nodes)} Ray nodes lack the resource `disk`: no unit ran on them"
            )

    def run(self, units: Iterable[Unit]) -> Iterator[Any]:
        """The units' results, in their order; a few more than the cluster can run at once are under way.

        Raises: CoterieError when a unit refuses, or is lost again and again.
        """
        waiting: deque[tuple[Unit, Any]] = deque()
        try:
            for unit in units:
                waiting.append((unit, self._submit(unit)))
                self._count["units"] += 1
                if len(waiting) >= self._ahead:
                    yield self._oldest(waiting)
            while waiting:
                yield self._oldest(waiting)
        finally:
            self._cancel([reference for _, reference in waiting])

    def _oldest(self, waiting: deque[tuple[Unit, Any]]) -> Any:
        found = self._result(*waiting[0])
        waiting.popleft()
        return found

    def _submit(self, unit: Unit) -> Any:
        task = self._ray.remote(perform).options(
            num_cpus=min(unit.cpus, self._most_cpus),
            resources={"disk": unit.disk} if self._disk else {},
            max_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )
        return task.remote(_version(), str(self.scratch), unit.function, json.dumps(unit.arguments))

    def _result(self, unit: Unit, reference: Any) -> Any:
        for left in reversed(range(RESUBMITTED + 1)):
            try:
                answer = json.loads(self._ray.get(reference))
                break
            except self._ray.exceptions.RayTaskError:
                raise  # what a unit raises beside refusals is a defect of ours
            except self._ray.exceptions.RayError as error:
                if not left:
                    raise CoterieError(
                        f"--engine ray: a unit of work was lost {RESUBMITTED + 1} times with all retries "
                        f"({type(error).__name__}); see to the nodes, and add --resume"
                    ) from error
                self._count["resubmitted"] += 1
                reference = self._submit(unit)
        if "refused" in answer:
            raise CoterieError(answer["refused"])
        return answer["result"]

    def _cancel(self, references: list[Any]) -> None:
        """Ends what is under way, so that nothing of a failed run writes into a later one's files."""
        with suppress(self._ray.exceptions.RayError):
            for reference in references:
                self._ray.cancel(reference, force=True)
            if references:
                self._ray.wait(references, num_returns=len(references), timeout=CANCELLING)

    @property
    def summary(self) -> dict[str, object]:
        """What the report says of the engine: its name, nodes, units, and how many were given up and done again."""
        return {"name": self.name, "nodes": self._nodes, **self._count}


def perform(version: str, scratch: str, function: str, arguments: str) -> str:
    """Runs one unit wherever this is called: JSON in, JSON out; a refusal is an answer too.

    Refuses where the scratch folder is not to be seen, which also stops units of a run that has ended.
    """
    if version != _version():
        return _refusal(f"has coterie {_version()}, the driver {version}; install the same everywhere")
    if not os.path.isdir(scratch):  # noqa: PTH112 - Path.is_dir raises for some names
        return _refusal(f"does not see {scratch}; MODEL and OUT must lie where all nodes see them")
    module, _, name = function.partition(":")
    try:
        return json.dumps({"result": getattr(importlib.import_module(module), name)(**json.loads(arguments))})
    except CoterieError as error:
        return _refusal(str(error))
    except OSError as error:
        return _refusal(f"{error.filename or scratch}: {error.strerror or error}; see to it, add --resume")


def _refusal(reason: str) -> str:
    return json.dumps({"refused": f"node {os.uname().nodename}: {reason}"})


def _version() -> str:
    from coterie import __version__

    return __version__


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise CoterieError(f"--engine ray needs Ray ({error}); pip install 'coterie[ray]'") from error
    return ray
