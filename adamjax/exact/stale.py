"""A placeholder for a table that must not be read directly."""

from typing import Any

import jax

__all__ = ["StaleTable"]


@jax.tree_util.register_pytree_node_class
class StaleTable:
    """A placeholder for a table. Reading it raises, because rows of the table may lag behind.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> tx.without_tables({"table": jnp.zeros((9, 1)), "bias": jnp.zeros(1)})
    {'bias': Array([0.], dtype=float32), 'table': StaleTable('table')}
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def tree_flatten(self) -> tuple[tuple[()], str]:
        return (), self.path

    @classmethod
    def tree_unflatten(cls, path: str, leaves: Any) -> "StaleTable":
        return cls(path)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"rows of the table {self.path!r} may lag behind, so it cannot be read directly: read "
            "rows with prepare (in a train step) or lookup, or bring all up to date with flush"
        )

    def __getattr__(self, name: str) -> Any:
        # Copies, pickles and notebooks look up names of protocols. These must raise AttributeError.
        if name.startswith("_") or name == "path":
            raise AttributeError(f"StaleTable has no {name!r}")
        return self._refuse()

    def __repr__(self) -> str:
        return f"StaleTable({self.path!r})"


# Python looks for these on the class.
_BINARY = ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"]
_BINARY += ["lshift", "rshift", "and", "xor", "or"]
_REFUSED = [*_BINARY, *(f"r{name}" for name in _BINARY), "neg", "pos", "abs", "invert"]
_REFUSED += ["lt", "le", "gt", "ge", "eq", "ne", "bool", "int", "float", "complex", "index"]
_REFUSED += ["round", "trunc", "floor", "ceil", "getitem", "setitem", "delitem", "contains"]
_REFUSED += ["len", "iter", "reversed", "jax_array", "array", "array_ufunc", "array_function"]
_REFUSED += ["dlpack"]
for _name in _REFUSED:
    setattr(StaleTable, f"__{_name}__", StaleTable._refuse)
