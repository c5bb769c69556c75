"""A second implementation of the optimizers, in float64 NumPy, from the papers, not from adamjax.

A rule takes the gradients of one leaf, a list with one for each step. It returns the list of the
leaf's updates. Updates go uphill and have no learning rate. `descend` turns them into weights:

    weights, averages = descend(start, adam(grads), learning_rate=1e-3)

The step number `t` starts at 1, and the `count` of a schedule at 0. Sources:

    [A]  Kingma & Ba, "Adam: a method for stochastic optimization", arXiv:1412.6980
    [R]  Reddi, Kale & Kumar, "On the convergence of Adam and beyond", arXiv:1904.09237
    [W]  Loshchilov & Hutter, "Decoupled weight decay regularization", arXiv:1711.05101
    [N]  Dozat, "Incorporating Nesterov momentum into Adam", ICLR 2016 workshop
    [K]  the documents of tf.keras.optimizers, where they differ from the papers or add to them
    [P]  Pascanu, Mikolov & Bengio, "On the difficulty of training RNNs", arXiv:1211.5063
"""

import itertools

import numpy as np


def float64(arrays):
    """A list of the same arrays, in float64."""
    return [np.asarray(x, np.float64) for x in arrays]


# Moments


def average(xs, decay):
    """The moving average m_t = decay m_{t-1} + (1 - decay) x_t, with m_0 = 0 ([A], Algorithm 1)."""
    xs = float64(xs)
    averages = itertools.accumulate(
        xs, lambda m, x: decay * m + (1 - decay) * x, initial=np.zeros_like(xs[0])
    )
    return list(averages)[1:]


def first_moments(grads, b1):
    """m of every step ([A], Algorithm 1)."""
    return average(grads, b1)


def second_moments(grads, b2):
    """v of every step ([A], Algorithm 1)."""
    return average([g * g for g in float64(grads)], b2)


def maxima(xs):
    """v_max of every step, from v of every step: the largest v so far ([R], Algorithm 2)."""
    return list(itertools.accumulate(float64(xs), np.maximum))


def infinity_norms(grads, b2):
    """u of every step: u_t = max(b2 u_{t-1}, |g_t|) ([A], Algorithm 2)."""
    return list(itertools.accumulate(map(np.abs, float64(grads)), lambda u, g: np.fmax(b2 * u, g)))


# Rules


def adam(grads, b1=0.9, b2=0.999, *, eps_hat=None, eps=None):
    """With `eps`, Algorithm 1 of [A]. With `eps_hat`, the form just before section 2.1 of [A].

    With neither, eps_hat = 1e-7 ([K]).
    """
    m = first_moments(grads, b1)
    v = second_moments(grads, b2)
    return _normalised(_unbiased(m, b1), v, b2, eps_hat, eps)


def amsgrad(grads, b1=0.9, b2=0.999, *, eps_hat=None, eps=None):
    """[R], Algorithm 2, with Adam's bias corrections: of m, and of v_max in place of v ([K])."""
    m = first_moments(grads, b1)
    v_max = maxima(second_moments(grads, b2))
    return _normalised(_unbiased(m, b1), v_max, b2, eps_hat, eps)


def adamax(grads, b1=0.9, b2=0.999, *, eps=1e-7):
    """[A], Algorithm 2, divided by u + eps ([K]; the paper has no eps)."""
    m = _unbiased(first_moments(grads, b1), b1)
    u = infinity_norms(grads, b2)
    return [m_t / (u_t + eps) for m_t, u_t in zip(m, u, strict=True)]


def nadam(grads, b1=0.9, b2=0.999, *, eps_hat=None, eps=None):
    """[N], Algorithm 8, with the schedule mu_t = b1 (1 - 0.5 * 0.96^t) of [K].

    m_hat_t = mu_{t+1} m_t / (1 - mu_1...mu_{t+1}) + (1 - mu_t) g_t / (1 - mu_1...mu_t). The moment
    m itself decays by b1. With neither epsilon, eps = 1e-7 ([K]).
    """
    if eps_hat is None and eps is None:
        eps = 1e-7
    grads = float64(grads)
    m = first_moments(grads, b1)
    v = second_moments(grads, b2)
    mu = [b1 * (1 - 0.5 * 0.96**t) for t in range(1, len(grads) + 2)]  # mu[i] is mu_{i+1}
    product = list(itertools.accumulate(mu, lambda a, b: a * b))
    m_hat = [
        mu[i + 1] * m_t / (1 - product[i + 1]) + (1 - mu[i]) * g / (1 - product[i])
        for i, (g, m_t) in enumerate(zip(grads, m, strict=True))
    ]
    return _normalised(m_hat, v, b2, eps_hat, eps)


def _unbiased(moments, decay):
    """m_hat_t = m_t / (1 - decay^t) ([A], section 3)."""
    return [m / (1 - decay**t) for t, m in enumerate(moments, 1)]


def _normalised(m_hat, v, b2, eps_hat, eps):
    """m_hat / (sqrt(v_hat) + eps), or sqrt(1 - b2^t) m_hat / (sqrt(v) + eps_hat)."""
    if eps_hat is not None and eps is not None:
        raise TypeError("pass eps_hat or eps, not both")
    if eps is not None:
        v_hat = _unbiased(v, b2)
        return [m_t / (np.sqrt(v_t) + eps) for m_t, v_t in zip(m_hat, v_hat, strict=True)]
    eps_hat = 1e-7 if eps_hat is None else eps_hat
    return [
        np.sqrt(1 - b2**t) * m_t / (np.sqrt(v_t) + eps_hat)
        for t, (m_t, v_t) in enumerate(zip(m_hat, v, strict=True), 1)
    ]


# Transforms of gradients, which come before a rule


def clip_by_value(g, limit):
    """One leaf's gradient, with each element clipped to [-limit, limit] ([K], `clipvalue`)."""
    return np.clip(np.asarray(g, np.float64), -limit, limit)


def clip_by_norm(g, max_norm):
    """One leaf's gradient, scaled to the norm max_norm if its norm is larger ([K], `clipnorm`)."""
    return clip_by_global_norm([g], max_norm)[0]


def clip_by_global_norm(gs, max_norm):
    """The gradients of all leaves in one step, scaled to max_norm if their norm is larger ([P])."""
    gs = float64(gs)
    norm = np.sqrt(sum((g * g).sum() for g in gs))
    return [g * (max_norm / norm) if norm > max_norm else g for g in gs]


def accumulate(grads, steps):
    """The mean gradient of each group of `steps` micro-batches. A shorter last group is dropped."""
    grads = float64(grads)
    end = len(grads) - len(grads) % steps
    return [sum(grads[i : i + steps]) / steps for i in range(0, end, steps)]


def after_each_micro_batch(start, values, steps, num_micro_batches):
    """The weights (or their averages) after each micro-batch.

    Args:
      start: the weights before the first micro-batch.
      values: the weights after each step.
      steps: the number of micro-batches in a step.
    """
    values = float64([start, *values])
    return [values[i // steps] for i in range(1, num_micro_batches + 1)]


# Learning rate, weight decay and the average of the weights, which come after a rule


def inverse_time_decay(initial, decay_steps, decay_rate):
    """initial / (1 + decay_rate * count / decay_steps) ([K], InverseTimeDecay).

    The option `decay=d` of Keras' legacy optimizers is inverse_time_decay(learning_rate, 1, d).
    """
    return lambda count: initial / (1 + decay_rate * count / decay_steps)


def descend(
    start, updates, learning_rate, weight_decay=0.0, *, momentum=0.0, overwrite_frequency=None
):
    """The weights and their moving averages after every step, as two lists.

    p_t = p_{t-1} - lr_t (update_t + weight_decay p_{t-1}): the decay is decoupled ([W], Algorithm
    2) and multiplied by the learning rate, as in [K]. `learning_rate` is a number, or a function of
    the number of steps before this one.

    avg_t = momentum avg_{t-1} + (1 - momentum) p_t, where avg_0 is the initial weights. At every
    `overwrite_frequency`-th step, the average replaces the weights ([K], `use_ema`).
    """
    rate = learning_rate if callable(learning_rate) else lambda count: learning_rate
    p = avg = np.asarray(start, np.float64)
    weights, averages = [], []
    for count, update in enumerate(float64(updates)):
        p = p - rate(count) * (update + weight_decay * p)
        avg = momentum * avg + (1 - momentum) * p
        if overwrite_frequency and (count + 1) % overwrite_frequency == 0:
            p = avg
        weights.append(p)
        averages.append(avg)
    return weights, averages
