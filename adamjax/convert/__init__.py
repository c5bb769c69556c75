"""States from and to optax, Keras and torch, so that a run can go on in another system.

A conversion reads a state, the source, into a common form: the moments and the number of steps of
each leaf, by its path. From this form it fills the state of the other system. It imports neither
optax nor Keras nor torch: it recognizes a state by the classes of optax' states, by the class or
name of a Keras optimizer, or by the keys of torch's groups. It refuses a state that it does not
recognize.

It also refuses a state with which the run would not go on as before. The error names the leaf and
says what to do. The reasons are:

- **Another optimizer.** AdaBelief, RMSprop, Lamb, RAdam and others keep similar arrays. Some
  states do not show their optimizer: RAdam, LAMB, Yogi and ADOPT of optax have states of Adam's
  class, and Keras' arrays may have no names. Moments that no gradients can produce with the betas
  of `tx` are refused. For optax, steps are compared as well.
- **A rule of your own.** Conversions know Adam, AMSGrad, Nadam and Adamax only.
- **Leaves in another order**, if names show it (torch's `param_names`, Keras' variables).
- **Another form of epsilon.** optax and torch add it to the root of the bias-corrected v, as `eps`
  does here. Adam and AMSGrad of Keras, and torch's SparseAdam, add it to sqrt(v) itself, as
  `eps_hat` does. The rule of `tx` must have the same form.
- **Other hyperparameters, or other transforms beside the rule.** torch's groups and a Keras
  optimizer contain hyperparameters, which are compared; Keras' variables contain only the learning
  rate. optax' states contain none, so `from_optax` and `to_optax` also need the optax transform:
  both optimizers take some steps, and their updates are compared.
- **Another form of the rule.** optax' AMSGrad keeps the maximum of bias-corrected moments, optax'
  Nadam has no momentum schedule, and Adamax of optax and torch has epsilon inside the maximum. For
  AMSGrad and Nadam the difference vanishes with the number of steps, and for Adamax it is small
  where gradients are large compared with epsilon. `rtol` is the relative difference that is allowed
  in a step.
- **Rounding**, if the target's dtype cannot represent a value.
- **Another storage format**: `grouped`, `master_weights` or moments in "scaled8". The error says
  how to convert without it.

`check=False` converts the arrays all the same. The run goes on with the hyperparameters of `tx`.

>>> import adamjax, jax.numpy as jnp, optax
>>> params = {"w": jnp.ones(2)}
>>> old = optax.adam(0.1)
>>> updates, state = old.update(params, old.init(params), params)
>>> tx = adamjax.adam(0.1, eps=1e-8)  # optax' form of epsilon
>>> adamjax.step_count(adamjax.convert.from_optax(state, tx, params, optimizer=old))
Array(1, dtype=int32)
"""

from adamjax.convert.keras import from_keras, to_keras
from adamjax.convert.optax import from_optax, to_optax
from adamjax.convert.torch import from_torch, to_torch

__all__ = ["from_keras", "from_optax", "from_torch", "to_keras", "to_optax", "to_torch"]
