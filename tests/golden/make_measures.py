"""Make the golden values of the measures with four other libraries.

Writes `measures.npz` next to this file: random features, logits, pictures, and what others measure of them.

In an environment of its own:

    pip install torch==2.15.0 torchmetrics==1.9.0 torch-fidelity==0.4.0 scikit-image==0.26.0 prdc==0.2 numpy
    python tests/golden/make_measures.py
"""

from pathlib import Path

import numpy as np
import torch
from prdc import compute_prdc
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd, kernel_rbf, kid_features_to_metric, mmd2
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

HERE = Path(__file__).parent


def features(rng: np.random.Generator) -> dict[str, object]:
    """Distances of two sets of features of equal size, correlated, and away from zero."""
    mix = rng.normal(size=(2, 16, 16)) / 4.0 + np.eye(16)
    a = rng.normal(size=(120, 16)) @ mix[0] + 3.0
    b = rng.normal(size=(120, 16)) @ mix[1] + 3.2
    told = [fid_features_to_statistics(torch.tensor(x)) for x in (a, b)]
    tensors = [torch.tensor(part) for one in told for part in (one["mu"], one["sigma"])]
    subsets = kid_features_to_metric(
        torch.tensor(a), torch.tensor(b), kid_subsets=2, kid_subset_size=120, verbose=False
    )
    lengths = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    pairs = ((0, 0), (0, 1), (1, 1))
    rbf = [kernel_rbf(lengths[i], lengths[j], kid_kernel_rbf_sigma=10.0) for i, j in pairs]
    precision, recall = calculate_precision_recall_full(torch.tensor(b), torch.tensor(a), 3)
    near = compute_prdc(a, b, 5)
    return {
        "features/a": a,
        "features/b": b,
        "frechet/torch_fidelity": fid_statistics_to_metric(*told, verbose=False)[
            "frechet_inception_distance"
        ],
        "frechet/torchmetrics": _compute_fid(*tensors),
        "kid/torchmetrics": poly_mmd(torch.tensor(a), torch.tensor(b)),
        "kid/torch_fidelity": kernel_mmd(a, b),
        "kid/subsets": [subsets[f"kernel_inception_distance_{name}"] for name in ("mean", "std")],
        "cmmd/torch_fidelity": 1000.0 * mmd2(*rbf, mmd_est="biased"),
        "precision/torch_fidelity": [precision, recall],
        "precision/prdc": [near[name] for name in ("precision", "recall", "density", "coverage")],
    }


def logits(rng: np.random.Generator) -> dict[str, object]:
    """The Inception score, with splits of unequal sizes, in the order given; torchmetrics' of one split."""
    x = 2.0 * rng.normal(size=(103, 10))
    score = isc_features_to_metric(torch.tensor(x), splits=10, shuffle=False)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.features.append(torch.tensor(x))
    return {
        "logits": x,
        "inception/torch_fidelity": [score[f"inception_score_{name}"] for name in ("mean", "std")],
        "inception/torchmetrics": metric.compute()[0],
    }


def pictures(rng: np.random.Generator) -> dict[str, object]:
    """PSNR and SSIM of each of three pictures, as floats in [0, 1]; SSIM with the border and without."""
    steps = np.linspace(0.0, 1.0, 24)
    smooth = 0.5 + 0.4 * np.sin(steps[:, None, None] * [3.0, 5.0, 7.0] + 4.0 * steps[:, None])
    x = np.stack([smooth, smooth[::-1], np.swapaxes(smooth, 0, 1)])
    y = np.clip(x + rng.normal(size=x.shape) * np.array([0.02, 0.05, 0.2])[:, None, None, None], 0.0, 1.0)
    tensors = [torch.tensor(part).permute(0, 3, 1, 2) for part in (x, y)]
    settings = {"gaussian_weights": True, "use_sample_covariance": False, "channel_axis": -1}
    return {
        "pictures/x": x,
        "pictures/y": y,
        "psnr/skimage": [peak_signal_noise_ratio(*pair, data_range=1.0) for pair in zip(x, y, strict=True)],
        "ssim/torchmetrics": structural_similarity_index_measure(*tensors, data_range=1.0, reduction="none"),
        "ssim/skimage": [
            structural_similarity(*pair, data_range=1.0, **settings) for pair in zip(x, y, strict=True)
        ],
    }


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    arrays = {**features(rng), **logits(rng), **pictures(rng)}
    np.savez_compressed(HERE / "measures.npz", **{name: np.asarray(a) for name, a in arrays.items()})
