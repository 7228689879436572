"""Make the golden values of paths, learned variances and likelihoods with PyTorch libraries.

Writes `likelihood.npz` next to this file. The arrays are named `LIBRARY/CASE/WHAT`. Times of `torchcfm` and
`flow_matching` are theirs: t = 1 is the data.

In an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 flow_matching==1.0.10 torchcfm==1.0.7 numpy
    python tests/golden/make_likelihood.py
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from flow_matching.solver import ODESolver
from torch.distributions import Normal, kl_divergence
from torchcfm import conditional_flow_matching as cfm

HERE = Path(__file__).parent
MEAN, STD = 0.3, 0.5  # of the Gaussian data whose exact denoiser stands in for a network


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torchcfm() -> dict[str, torch.Tensor]:
    """The four conditional flow matchers, away from the ends, where the bridge is singular, and at them."""
    t = torch.tensor([0.0, 0.01, 0.3, 0.5, 0.8, 0.99, 1.0])
    source, data, noise = (normal(7, 2, 3, seed=i) for i in range(3))
    matchers = {
        "icfm": cfm.ConditionalFlowMatcher(0.1),
        "target_cfm": cfm.TargetConditionalFlowMatcher(0.1),
        "schrodinger_bridge": cfm.SchrodingerBridgeConditionalFlowMatcher(0.7),
        "vp_cfm": cfm.VariancePreservingConditionalFlowMatcher(0.1),
    }
    result = {"t": t, "source": source, "data": data, "noise": noise}
    for name, matcher in matchers.items():
        # In Lipman's path the source itself is the noise.
        matcher.sample_noise_like = lambda x, name=name: source if name == "target_cfm" else noise
        x, velocity = cfm.ConditionalFlowMatcher.sample_location_and_conditional_flow(
            matcher, source, data, t
        )[1:]
        result |= {f"{name}/sigma": torch.tensor(matcher.sigma), f"{name}/x": x, f"{name}/velocity": velocity}
    return result


def diffusers() -> dict[str, torch.Tensor]:
    """Log-variances of the type "learned_range"; the first step is improved DDPM's, with its next one's."""
    result = {}
    spread = normal(6, 4, seed=3).clamp(-1.0, 1.0)
    steps = torch.tensor([1, 2, 10, 300, 700, 1000])
    for betas in ("linear", "squaredcos_cap_v2"):
        scheduler = DDPMScheduler(1000, beta_schedule=betas, variance_type="learned_range")
        scheduler.alphas_cumprod = torch.cumprod(1.0 - scheduler.betas.double(), 0)
        scheduler.one = torch.ones((), dtype=torch.float64)
        rows = [scheduler._get_variance(int(i) - 1, spread[k].double()) for k, i in enumerate(steps)]
        share = (spread[0].double() + 1.0) / 2.0
        small = scheduler._get_variance(1, variance_type="fixed_small")
        rows[0] = share * scheduler.betas[0].double().log() + (1.0 - share) * small.log()
        result |= {f"{betas}/betas": scheduler.betas, f"{betas}/log_variance": torch.stack(rows)}
    return result | {"spread": spread, "steps": steps}


def bound() -> dict[str, torch.Tensor]:
    """DDPM's bound in bits, term by term, by torch.distributions, for ten steps with the same noise."""
    betas = torch.linspace(0.01, 0.6, 10, dtype=torch.float64)
    signal = torch.cumprod(1.0 - betas, 0)
    before = torch.cat([torch.ones(1).double(), signal[:-1]])
    x0 = (torch.tensor([[0, 1, 80, 128], [200, 254, 255, 30]]) / 127.5 - 1.0).double()
    noise = normal(2, 4, seed=5).double()
    share = torch.rand(10, 2, 4, generator=torch.Generator().manual_seed(6)).double()
    small = betas * (1.0 - before) / (1.0 - signal)
    terms = []
    for i in range(10):
        x = signal[i].sqrt() * x0 + (1.0 - signal[i]).sqrt() * noise
        guess = (MEAN * (1.0 - signal[i]) + STD**2 * signal[i].sqrt() * x) / (
            1.0 - signal[i] + STD**2 * signal[i]
        )
        keep = (1.0 - betas[i]).sqrt() * (1.0 - before[i]) / (1.0 - signal[i])
        lean = before[i].sqrt() * betas[i] / (1.0 - signal[i])
        least = small[max(i, 1)]
        std = (share[i] * betas[i].log() + (1.0 - share[i]) * least.log()).mul(0.5).exp()
        model = Normal(keep * x + lean * guess, std)
        if i:
            term = kl_divergence(Normal(keep * x + lean * x0, least.sqrt()), model)
        else:
            upper = torch.where(x0 > 0.999, 1.0, model.cdf(x0 + 1.0 / 255.0))
            lower = torch.where(x0 < -0.999, 0.0, model.cdf(x0 - 1.0 / 255.0))
            term = -(upper - lower).log()
        terms.append(term.mean(-1) / np.log(2.0))
    rest = (1.0 - signal[-1]).sqrt()
    prior = kl_divergence(Normal(signal[-1].sqrt() * x0, rest), Normal(0.0 * x0, rest)).mean(-1) / np.log(2.0)
    result = {"betas": betas, "x0": x0, "noise": noise, "share": share}
    return result | {"prior": prior, "terms": torch.stack(terms)}


def flow_matching() -> dict[str, torch.Tensor]:
    """Likelihoods under a field that is not linear, with the exact divergence."""
    solver = ODESolver(lambda x, t: (1.0 - t) * torch.tanh(x) + 0.3 * t)
    data = normal(6, 5, seed=7).double()
    noise, log_likelihood = solver.compute_likelihood(
        data,
        lambda x: Normal(0.0, 1.0).log_prob(x).sum(-1),
        step_size=None,
        method="dopri5",
        atol=1e-9,
        rtol=1e-9,
        time_grid=torch.tensor([1.0, 0.0], dtype=torch.float64),
        exact_divergence=True,
    )
    _, midpoint = solver.compute_likelihood(
        data,
        lambda x: Normal(0.0, 1.0).log_prob(x).sum(-1),
        step_size=0.1,
        method="midpoint",
        time_grid=torch.tensor([1.0, 0.0], dtype=torch.float64),
        exact_divergence=True,
    )
    return {"data": data, "noise": noise, "log_likelihood": log_likelihood, "midpoint": midpoint}


if __name__ == "__main__":
    arrays = {
        f"{library.__name__}/{name}": value.detach().numpy()
        for library in (torchcfm, diffusers, bound, flow_matching)
        for name, value in library().items()
    }
    np.savez_compressed(HERE / "likelihood.npz", **arrays)
