"""Complete optimizers: chains of rules and scalings whose updates can be applied to parameters."""

from typing import Any

from adamjax.adam import scale_by_adam, scale_by_adamax, scale_by_amsgrad
from adamjax.chain import chain
from adamjax.data import Number
from adamjax.leaves import Rows
from adamjax.paths import Mask
from adamjax.scaling import add_decayed_weights, scale_by_learning_rate
from adamjax.schedule import Rate

__all__ = ["adam", "adamax", "adamw", "amsgrad", "nadam"]


def adam(
    learning_rate: Rate = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.999,
    *,
    eps_hat: Number | None = None,
    eps: Number | None = None,
    m_dtype: Any = None,
    v_dtype: Any = None,
    rows: Rows = "dense",
) -> chain:
    """Adam (Kingma & Ba, arXiv:1412.6980): `scale_by_adam`, then `scale_by_learning_rate`.

    Args:
      learning_rate: a float or scalar array of at least 0, a schedule, or `by_path`.
      b1, b2, eps_hat, eps, m_dtype, v_dtype, rows: as in `scale_by_adam`.

    Returns:
      The chain; `apply_updates(params, updates)` takes the step.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.adam(0.1)
    >>> params = {"w": jnp.array(1.0), "b": jnp.array(2.0)}
    >>> grads = {"w": jnp.array(3.0), "b": jnp.array(-5.0)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> adamjax.apply_updates(params, updates)
    {'b': Array(2.1, dtype=float32), 'w': Array(0.9, dtype=float32)}
    """
    rule = scale_by_adam(
        b1, b2, eps_hat=eps_hat, eps=eps, m_dtype=m_dtype, v_dtype=v_dtype, rows=rows
    )
    return chain(rule, scale_by_learning_rate(learning_rate))


def amsgrad(
    learning_rate: Rate = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.999,
    *,
    eps_hat: Number | None = None,
    eps: Number | None = None,
    m_dtype: Any = None,
    v_dtype: Any = None,
    rows: Rows = "dense",
) -> chain:
    """AMSGrad (Reddi et al., arXiv:1904.09237): `scale_by_amsgrad`, then `scale_by_learning_rate`.

    Arguments and result are those of `adam`.

    >>> import adamjax
    >>> adamjax.amsgrad(0.1, b1=0.8)  # doctest: +NORMALIZE_WHITESPACE
    chain(scale_by_amsgrad(b1=0.8, b2=0.999, eps_hat=1e-07),
          scale_by_learning_rate(learning_rate=0.1))
    """
    rule = scale_by_amsgrad(
        b1, b2, eps_hat=eps_hat, eps=eps, m_dtype=m_dtype, v_dtype=v_dtype, rows=rows
    )
    return chain(rule, scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: Rate = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.999,
    *,
    eps_hat: Number | None = None,
    eps: Number | None = None,
    weight_decay: Rate = 0.004,
    mask: Mask | None = None,
    m_dtype: Any = None,
    v_dtype: Any = None,
    rows: Rows = "dense",
) -> chain:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101): Adam with decoupled weight decay.

    `p -= learning_rate * (u + weight_decay * p)`, with u the update of `scale_by_adam`.

    Args:
      learning_rate, b1, b2, eps_hat, eps, m_dtype, v_dtype, rows: as in `adam`.
      weight_decay: as in `add_decayed_weights`. The default, 0.004, is that of Keras.
      mask: which leaves decay: patterns, a tree of bools or a function, as in
        `add_decayed_weights`.

    Returns:
      The chain; its `update` needs `params`.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.adamw(0.1, weight_decay=0.5, mask="kernel")
    >>> params = {"bias": jnp.ones(1), "kernel": jnp.ones(1)}
    >>> zeros = {"bias": jnp.zeros(1), "kernel": jnp.zeros(1)}
    >>> tx.update(zeros, tx.init(params), params)[0]
    {'bias': Array([-0.], dtype=float32), 'kernel': Array([-0.05], dtype=float32)}
    """
    rule = scale_by_adam(
        b1, b2, eps_hat=eps_hat, eps=eps, m_dtype=m_dtype, v_dtype=v_dtype, rows=rows
    )
    return chain(
        rule, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate)
    )


def adamax(
    learning_rate: Rate = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.999,
    *,
    eps: Number = 1e-7,
    m_dtype: Any = None,
    u_dtype: Any = None,
    rows: Rows = "lazy",
) -> chain:
    """Adamax (Kingma & Ba, arXiv:1412.6980, algorithm 2).

    `scale_by_adamax`, then `scale_by_learning_rate`. The arguments are those of these two; `rows`
    is "lazy" by default, as in `scale_by_adamax`.

    >>> import adamjax
    >>> adamjax.adamax(0.1)  # doctest: +NORMALIZE_WHITESPACE
    chain(scale_by_adamax(b1=0.9, b2=0.999, eps=1e-07),
          scale_by_learning_rate(learning_rate=0.1))
    """
    rule = scale_by_adamax(b1, b2, eps=eps, m_dtype=m_dtype, u_dtype=u_dtype, rows=rows)
    return chain(rule, scale_by_learning_rate(learning_rate))


def nadam(
    learning_rate: Rate = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.999,
    *,
    eps: Number = 1e-7,
    m_dtype: Any = None,
    v_dtype: Any = None,
    rows: Rows = "dense",
) -> chain:
    """Nadam (Dozat, 2016) as Keras defines it, with its momentum schedule.

    `scale_by_adam(..., nesterov=True)`, then `scale_by_learning_rate`. The arguments are those of
    these two, without `eps_hat`.

    >>> import adamjax
    >>> adamjax.nadam(0.1)  # doctest: +NORMALIZE_WHITESPACE
    chain(scale_by_adam(b1=0.9, b2=0.999, eps=1e-07, nesterov=True),
          scale_by_learning_rate(learning_rate=0.1))
    """
    rule = scale_by_adam(
        b1, b2, eps=eps, nesterov=True, m_dtype=m_dtype, v_dtype=v_dtype, rows=rows
    )
    return chain(rule, scale_by_learning_rate(learning_rate))
