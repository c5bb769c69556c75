"""torch: the adamjax form of `Embedding(sparse=True)` with `SparseAdam`.

torch's SparseAdam moves only the rows that a batch read, and leaves the moments of all others as
they are. `adam(rows="lazy")` does the same. `tables=` names the leaves with row gradients, so a
step costs only the work on the rows. Here both libraries take the same steps.

Needs torch. Run it with `python docs/recipes/torch_sparse_adam.py`.
"""

import jax.numpy as jnp
import numpy as np
import torch

import adamjax

ROWS, WIDTH, STEPS = 1_000, 8, 50
rng = np.random.default_rng(0)
start = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
batches = rng.integers(0, 100, size=(STEPS, 32))

# --- torch
embedding = torch.nn.Embedding(ROWS, WIDTH, sparse=True)
embedding.weight.data = torch.tensor(start)
optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.01)
for ids in batches:
    optimizer.zero_grad()
    loss = ((embedding(torch.tensor(ids)).sum(dim=1) - 1.0) ** 2).mean()
    loss.backward()
    optimizer.step()


# --- adamjax
def loss_fn(params, ids):
    return jnp.mean((params["embedding"][ids].sum(axis=1) - 1.0) ** 2)


# SparseAdam adds its epsilon to the uncorrected root, which is `eps_hat=` here.
tx = adamjax.adam(0.01, eps_hat=1e-8, rows="lazy")
params = {"embedding": jnp.asarray(start)}
state, step = tx.init(params), adamjax.train_step(loss_fn, tx, tables="embedding")
for ids in batches:
    params, state, loss = step(params, state, jnp.asarray(ids))

difference = np.abs(np.asarray(params["embedding"]) - embedding.weight.detach().numpy()).max()
print(f"the largest difference of a weight after {STEPS} steps: {difference:.0e}")

# Dense Adam also moves rows that are not read, by their momentum. `exact_rows` does that too, and
# its cost also depends only on the rows that are read. It needs no `tables=`:
# `adamjax.exact_rows(adamjax.adam(0.01), "embedding")`.
