"""imagen-pytorch's side of `benchmarks.quality`: trains its U-Net, then samples, with its own package alone.

    python quality_peer.py WORKDIR

`WORKDIR/settings.json` and `SPLIT.npz` are what `benchmarks.quality` wrote; samples are
`SPLIT-GUIDANCE/NNNN.png` with their captions in `NNNN.txt`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer import imagen_pytorch


def main() -> None:
    """Train for the given time, and write the samples."""
    workdir = Path(sys.argv[1])
    settings = json.loads((workdir / "settings.json").read_text(encoding="utf-8"))
    library = imagen_pytorch()
    torch.manual_seed(0)
    given = arrays(workdir, settings["train"])
    width = given["states"].shape[-1]
    unet = library.Unet(text_embed_dim=width, **settings["unet"])
    # Times are continuous in training: `timesteps` are those of sampling.
    imagen = library.Imagen(
        unets=(unet,),
        image_sizes=(settings["resolution"],),
        text_embed_dim=width,
        timesteps=settings["steps"],
    )
    trainer = library.ImagenTrainer(imagen, lr=settings["rate"], verbose=False)
    count = sum(parameter.numel() for parameter in unet.parameters())
    print(f"imagen-pytorch, {count:,} parameters, {settings}", flush=True)
    train(trainer, given, settings["batch"], 60 * settings["minutes"])
    for split in settings["splits"]:
        for scale in settings["guidance"]:
            sample(trainer, arrays(workdir, split), workdir / f"{split}-{scale:g}", scale)


def arrays(workdir: Path, split: str) -> dict[str, Any]:
    """What is known of a split."""
    with np.load(workdir / f"{split}.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def train(trainer: Any, given: dict[str, Any], batch: int, seconds: float) -> None:
    """Updates in shuffled epochs until the time is over."""
    images = torch.from_numpy(given["images"]).permute(0, 3, 1, 2).float() / 255.0
    states, mask = torch.from_numpy(given["states"]).float(), torch.from_numpy(given["mask"])
    start = told = time.monotonic()
    order, updates, losses = torch.empty(0, dtype=torch.long), 0, list[float]()
    while time.monotonic() - start < seconds:
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(images))])
        rows, order = order[:batch], order[batch:]
        loss = trainer(images[rows], text_embeds=states[rows], text_masks=mask[rows], unet_number=1)
        trainer.update(unet_number=1)
        losses.append(loss)
        updates += 1
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{told - start:.0f} s: {updates} updates, loss {np.mean(losses[-100:]):.4f}", flush=True)
    print(f"{time.monotonic() - start:.0f} s: {updates} updates of {batch} pictures", flush=True)


def sample(trainer: Any, given: dict[str, Any], folder: Path, scale: float, batch: int = 50) -> None:
    """Write an image for each caption that is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for first in range(0, len(given["places"]), batch):
        rows = given["places"][first : first + batch]
        images = trainer.sample(
            text_embeds=torch.from_numpy(given["states"][rows]).float(),
            text_masks=torch.from_numpy(given["mask"][rows]),
            cond_scale=scale,
            return_pil_images=True,
            use_tqdm=False,
        )
        for number, image in enumerate(images, start=first):
            image.save(folder / f"{number:04d}.png")
            caption = str(given["captions"][number])
            (folder / f"{number:04d}.txt").write_text(caption, encoding="utf-8")
    print(f"{time.monotonic() - start:.0f} s of sampling: {folder}", flush=True)


if __name__ == "__main__":
    main()
