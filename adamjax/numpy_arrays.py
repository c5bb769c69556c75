"""Finds NumPy arrays that JAX cannot take: of other dtypes, byte orders, or with a mask."""

from typing import Any

import jax
import numpy as np

__all__ = [
    "NUMPY_TYPES",
    "expect_jax_array",
    "fault_of_array",
    "native",
    "numpy_form",
]

NUMPY_TYPES = (np.ndarray, np.generic)

_RAW = (
    "these are bytes without a dtype, as NumPy reads bfloat16 from .npz and .npy files: give them "
    "the dtype that was saved, such as x.view(ml_dtypes.bfloat16)"
)
_NO_NUMBERS = (
    "JAX has no such dtype; NumPy reads a None from .npz and .npy files as an array of objects: "
    "put None back"
)
_TIMES = "JAX has neither dates nor lengths of time: convert them to integers, x.astype(int)"
_SWAPPED = (
    "JAX takes only the byte order of this machine: convert it with "
    'x.astype(x.dtype.newbyteorder("="))'
)
_MASKED = (
    "JAX would ignore the mask: select the other elements, x.compressed(), or fill them, "
    "x.filled(value)"
)


def fault_of_array(leaf: Any) -> str | None:
    """Why JAX cannot take this NumPy array; `None` if it can."""
    if not isinstance(leaf, NUMPY_TYPES):
        return None
    if isinstance(leaf, np.ma.MaskedArray):
        return _MASKED
    if leaf.dtype.kind in "OSU":  # objects and texts
        return _NO_NUMBERS
    if leaf.dtype.kind in "mM":
        return _TIMES
    if not leaf.dtype.isnative:
        return _SWAPPED
    # Raw bytes are of kind "V". So are bfloat16 and the like, which have types of their own, and
    # float0, which has a field.
    is_raw = leaf.dtype.type is np.void and leaf.dtype.names is None
    return _RAW if is_raw else None


def numpy_form(x: Any) -> str:
    """The dtype and shape of a NumPy array that JAX cannot take, for errors: `>f4[3]`."""
    masked = "masked " if isinstance(x, np.ma.MaskedArray) else ""
    name = x.dtype.name if masked and x.dtype.isnative else x.dtype.str
    return f"{masked}{name}{list(x.shape)}"


def expect_jax_array(what: str, x: Any) -> None:
    """Refuses a NumPy array that JAX cannot take."""
    fault = fault_of_array(x)
    if fault:
        expected = "no mask" if fault is _MASKED else "a dtype of JAX"
        raise TypeError(f"{what} is {numpy_form(x)}, expected {expected}: {fault}")


def native(what: str, x: Any) -> Any:
    """An argument in the byte order of this machine; refuses arrays with a mask, also in a list."""
    for array in jax.tree.leaves(x) if isinstance(x, list | tuple) else [x]:
        if isinstance(array, np.ma.MaskedArray):
            expect_jax_array(what, array)
    if isinstance(x, np.ndarray) and not x.dtype.isnative:
        return x.astype(x.dtype.newbyteorder("="))
    return x
