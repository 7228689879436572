"""What imagen-pytorch makes of the same pictures, embeddings and time, to be measured beside a base stage.

    python -m benchmarks.quality configs/quickstart.py --minutes 5.2 --peer-python PYTHON

It gives the base stage's training pictures and encoded captions to `quality_peer.py`, which trains that
library's own U-Net with its own trainer for so long, and samples captions of the split, the ones that
`--mode=evaluate` asks for. The last lines are the commands that measure both.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.train_step import trained_stages
from diffjax.data.source import Source
from diffjax.experiment import build_encoder, build_source, build_text_table
from diffjax.measures import pictures
from diffjax.samples import ask


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and sample the peer, and say how to measure both."""
    options = _options(arguments)
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    name, stage = min(trained_stages(options.config).items(), key=lambda item: item[1].resolution)
    for split in options.splits:
        source = build_source(stage.data, split=split, log=print)
        np.savez(workdir / f"{split}.npz", **arrays(stage, source, options.images))
    settings = {
        "unet": {"dim": options.dim, **json.loads(options.unet)},
        "rate": options.rate,
        "batch": options.batch or stage.batch_size,
        "minutes": options.minutes,
        "steps": options.steps,
        "guidance": options.guidance,
        "resolution": stage.resolution,
        "train": stage.data.split,
        "splits": options.splits,
    }
    (workdir / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    peer = Path(__file__).with_name("quality_peer.py")
    status = subprocess.run([options.peer_python, str(peer), str(workdir)], check=False).returncode
    if status:
        sys.exit(f"{options.peer_python} ended with status {status}.")
    ours = f"python -m diffjax.main --mode=evaluate --config={options.config}"
    ours += f" --config.evaluate.stage={name.split()[-1]}"
    images = f"--config.evaluate.num_images={options.images}"
    for split in options.splits:
        print(f"{ours} {images} --config.evaluate.splits=\"('{split}',)\"")
        for scale in options.guidance:
            folder = workdir / f"{split}-{scale:g}"
            print(
                f"{ours} --config.evaluate.splits=\"('{split}',)\" --config.evaluate.folder={folder}",
                flush=True,
            )


def arrays(stage: ConfigDict, source: Source, count: int) -> dict[str, Any]:
    """What the peer is given of a split.

    Returns:
      `images` uint8 `[n, resolution, resolution, 3]`; of each picture's caption `states`
      `[n, length, embed]` and `mask` `[n, length]`; `places`, the pictures whose captions are to be sampled,
      and these `captions`.
    """
    table = build_text_table(stage, build_encoder(stage), source.captions, log=print)
    if table is None:
        sys.exit("The base stage is not conditioned on text.")
    text, asked = table.rows(source.captions), ask(source.captions, count)
    return {
        "images": np.concatenate(list(pictures(source, stage.resolution))),
        "states": text.states,
        "mask": text.mask,
        "places": np.asarray(asked.places),
        "captions": np.asarray(asked.captions),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a cascade's configuration, with its stages'")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has imagen-pytorch")
    parser.add_argument("--workdir", type=Path, default=Path("runs/quality"), help="receives everything")
    parser.add_argument("--minutes", type=float, required=True, help="of training, the first update included")
    parser.add_argument("--dim", type=int, default=24, help="width of the U-Net; 24: 7.5 M parameters")
    parser.add_argument("--unet", default="{}", help="JSON of other arguments of the U-Net; its own defaults")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate; its own default")
    parser.add_argument("--batch", type=int, default=0, help="batch size; the stage's")
    parser.add_argument("--images", type=int, default=500, help="samples of each split")
    parser.add_argument("--splits", nargs="+", default=["train"], help="whose captions are sampled")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="guidance scales")
    parser.add_argument("--steps", type=int, default=100, help="steps of sampling")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
