"""Makes edm2.npz: the U-Net of EDM2 in PyTorch, written from the equations of its paper (arXiv:2312.02696).

Run in an environment with torch (CPU): `python tests/golden/make_edm2.py`. The parameters are stored under
the paths that they have here, so that a test need not rename them.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

WIDTHS, BLOCKS, ATTENTION, HEAD, CLASSES = (4, 8), 3, (False, True), 4, 5
EMBED = max(WIDTHS)
RANDOM = torch.Generator().manual_seed(0)
PARAMS: dict[str, list[torch.Tensor]] = {}


def draw(path, shape):
    """A parameter; one that is drawn again is the next layer of a stack."""
    tensor = (1.5 * torch.randn(shape, generator=RANDOM)).requires_grad_()
    PARAMS.setdefault(path, []).append(tensor)
    return tensor


def unit(w, out):
    """Weight normalisation: vectors of unit length, one an output; `out` is the axis of the outputs."""
    dims = [axis for axis in range(w.ndim) if axis != out]
    length = w.square().sum(dims, keepdim=True).sqrt()
    fan_in = w.numel() // w.shape[out]
    return w / (1e-4 + length / math.sqrt(fan_in)) / math.sqrt(fan_in)


def conv(x, path, features, size=3):
    w = draw(path + "/direction", (size, size, x.shape[1], features))
    return F.conv2d(x, unit(w.permute(3, 2, 0, 1), 0), padding=size // 2)


def linear(x, path, features):
    return F.linear(x, unit(draw(path + "/direction", (x.shape[-1], features)).T, 0))


def norm(x, dim):
    """Pixel norm."""
    return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())


def act(x):
    """Magnitude-preserving SiLU."""
    return F.silu(x) / 0.596


def mix(a, b, t):
    """Magnitude-preserving sum."""
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def cat(a, b, t=0.5):
    """Magnitude-preserving concatenation."""
    n, m = a.shape[1], b.shape[1]
    c = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return torch.cat([c * (1 - t) / math.sqrt(n) * a, c * t / math.sqrt(m) * b], dim=1)


def attend(x, path):
    b, c, h, w = x.shape
    qkv = linear(x.permute(0, 2, 3, 1).reshape(b, h * w, c), path + "/qkv", 3 * c)
    q, k, v = (norm(part.reshape(b, h * w, c // HEAD, HEAD), -1) for part in qkv.split(c, dim=-1))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(math.sqrt(HEAD)).softmax(-1)
    y = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, h * w, c)
    y = linear(y, path + "/out", c)
    return y.reshape(b, h, w, c).permute(0, 3, 1, 2)


def block(x, emb, path, features, kind, attention=False, resample=""):
    """A block of config G, of an encoder or a decoder."""
    if resample == "down":
        x = F.avg_pool2d(x, 2)
    if resample == "up":
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    adapt = x.shape[1] != features
    if kind == "encoder":
        x = norm(conv(x, path + "/skip", features, 1) if adapt else x, 1)
    y = conv(act(x), path + "/conv_in", features)
    gain = draw(path + "/gain", ())
    y = act(y * (1 + gain * linear(emb, path + "/modulation", features))[:, :, None, None])
    y = conv(y, path + "/conv_out", features)
    if kind == "decoder" and adapt:
        x = conv(x, path + "/skip", features, 1)
    x = mix(x, y, 0.3)
    if attention:
        x = mix(x, attend(x, path), 0.3)
    return x.clip(-256, 256)


def network(x, level, label):
    n = WIDTHS[0]
    frequencies = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    phases = torch.arange(n, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    features = math.sqrt(2) * torch.cos(2 * math.pi * (level.double()[:, None] * frequencies + phases))
    emb = linear(features.float(), "noise_level", EMBED)
    one_hot = torch.stack([torch.eye(CLASSES)[i] if i >= 0 else torch.zeros(CLASSES) for i in label])
    emb = act(mix(emb, linear(one_hot * math.sqrt(CLASSES), "label", EMBED), 0.5))

    x = conv(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), "in", n)
    levels = []
    for i, (width, attention) in enumerate(zip(WIDTHS, ATTENTION, strict=True)):
        if i:
            x = block(x, emb, f"down_{i}", x.shape[1], "encoder", resample="down")
        skips = [x]
        for j in range(BLOCKS):
            x = block(x, emb, f"down_{i}_{'rest' if j else 'first'}", width, "encoder", attention)
            skips.append(x)
        levels.append(skips)
    x = block(x, emb, "middle_0", WIDTHS[-1], "decoder", attention=True)
    x = block(x, emb, "middle_1", WIDTHS[-1], "decoder")
    for i in reversed(range(len(WIDTHS))):
        for j in range(BLOCKS + 1):
            place = "first" if j == 0 else "last" if j == BLOCKS else "rest"
            x = cat(x, levels[i].pop())
            x = block(x, emb, f"up_{i}_{place}", WIDTHS[i], "decoder", ATTENTION[i])
        if i:
            x = block(x, emb, f"up_{i}", WIDTHS[i], "decoder", resample="up")
    return draw("gain", ()) * conv(x, "out", 3)


def main() -> None:
    x = torch.randn(3, 3, 8, 4, generator=RANDOM, requires_grad=True)
    level = torch.tensor([-0.7, 0.1, 1.1], requires_grad=True)
    label = [2, -1, 4]
    out = network(x, level, label)
    cotangent = torch.randn(out.shape, generator=RANDOM)
    (out * cotangent).sum().backward()
    arrays = {"x": x, "level": level, "label": torch.tensor(label), "out": out, "cotangent": cotangent}
    arrays |= {"grad_x": x.grad, "grad_level": level.grad}
    for path, copies in PARAMS.items():
        stacked = "_rest" in path
        arrays[f"param:{path}"] = torch.stack(copies) if stacked else copies[0]
        assert stacked or len(copies) == 1
        if path.split("/")[0] in ("noise_level", "label", "down_0_rest", "up_1_rest", "up_0_last", "gain"):
            gradients = [copy.grad for copy in copies]
            arrays[f"grad:{path}"] = torch.stack(gradients) if stacked else gradients[0]
    np.savez_compressed(
        Path(__file__).parent / "edm2.npz", **{key: value.detach().numpy() for key, value in arrays.items()}
    )


if __name__ == "__main__":
    main()
