"""Fine-tune a model with adapters: bfloat16 weights, rates by pattern, and four wrappers.

The base is frozen: the loss gets it as another argument, so it has no gradients and no state. The
adapters are float32. The scale of the normalization is bfloat16, with a float32 copy in the state.
From the outside in, the optimizer has: `with_hyperparams`, which lets us set a factor by hand; four
micro-batches a step; no step if gradients are not finite; float32 weights; and a chain of clip,
AdamW, `scale` (its factor multiplies every rate) and an average of the weights.

Run it with `python docs/recipes/fine_tuning.py`.
"""

import jax
import jax.numpy as jnp

import adamjax

WIDTH, RANK, STEPS, MICRO_BATCHES = 32, 4, 60, 4
keys = jax.random.split(jax.random.key(0), 4)
base = jax.random.normal(keys[0], (2, WIDTH, WIDTH), jnp.bfloat16) / WIDTH**0.5
goal = base + jax.random.normal(keys[1], (2, WIDTH, 1)) * jax.random.normal(keys[2], (WIDTH,)) / 20


def model(params, base, x):
    for i, kernel in enumerate(base):
        lora = params["lora"][f"layer{i}"]
        x = jnp.tanh(x @ kernel + x @ lora["a"] @ lora["b"]) * params["norm"]["scale"]
    return x


def loss_fn(params, base, x):
    zeros = jax.tree.map(jnp.zeros_like, params) | {"norm": {"scale": jnp.ones(WIDTH)}}
    return jnp.mean((model(params, base, x) - model(zeros, goal, x)) ** 2)


lora = {"a": jax.random.normal(keys[3], (WIDTH, RANK)) / 6, "b": jnp.zeros((RANK, WIDTH))}
params = {"lora": {"layer0": lora, "layer1": lora}, "norm": {"scale": jnp.ones(WIDTH, "bfloat16")}}
params = jax.tree.map(jnp.copy, params)  # a donated array must not be in the tree twice


def rate(peak):
    return adamjax.warmup(adamjax.cosine_decay(peak, decay_steps=STEPS - 5), steps=5, start=1e-4)


rates = adamjax.by_path([("^norm/", rate(1e-3)), ("layer0", rate(1e-2))], default=rate(2e-2))
chain = adamjax.chain(
    adamjax.clip_by_global_norm(1.0),
    adamjax.adamw(rates, mask="lora"),
    adamjax.scale(1.0),
    adamjax.weight_ema(0.9),
)
guarded = adamjax.skip_not_finite(adamjax.master_weights(chain))
tx = adamjax.with_hyperparams(adamjax.accumulate_gradients(guarded, MICRO_BATCHES), factor=1.0)
state, step = tx.init(params), adamjax.train_step(loss_fn, tx)
losses = []
for i in range(STEPS * MICRO_BATCHES):
    x = jax.random.normal(jax.random.fold_in(keys[3], i), (16, WIDTH))
    x = x.at[0, 0].set(jnp.nan) if i == 50 else x
    if i == STEPS * MICRO_BATCHES // 2:
        state = adamjax.set_hyperparams(state, factor=0.5)  # half of every rate from here on
    params, state, loss = step(params, state, base, x)
    losses.append(loss)
print(f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
averaged = adamjax.eval_step(loss_fn, tx, averaged=True)(params, state, base, x)
print(f"of the averaged weights {averaged:.4f}")
print(adamjax.step_count(state), "steps,", adamjax.skipped_steps(state), "skipped")
print(adamjax.float32_weights(state, params)["norm"]["scale"].dtype, "weights of the norm")
