"""States from and to optax, Keras and torch: a run that goes on here, or there, where it stood.

What a system keeps is read into one form, by the path of a leaf: its moments, and the steps that
they have taken. From that form a state is filled, ours or theirs. Neither optax nor Keras nor
torch is imported: what a state holds is told by the classes of optax' states, the class or name
of a Keras optimizer, and the keys of torch's groups. What is not known by these is refused.

A conversion is refused, with the leaf's path and what to do, where the run would not go on as it
would have:

- **Another optimizer**, as far as it shows: AdaBelief, RMSprop, Lamb, RAdam and others keep what
  looks alike. optax' RAdam, LAMB, Yogi and ADOPT have states of Adam's class, and arrays of Keras
  without names do not say whose they are; of these, moments that no gradients can leave with the
  betas of `tx` are refused, and the rest cannot be told.
- **Leaves in another order**, where names show it (torch's `param_names`, Keras' variables).
- **A form of epsilon.** optax and torch add it to the corrected root (`eps`), Keras and torch's
  SparseAdam to the root (`eps_hat`). The rule of `tx` must have theirs.
- **Hyperparameters**, as far as the source says them: torch's groups, what optax's
  `inject_hyperparams` holds, the learning rate in Keras' variables. An optax state says nothing of
  its betas, its epsilon, its `eps_root` (which must be 0) or its rate: build `tx` with the same.
- **A rule of another form**, where it shows: optax' AMSGrad, whose maximum is over bias-corrected
  moments; optax' Nadam, which has no momentum schedule; Adamax of optax and torch, whose epsilon
  is inside the maximum. Both forms become one, for AMSGrad and Nadam with the steps taken, for
  Adamax where gradients are large against epsilon; `rtol` says how close is close enough.
- **A value that would be rounded** by the dtype that is to hold it.

`check=False` takes the arrays all the same, and the run goes on as `tx` says.

>>> import adamjax, jax.numpy as jnp, optax
>>> params = {"w": jnp.ones(2)}
>>> theirs = optax.adam(0.1)
>>> updates, state = theirs.update(params, theirs.init(params), params)
>>> tx = adamjax.adam(0.1, eps=1e-8)  # as optax's, which is on the corrected root
>>> adamjax.step_count(adamjax.convert.from_optax(state, tx, params))
Array(1, dtype=int32)
"""

from adamjax.convert.keras import from_keras, to_keras
from adamjax.convert.optax import from_optax, to_optax
from adamjax.convert.torch import from_torch, to_torch

__all__ = ["from_keras", "from_optax", "from_torch", "to_keras", "to_optax", "to_torch"]
