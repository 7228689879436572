"""Mode `sample`: prompts to pictures."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax import workdir as workdirs
from diffjax.cascade import Cascade, encode_prompts, generate, image_keys, open_cascade
from diffjax.errors import UserError
from diffjax.evaluation.grids import square_grid, write_png
from diffjax.parallel import hosts
from diffjax.parallel.mesh import check_batch

_MAX_PROMPTS_BYTES = 64 * 2**20


def sample(config: ConfigDict, workdir: Path) -> None:
    """Sample a cascade for the configuration's prompts and write what comes out below `workdir`.

    Writes one PNG per image, with prompt, seed and settings in its text chunks, and `grid.png`.

    Raises:
      UserError: there are no prompts, a stage is missing, or nothing can be written.
    """
    prompts = read_prompts(config)
    numbers = [n for _ in prompts for n in range(config.num_per_prompt)]
    repeated = [prompt for prompt in prompts for _ in range(config.num_per_prompt)]
    with workdirs.hold(workdir, first=hosts.is_first()):
        cascade = open_cascade(config, workdir)
        check_batch(config.batch_size, cascade.mesh)
        for item in cascade.stages:
            origin = f"trained for {item.step:,} steps" if item.step else "public weights"
            print(f"{item.name}: {item.stage.resolution} px, {origin}.", flush=True)
        print(f"Sampling {len(repeated)} images for {len(prompts)} prompts.", flush=True)
        cond = encode_prompts(cascade, prompts, print)
        rows = np.repeat(np.arange(len(prompts)), config.num_per_prompt)
        cond = jax.tree.map(lambda leaf: leaf[rows], cond)
        keys = image_keys(config.seed, repeated, numbers)
        images = generate(cascade, cond, keys, batch_size=config.batch_size)[-1]
        if not hosts.is_first():
            return
        folder = workdir / "samples"
        columns = config.num_per_prompt if config.num_per_prompt > 1 else None  # a row for each prompt
        for i, image in enumerate(images):
            name = f"{i // config.num_per_prompt:04d}-{_slug(repeated[i])}-{numbers[i]}.png"
            write_png(folder / name, image, describe(cascade, config, repeated[i], numbers[i]))
        write_png(workdir / "grid.png", square_grid(list(images), columns), {"prompts": "\n".join(prompts)})
    print(f"{len(images)} images are in {folder}, and together in {workdir / 'grid.png'}.", flush=True)


def read_prompts(config: ConfigDict) -> list[str]:
    """The prompts of a configuration: `prompts`, separated by ';', then the lines of `prompts_file`.

    Raises:
      UserError: there are none, one is empty, or the file cannot be read.
    """
    prompts = config.prompts.split(";") if config.prompts else []
    if config.prompts_file:
        path = Path(config.prompts_file).expanduser()
        try:
            if path.stat().st_size > _MAX_PROMPTS_BYTES:
                raise UserError(f"prompts_file={path} is larger than {_MAX_PROMPTS_BYTES >> 20} MiB.")
            prompts += path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"prompts_file={path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"prompts_file={path} is not UTF-8 text (byte {error.start}).") from error
    prompts = [prompt.strip() for prompt in prompts]
    if not prompts:
        raise UserError("there are no prompts: give --config.prompts='a; b' or --config.prompts_file=FILE.")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i + 1} of {len(prompts)} is empty: give each prompt some text.")
    if config.num_per_prompt < 1:
        raise UserError(f"num_per_prompt={config.num_per_prompt}; expected at least 1.")
    return prompts


def describe(cascade: Cascade, config: ConfigDict, prompt: str, number: int) -> dict[str, str]:
    """What a PNG says about how it was made."""
    stages = {
        item.name: {"step": item.step, **json.loads(config.stages[item.name].sampler.to_json_best_effort())}
        for item in cascade.stages
    }
    return {
        "Software": "diffjax",
        "prompt": prompt,
        "seed": str(config.seed),
        "number": str(number),
        "stages": json.dumps(stages, sort_keys=True),
    }


def _slug(prompt: str, longest: int = 40) -> str:
    """The prompt as a part of a file name: ASCII letters and digits only."""
    words: Sequence[str] = "".join(c if c.isascii() and c.isalnum() else " " for c in prompt).split()
    return "-".join(words)[:longest].strip("-") or "prompt"
