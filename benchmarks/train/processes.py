"""One of several processes: how it works with the others, and how it stops.

All run the same program with the same arguments, and get the same numbers. They share two things:
in each step, every process differentiates its part of the batch; and they agree when to stop.
"""

import contextlib
import hashlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.train.launcher import Lost
from benchmarks.train.options import UserError

# The axis of the mesh of all devices.
AXIS = "data"

# Seconds without a sign of life after which a process counts as dead (JAX's default is 100).
_HEARTBEAT = 20

# Words of JAX's errors when another process cannot be reached.
_CONNECTION_WORDS = ("gloo", "nccl", "connection", "peer", "unavailable", "deadline", "timed out")


@dataclass(frozen=True)
class Processes:
    """The processes of a job, and the number of this one. By default it is the only one.

    Process 0 reports and writes files. The others only compute, and agree when to stop.
    """

    count: int = 1
    number: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reports and writes."""
        return self.number == 0

    def mesh(self) -> Mesh:
        """All devices of all processes."""
        return Mesh(np.array(jax.devices()), (AXIS,))

    @contextlib.contextmanager
    def raising_lost(self) -> Iterator[None]:
        """A context in which JAX's errors about an unreachable process become `Lost`."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            # On a CPU a broken connection raises one or the other. Only the words of the message
            # tell it from other errors.
            text = str(error).lower()
            if self.count == 1 or not any(word in text for word in _CONNECTION_WORDS):
                raise
            raise Lost(str(error).splitlines()[0]) from error

    def gathered(self, numbers: Sequence[float]) -> np.ndarray:
        """The numbers of all processes, float32[count, n]."""
        row = np.asarray(numbers, np.float32)
        if self.count == 1:
            return row[None]
        from jax.experimental import multihost_utils

        with self.raising_lost():
            return np.asarray(multihost_utils.process_allgather(row))

    def any(self, is_so_here: bool) -> bool:
        """Whether something is so in any process; each says whether it is so in itself."""
        return bool(self.gathered([is_so_here]).any())

    def agree(self, what: str, *values: object) -> None:
        """Raises a `UserError` unless all processes were given the same values."""
        digest = hashlib.sha256(repr(values).encode()).digest()
        every = self.gathered(np.frombuffer(digest, np.uint8))
        others = np.flatnonzero((every != every[0]).any(axis=1))
        if others.size:
            raise UserError(f"process {others[0]} has {what} other than process 0's")

    def leave(self) -> None:
        """Leaves the job. All processes must call this at the same place; arrays stay usable."""
        if self.count > 1:
            with self.raising_lost():
                jax.distributed.shutdown()


ALONE = Processes()


def join(coordinator: str, count: int, number: int) -> Processes:
    """Waits until all processes have reached process 0, whose HOST:PORT is the coordinator.

    Call it before anything is computed.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host = coordinator.rpartition(":")[0]
    options: dict[str, Any] = {"heartbeat_timeout_seconds": _HEARTBEAT}
    if host in ("127.0.0.1", "localhost"):
        options["coordinator_bind_address"] = coordinator
        # JAX would warn if a proxy is set, but nothing on this machine is reached through one.
        jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(coordinator, count, number, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--coordinator {coordinator}: {str(error).splitlines()[0]}") from None
    # JAX has put a handler of its own in place of Python's, and Python does not know of it. Setting
    # the handler that Python knows puts it back.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return Processes(count, number)


def on_all_devices(mesh: Mesh, tree: Any) -> Any:
    """This process' arrays as arrays of the mesh, each device of which has a whole copy."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def on_one_device(tree: Any) -> Any:
    """Arrays of which each device has a whole copy, as this process' first copies of them."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
