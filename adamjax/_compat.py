"""Hides the differences between the supported releases of JAX, 0.7.2 and newer.

Only this module uses interfaces that a release of JAX may rename or remove, so a new release of JAX
requires changes only here. Modules of `jax.experimental` are imported when a feature needs them: if
such a module is missing, that feature raises an error, and `import adamjax` still works.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

try:
    from jax.extend import source_info_util
except ImportError:  # then errors do not name source lines
    source_info_util = None  # type: ignore[assignment]

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Var",
    "as_varying",
    "axis_kinds",
    "current_mesh",
    "dimension_order",
    "experimental",
    "in_memory_of",
    "jaxpr_as_fun",
    "layout_format",
    "per_device",
    "source_line",
    "source_of",
    "type_sharding",
    "varying_axes",
    "x64",
]


def experimental(feature: str, name: str) -> Any:
    """The module `jax.experimental.<name>`, imported for a feature that needs it."""
    try:
        return importlib.import_module(f"jax.experimental.{name}")
    except ImportError as error:
        raise NotImplementedError(
            f"{feature} needs jax.experimental.{name}, which JAX {jax.__version__} does not have; "
            "install a newer adamjax, or an older JAX"
        ) from error


def x64(enabled: bool) -> Any:
    """A context that enables or disables 64-bit dtypes."""
    if hasattr(jax, "enable_x64"):  # since JAX 0.8
        return jax.enable_x64(enabled)
    return experimental("float64", "x64_context").enable_x64(enabled)


# --- types of values ------------------------------------------------------------------------------


def type_sharding(x: Any) -> Any:
    """The sharding in the type of an array; `None` if the sharding has no mesh."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return None if sharding is None or sharding.mesh.empty else sharding


def axis_kinds(mesh: Any) -> set[str]:
    """The kinds of a mesh's axes: `"Auto"`, `"Explicit"`, `"Manual"`."""
    return {kind.name for kind in mesh.axis_types or ()}


def varying_axes(aval: Any) -> tuple[str, ...]:
    """The manual axes along which devices may have different values, from the type of a value."""
    kind = getattr(aval, "manual_axis_type", None)  # since JAX 0.10
    return tuple(getattr(aval, "vma", ()) if kind is None else kind.varying)


def as_varying(x: Any, axes: tuple[str, ...]) -> Any:
    """A value in a `shard_map`, cast to a type that also varies over these manual axes."""
    if hasattr(jax.lax, "pcast"):  # the successor of pvary
        return jax.lax.pcast(x, axes, to="varying")
    older: Any = jax.lax
    return older.pvary(x, axes)


def in_memory_of(x: Any, like: Any) -> Any:
    """Moves a traced array to the kind of memory that `like` is in."""
    kind = jax.typeof(like).memory_space
    return x if kind == jax.typeof(x).memory_space else jax.device_put(x, kind)


# --- meshes ---------------------------------------------------------------------------------------


def current_mesh() -> Any:
    """The current mesh; `None` if none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def per_device(
    function: Callable[..., Any], mesh: Any, axis_names: set[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`shard_map` over some axes of a mesh, without JAX's check of which values vary over them."""
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names=axis_names,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


# --- layouts --------------------------------------------------------------------------------------


def dimension_order(x: Any) -> tuple[int, ...] | None:
    """The dimensions of an array in memory, from major to minor; `None` if not known."""
    layout = getattr(getattr(x, "format", None), "layout", None)
    return getattr(layout, "major_to_minor", None)


def layout_format(order: tuple[int, ...], sharding: Any) -> Any:
    """The `Format` of an order of dimensions in memory and a sharding."""
    layouts = experimental("an order of dimensions in memory (row_major, formats)", "layout")
    return layouts.Format(layouts.Layout(order), sharding)


# --- jaxprs ---------------------------------------------------------------------------------------


def source_of(eqn: JaxprEqn) -> Any:
    """A context in which new operations get an equation's source line and name scope."""
    if source_info_util is None:
        return contextlib.nullcontext()
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)


def source_line(eqn: JaxprEqn) -> str:
    """The line of source code that an equation comes from."""
    if source_info_util is None:
        return "a line that this version of JAX does not report"
    return source_info_util.summarize(eqn.source_info)
