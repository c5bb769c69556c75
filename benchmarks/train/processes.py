"""One of several processes: how it works with the others, and how it stops.

Each runs the same program on the same arguments and comes to the same numbers. What they do
together is to differentiate the batch of a step, each its share, and to agree when to stop.
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
    """All processes of a job, and which of them this is: the only one, unless it joined others.

    The first reports and writes files; the others take part in what is computed, and agree.
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
    def together(self) -> Iterator[None]:
        """Around what needs all processes.

        Raises:
          Lost: one of them is gone.
        """
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            # On a CPU a broken connection is JAX's error or a ValueError of that name.
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

        with self.together():
            return np.asarray(multihost_utils.process_allgather(row))

    def any(self, here: bool) -> bool:
        """Whether something is so in any process."""
        return bool(self.gathered([here]).any())

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
            with self.together():
                jax.distributed.shutdown()


ALONE = Processes()


def join(coordinator: str, count: int, number: int) -> Processes:
    """Waits until all have reached process 0 at HOST:PORT, before anything is computed."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host = coordinator.rpartition(":")[0]
    options: dict[str, Any] = {"heartbeat_timeout_seconds": _HEARTBEAT}
    if host in ("127.0.0.1", "localhost"):
        options["coordinator_bind_address"] = coordinator
        jax.config.update("jax_check_proxy_envs", False)  # no proxy stands between
    try:
        jax.distributed.initialize(coordinator, count, number, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--coordinator {coordinator}: {str(error).splitlines()[0]}") from None
    # JAX has taken SIGTERM for itself.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return Processes(count, number)


def on_all(mesh: Mesh, tree: Any) -> Any:
    """Arrays of this process as arrays of a mesh, whole on each of its devices."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def copied(x: Any) -> jax.Array:
        copies = [jax.device_put(x, device) for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(np.shape(x), everywhere, copies)

    return jax.tree.map(copied, tree)


def on_one(tree: Any) -> Any:
    """Arrays that are whole on each device, as arrays of one of this process' devices."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
