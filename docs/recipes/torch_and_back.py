"""Move a torch run with a scheduler to adamjax, train there, and move it back.

The parameters are a list in torch's order, so `order=` is not needed. torch's Linear has the
transpose of a kernel, so `adapt` transposes each moment. (The transpose of a bias is the bias.)

Needs torch. Run it with `python docs/recipes/torch_and_back.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

import adamjax

RATE, LAST_RATE, STEPS, DECAY = 1e-2, 1e-4, 30, 0.05
rng = np.random.default_rng(0)
batches = [rng.normal(size=(2, 32, 8)).astype(np.float32) for _ in range(STEPS)]


def start():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, LAST_RATE)


def train(model, optimizer, scheduler, batches):
    for x, y in batches:
        optimizer.zero_grad()
        ((model(torch.tensor(x)) - torch.tensor(y)) ** 2).mean().backward()
        optimizer.step()
        scheduler.step()


def transposed(path, x):
    return x.T


def loss_fn(params, x, y):
    kernel_1, bias_1, kernel_2, bias_2 = params
    return jnp.mean((jnp.tanh(x @ kernel_1 + bias_1) @ kernel_2 + bias_2 - y) ** 2)


old_run = model, optimizer, _ = start()
train(*old_run, batches[:10])

params = [jnp.array(np.array(p.detach()).T) for p in model.parameters()]
rate = adamjax.cosine_decay(RATE, STEPS, alpha=LAST_RATE / RATE)
tx = adamjax.adamw(rate, eps=1e-8, weight_decay=DECAY)
state = adamjax.convert.from_torch(optimizer.state_dict(), tx, params, adapt=transposed)
step = adamjax.train_step(loss_fn, tx)
for x, y in batches[10:20]:
    params, state, loss = step(params, state, x, y)

# Back into a new run. First move its scheduler to the same step: that sets torch's rate.
new_run = new_model, new_optimizer, new_scheduler = start()
for _ in range(20):
    new_scheduler.step()
target = new_optimizer.state_dict()
state_dict = adamjax.convert.to_torch(state, tx, params, target, adapt=transposed)
tensors = jax.tree.map(lambda x: torch.tensor(x) if isinstance(x, np.ndarray) else x, state_dict)
new_optimizer.load_state_dict(tensors)
for p, x in zip(new_model.parameters(), params, strict=True):
    p.data = torch.tensor(np.array(x.T))

train(*old_run, batches[10:])  # all in torch
train(*new_run, batches[20:])
pairs = zip(model.parameters(), new_model.parameters(), strict=True)
print(f"the largest difference of a weight: {max((a - b).abs().max() for a, b in pairs):.0e}")
