"""The other libraries' side of the comparisons: a server that runs in a Python of its own.

    python peer.py

It reads one JSON object a line and answers with one. It imports torch and nothing of this library, so that
neither packages nor threads of the two get into each other's way.

- `{"build": "train" | "forward" | "sampling", "compiled": bool, "threads": int, "case": {…}}` answers
  `{"parameters", "library", "first_seconds", "id"}`, or `{"absent": why}`.
- `{"run": count, "id": number}` runs what was built and answers `{"seconds": [of the clock, of all cores]}`.
"""

import importlib
import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

LEARNING_RATE, DECAY, CLIP_NORM = 1e-4, 0.999, 1.0


def main() -> None:
    """Serve until the other side closes the pipe."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not get between the answers
    built: list[Any] = []
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "build" in request:
                run, about = build(request)
                start = time.perf_counter()
                run()
                about["first_seconds"] = time.perf_counter() - start
                built.append(run)
                answer = {**about, "id": len(built) - 1}
            else:
                start = time.perf_counter(), time.process_time()
                for _ in range(request["run"]):
                    built[request["id"]]()
                seconds = time.perf_counter() - start[0], time.process_time() - start[1]
                answer = {"seconds": seconds}
        except Exception as error:  # the other side says so in its table and goes on
            answer = {"absent": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), file=replies)


def build(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A function to be timed, and what is to be said about it."""
    import torch

    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    case = request["case"]
    model, library = network(case["peer"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    call = lambda x, t: output(model, x, t, conditions, case)  # noqa: E731
    conditions = given(case)
    if request["build"] == "sampling":
        run = sampler(model, case, conditions, request["compiled"])
    else:
        if request["compiled"]:
            call = torch.compile(call)
        run = {"train": trainer, "forward": forward}[request["build"]](model, call, case)
    return run, {"parameters": parameters, "library": f"{library}, torch {torch.__version__.split('+')[0]}"}


def network(peer: dict[str, Any]) -> tuple[Any, str]:
    """The network with random parameters, none of them zero, and the version of its library."""
    import torch

    if peer["library"] == "imagen_pytorch":
        module = imagen_pytorch()
    else:
        module = importlib.import_module(peer["library"])
    model = getattr(module, peer["class"])(**peer["config"])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02)
    version = importlib.import_module("importlib.metadata").version(peer["library"])
    return model, f"{peer['library'].replace('_', '-')} {version}"


def imagen_pytorch() -> Any:
    """imagen-pytorch, which asks for the width of a T5 from the network when it is imported."""
    from transformers import T5Config

    T5Config.from_pretrained = classmethod(lambda cls, *args, **options: cls(d_model=768))
    return importlib.import_module("imagen_pytorch")


def given(case: dict[str, Any]) -> SimpleNamespace:
    """Conditions of a batch."""
    import torch

    batch, side = case["batch"], case["side"]
    found = SimpleNamespace(label=torch.zeros(batch, dtype=torch.long))
    found.low_res = torch.randn(batch, case["channels"], side, side)
    if case["text"]:
        length, width, pooled = case["text"]
        found.text, found.pooled = torch.randn(batch, length, width), torch.randn(batch, pooled)
        found.mask = torch.ones(batch, length, dtype=torch.bool)
    return found


def output(model: Any, x: Any, t: Any, cond: SimpleNamespace, case: dict[str, Any]) -> Any:
    """The prediction of the noise at times of [0, 1000)."""
    name = type(model).__name__
    if name == "Unet":  # imagen-pytorch
        extra = {"lowres_cond_img": cond.low_res, "lowres_noise_times": t / 1000} if case["low_res"] else {}
        how = {"text_embeds": cond.text, "text_mask": cond.mask, "cond_drop_prob": 0.0}
        return model(x, t / 1000, **how, **extra)
    if name == "SD3Transformer2DModel":
        how = {"encoder_hidden_states": cond.text, "pooled_projections": cond.pooled}
        return model(x, timestep=t, return_dict=False, **how)[0]
    if name == "DiTTransformer2DModel":
        out = model(x, timestep=t, class_labels=cond.label, return_dict=False)[0]
        return out[:, : case["channels"]]
    return model(x, t, return_dict=False)[0]


def trainer(model: Any, call: Any, case: dict[str, Any]) -> Any:
    """An update: AdamW, clipping of the gradients, a moving average of the parameters."""
    import torch

    model.train()
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    # Every parameter has a gradient, if only a zero one, as it would have in any training.
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    x0 = torch.randn(case["batch"], case["channels"], case["side"], case["side"])
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def run() -> None:
        t = torch.randint(0, 1000, x0.shape[:1])
        noise, level = torch.randn_like(x0), alphas[t][:, None, None, None]
        prediction = call(level.sqrt() * x0 + (1 - level).sqrt() * noise, t)
        torch.nn.functional.mse_loss(prediction, noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - DECAY)

    return run


def forward(model: Any, call: Any, case: dict[str, Any]) -> Any:
    """The network's output."""
    import torch

    model.eval()
    x = torch.randn(case["batch"], case["channels"], case["side"], case["side"])
    t = torch.full(x.shape[:1], 500)

    def run() -> None:
        with torch.inference_mode():
            call(x, t)

    return run


def sampler(model: Any, case: dict[str, Any], cond: SimpleNamespace, compiled: bool) -> Any:
    """Images by the library's own pipeline, with no guidance and nothing to decode."""
    import torch

    model.eval()
    name, batch, steps = type(model).__name__, case["batch"], case["num_steps"]
    if name == "Unet":
        return imagen_sampler(model, case, cond)
    import diffusers

    if name not in ("UNet2DModel", "DiTTransformer2DModel"):
        raise NotImplementedError(f"no pipeline for {name}")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    if compiled:
        model.forward = torch.compile(model.forward)
    if name == "UNet2DModel":
        pipeline = diffusers.DDIMPipeline(model, scheduler)
        options: dict[str, Any] = {"batch_size": batch}
    else:
        pipeline = diffusers.DiTPipeline(model, identity(), scheduler)
        options = {"class_labels": [0] * batch, "guidance_scale": 1.0}
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(num_inference_steps=steps, output_type="np", **options)


def imagen_sampler(model: Any, case: dict[str, Any], cond: SimpleNamespace) -> Any:
    """Images of one stage of imagen-pytorch's cascade, with as many steps and no guidance."""
    import torch

    module = imagen_pytorch()
    extra = {"start_image_or_video": cond.low_res[:, :, ::2, ::2]} if case["low_res"] else {}
    sides, unets, number = (case["side"],), (model,), 1
    if case["low_res"]:  # the second stage of a cascade whose first is skipped
        sides, unets, number = (case["side"] // 2, case["side"]), (module.NullUnet(), model), 2
    settings = {"text_embed_dim": case["text"][1], "dynamic_thresholding": False}
    imagen = module.Imagen(unets, image_sizes=sides, timesteps=case["num_steps"], **settings).eval()
    how = {"text_embeds": cond.text, "text_masks": cond.mask, "cond_scale": 1.0, "use_tqdm": False}

    def run() -> None:
        with torch.inference_mode():
            imagen.sample(**how, **extra, start_at_unet_number=number)

    return run


def identity() -> Any:
    """What stands for an autoencoder where latents are to be compared: it decodes to what it is given."""
    import torch

    class Identity(torch.nn.Module):
        config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1,))
        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, latents: Any) -> Any:
            return SimpleNamespace(sample=latents)

    return Identity()


if __name__ == "__main__":
    main()
