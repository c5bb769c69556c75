"""One of several processes: how it works with the others, and how it stops.

All run the same program with the same arguments, and compute the same numbers. In each step, every
process differentiates its part of the batch. They agree when to stop.
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

# Words in JAX's errors about an unreachable process.
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
        """Whether this process reports and writes files."""
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
            # distinguish it from other errors.
            text = str(error).lower()
            if self.count == 1 or not any(word in text for word in _CONNECTION_WORDS):
                raise
            raise Lost(str(error).splitlines()[0]) from error

    def gathered(self, numbers: Sequence[float]) -> np.ndarray:
        """The numbers of all processes, float32[processes, n]."""
        row = np.asarray(numbers, np.float32)
        if self.count == 1:
            return row[None]
        from jax.experimental import multihost_utils

        with self.raising_lost():
            return np.asarray(multihost_utils.process_allgather(row))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self.gathered([flag]).any())

    def agree(self, what: str, *values: object) -> None:
        """Raises a `UserError` unless all processes were given the same values."""
        digest = hashlib.sha256(repr(values).encode()).digest()
        digests = self.gathered(np.frombuffer(digest, np.uint8))
        others = np.flatnonzero((digests != digests[0]).any(axis=1))
        if others.size:
            raise UserError(f"process {others[0]} has {what} other than process 0's")

    def leave(self) -> None:
        """Leaves the job. All processes must call this at the same point; arrays stay usable."""
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
    # JAX has replaced Python's handler, and Python does not know. Setting the handler that Python
    # knows restores it.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return Processes(count, number)


def on_all_devices(mesh: Mesh, tree: Any) -> Any:
    """This process' arrays as arrays of the mesh, with a whole copy on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
