"""Write blocks.npz: rotary positions as diffusers' FLUX has them, and PyTorch's activations and attention.

To be run with torch 2.13 (CPU) and diffusers 0.42: `python tests/golden/make_blocks.py`.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

WIDTHS = (4, 6, 6)

random = np.random.default_rng(0)
arrays = {}


def normal(*shape):
    return torch.from_numpy(random.normal(size=shape).astype(np.float32))


# Rotary positions along three axes: text at zero, then an image of 2 x 3 patches.
positions = np.zeros((8, 3), np.float32)
positions[2:, 1:] = [(row, column) for row in range(2) for column in range(3)]
positions[:, 0] = 7.0
x = normal(2, 8, 3, 16)
cos, sin = FluxPosEmbed(theta=10_000, axes_dim=WIDTHS)(torch.from_numpy(positions))
turned = apply_rotary_emb(x, (cos, sin), sequence_dim=1)
arrays["rotary/positions"], arrays["rotary/x"], arrays["rotary/turned"] = positions, x, turned

x = torch.linspace(-4.0, 4.0, 41)
arrays["activation/x"] = x
arrays["activation/gelu"] = F.gelu(x)
arrays["activation/gelu_tanh"] = F.gelu(x, approximate="tanh")
arrays["activation/silu"] = F.silu(x)
arrays["activation/relu"] = F.relu(x)

# Attention with a mask of keys and a bias, and causal attention: its gradients too.
query, key, value = (normal(2, length, 2, 8).requires_grad_() for length in (5, 7, 7))
mask = torch.from_numpy(random.random((2, 7)) < 0.6)
mask[:, 3] = True
bias = normal(1, 2, 5, 7).requires_grad_()
cotangent = normal(2, 5, 2, 8)


def attend(**kwargs):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, scale=0.3, **kwargs).transpose(1, 2)


added = bias.masked_fill(~mask[:, None, None, :], float("-inf"))
masked = attend(attn_mask=added)
(masked * cotangent).sum().backward()
arrays |= {"attention/query": query, "attention/key": key, "attention/value": value, "attention/mask": mask}
arrays |= {"attention/bias": bias, "attention/cotangent": cotangent, "attention/masked": masked}
for name, leaf in {"query": query, "key": key, "value": value, "bias": bias}.items():
    arrays[f"attention/grad_{name}"] = leaf.grad
arrays["attention/causal"] = attend(is_causal=True)

path = Path(__file__).with_name("blocks.npz")
np.savez_compressed(path, **{k: v.detach().numpy() if torch.is_tensor(v) else v for k, v in arrays.items()})
