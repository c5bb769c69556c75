"""Kernels that another system stores transposed, and the user's function that makes arrays fit."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adamjax.convert.source import Source
from adamjax.convert.values import numbers_of

__all__ = [
    "NOT_TRANSPOSED",
    "Adapt",
    "Adapted",
    "checked_adapt",
    "doubt_transposes",
    "kind_of_leaf",
]

# A user's function of a path and an array: it makes the array fit a leaf, or the other system's
# parameter. `Adapted` calls it and checks its result. Its second argument is the name of a slot.
Adapt = Callable[[str, np.ndarray], np.ndarray]
Adapted = Callable[[str, str, Any], np.ndarray]

# Names of leaves and parameters whose dimensions have one order in torch, Keras and JAX.
NOT_TRANSPOSED = {"weight", "embedding", "embeddings", "embed", "emb", "table"}
# Kernels of Keras and Flax have the dimensions (*kernel_size, in, out), and weights of torch and
# Equinox have (out, in, *kernel_size). These expressions convert arrays of any rank:
_TO_KERNEL = "x.transpose(*range(2, x.ndim), 1, 0)"
_TO_WEIGHT = "x.transpose(-1, -2, *range(x.ndim - 2))"
_TRANSPOSED = {
    "from_torch": _TO_KERNEL,
    "to_torch": _TO_WEIGHT,
    "from_keras": _TO_WEIGHT,
    "to_keras": _TO_KERNEL,
}


def _is_of_torch(owner: str) -> bool:
    return owner.endswith("torch")


def kind_of_leaf(path: str) -> str:
    """The words of a leaf's own name without numbers: `kernel` for `layers/0/kernel_0`."""
    return re.sub(r"[\W\d_]+", " ", path.rpartition("/")[2].lower()).strip()


def doubt_transposes(
    source: Source, leaves: Mapping[str, Any], paths: Sequence[str], has_arrays: bool = True
) -> None:
    """Adds a doubt about each matrix or kernel whose shape does not show if it is transposed.

    Args:
      paths: the leaves that may be transposes of the system's parameters.
      has_arrays: whether the system has arrays, whose shapes may show that they are transposed.
    """
    # Other leaves show nothing about a leaf: they may be embeddings, which are not transposed.
    paths = [path for path in paths if np.ndim(leaves[path]) > 1]
    is_reversed = all(np.ndim(leaves[path]) <= 3 for path in paths)
    for path in paths:
        shape, end = np.shape(leaves[path]), path.rpartition("/")[2]
        axes = (*range(2, len(shape)), 1, 0)
        has_same_shape = tuple(shape[i] for i in axes) == shape
        if has_arrays and not has_same_shape:
            continue  # The other array has another shape, so a missing transpose is refused.
        moved = [i for i in axes if shape[i] != 1]
        if has_same_shape and moved == sorted(moved):
            continue  # The transpose is the array itself, as that of shape [1, 1].
        fault = "Keras' kernels are the transposes of weights of Equinox and torch"
        if _is_of_torch(source.owner):
            fault = "torch's weights are the transposes of kernels"
        expression = "x.T" if is_reversed else _TRANSPOSED[source.owner]
        source.doubts.append(
            f"{fault}, such as {path!r}, and its shape {list(shape)} does not show it: pass "
            f"adapt=lambda path, x: {expression} if path.endswith({end!r}) else x, or "
            "adapt=lambda path, x: x if they are not transposed. If the weights were ported by "
            "another function, as those of transposed convolutions are, pass that function"
        )


def checked_adapt(owner: str, adapt: Any) -> Adapted:
    """A function that calls the user's `adapt` and checks its result; see `Adapted`."""
    if adapt is None:
        return lambda path, name, x: np.asarray(x)
    end = "kernel" if _is_of_torch(owner) else "weight"
    expected = (
        "expected a function of the path of a leaf and an array that returns an array: "
        f"lambda path, x: {_TRANSPOSED[owner]} if path.endswith({end!r}) else x"
    )
    if not callable(adapt):
        raise TypeError(
            f"{owner}: adapt is {adapt!r:.100} of type {type(adapt).__name__}, {expected}"
        )
    try:
        inspect.signature(adapt).bind("path", np.zeros(()))
    except TypeError:
        raise TypeError(f"{owner}: adapt does not take two arguments, {expected}") from None
    except ValueError:
        pass  # Some functions written in C have no signature.

    def adapted(path: str, name: str, x: Any) -> np.ndarray:
        try:
            array = adapt(path, x)
        except Exception as error:
            raise ValueError(
                f"{owner}: adapt raises an error for {name} of {path!r}, of shape "
                f"{list(np.shape(x))}: {error}. Are the leaves in the right order (order=)?"
            ) from error
        return numbers_of(owner, f"what adapt returns for {name} of {path!r}", array)

    return adapted
