"""Mode `data`: every picture and caption of what is trained on is looked at, before anything is trained.

What is found in pictures is kept where training with `data.check="decode"` finds it.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from diffjax import config as configs
from diffjax import workdir as workdirs
from diffjax.check_config import check_stage
from diffjax.data.captions import printable
from diffjax.data.checked import Findings, without
from diffjax.data.duplicates import confirmed, near_groups, same_groups
from diffjax.data.rejects import FILE, Rejects
from diffjax.data.source import BadExample, Source
from diffjax.errors import UserError
from diffjax.evaluation.grids import contact_sheet, write_png
from diffjax.experiment import build_encoder, build_source, find_bad
from diffjax.parallel import hosts
from diffjax.pretrained import adopt

FOLDER = "data"
SHOWN = 64  # pictures of a contact sheet
_NAMED = 3  # examples of each reason that are printed
_SHORT_KEY = 60


def check_data(config: ConfigDict, workdir: Path) -> None:
    """Check the data of a stage, or of those stages of a cascade that train, and print what was found.

    `workdir/data` receives `report.json`, `rejects.jsonl`, `duplicates.jsonl` and the contact sheet
    `sheet.png`; where stages train on different data, in a folder for each, named after its first stage.

    Raises:
      UserError: the data cannot be opened, or more of them are bad than `data.max_rejects` allows.
    """
    sets = _data_sets(config)
    if not sets:
        raise UserError("this cascade brings no stages to train; check the configuration of each.")
    folder = workdir / FOLDER
    with workdirs.hold(folder, first=hosts.is_first()):
        failed = [
            _check_one(stage, folder / name if len(sets) > 1 else folder) for name, stage in sets.items()
        ]
    if any(failed):
        raise UserError("\n".join(filter(None, failed)))


def _data_sets(config: ConfigDict) -> dict[str, ConfigDict]:
    """The stages that train, one for each data set, by name; several may train on the same."""
    if configs.is_cascade(config):
        stages = {name: entry.train for name, entry in config.stages.items() if "train" in entry}
    else:
        stages = {"stage": adopt(config)}
    distinct: dict[str, tuple[str, ConfigDict]] = {}
    for name, stage in stages.items():
        check_stage(stage)
        distinct.setdefault(stage.data.to_json_best_effort(sort_keys=True), (name, stage))
    return dict(distinct.values())


def _check_one(config: ConfigDict, folder: Path) -> str:
    """Check a data set, print and write what was found; returns why it is not to be used, or ""."""
    source = build_source(config.data, log=print)
    begun = time.monotonic()
    found = find_bad(config.data, source, again=True)
    rate = found.decoded / max(time.monotonic() - begun, 1e-9)
    if not hosts.is_first():
        return ""
    rejected = [*getattr(source, "rejected", ()), *_bad(source, found)]
    good = found.reasons == ""
    sound = without(source, ~good)
    same = same_groups(found.digests[good])
    known = {tuple(group) for group in same}
    near = [group for group in near_groups(found.hashes[good]) if tuple(group) not in known]
    alike = confirmed(sound, near, num_threads=config.data.num_threads)
    alike = [group for group in alike if tuple(group) not in known]

    listed = len(source) + len(rejected) - int((~good).sum())
    report: dict[str, Any] = {"name": source.name, "examples": listed, "usable": len(sound)}
    report["sizes"] = _sizes(found.sizes[good]) | {"resolution": source.resolution}
    report["captions"] = _captions(config, sound)
    report["classes"] = _classes(sound)
    report["rejected"] = dict(Counter(reason for _, reason in rejected).most_common())
    report["duplicates"] = {"same pixels": _tally(same), "alike": _tally(alike)}
    report["decoded"], report["decoded_per_second"] = found.decoded, round(rate, 1) if found.decoded else None

    rejects = Rejects(folder, max_share=config.data.max_rejects)
    failure = ""
    try:
        rejects.found(rejected, listed)
    except UserError as error:
        failure = str(error)
    _write(folder, report, sound, {"same pixels": same, "alike": alike})
    _show(report, rejected, folder)
    return failure if len(sound) else f"None of the {listed:,} examples of {source.name} can be used."


def _bad(source: Source, found: Findings) -> list[tuple[str, str]]:
    return [(source.keys[i], str(found.reasons[i])) for i in np.flatnonzero(found.reasons).tolist()]


def _tally(groups: Sequence[list[int]]) -> dict[str, int]:
    return {"groups": len(groups), "more_than_one_each": sum(len(group) - 1 for group in groups)}


def _sizes(sizes: np.ndarray) -> dict[str, Any]:
    """Least, median and greatest of what headers say, where a source tells it."""
    if not sizes.any():
        return {}
    width, height = sizes[sizes.all(axis=1)].T
    parts = {"width": width, "height": height, "width/height": width / height}
    return {name: [round(float(q), 3) for q in np.quantile(v, (0, 0.5, 1))] for name, v in parts.items()}


def _captions(config: ConfigDict, source: Source) -> dict[str, Any]:
    """What can be said of captions: those that are empty, how long they are, and what is cut off."""
    words = [len(caption.split()) for caption in source.captions] or [0]
    longest = max(range(len(words)), key=words.__getitem__)
    values: dict[str, Any] = {
        "empty": sum(not caption.strip() for caption in source.captions),
        "distinct": len(set(source.captions)),
        "median_words": float(np.median(words)),
        "longest_words": words[longest],
        "longest": source.captions[longest][:200] if len(source) else "",
    }
    # The tokenizers of public encoders come with gigabytes of weights.
    if "text" in config.conditions and config.text.encoder != "public":
        encoder = build_encoder(config)
        if encoder is not None:
            cut = encoder.truncated(source.captions, config.text.length)
            values |= {"text_length": config.text.length, "cut_off": len(cut)}
    return values


def _classes(source: Source) -> dict[str, int]:
    """How many classes there are, and how many examples the least and the most frequent have."""
    if not len(source.labels):
        return {}
    counts = np.bincount(np.asarray(source.labels), minlength=len(source.classes))
    return {"count": len(source.classes), "fewest": int(counts.min()), "most": int(counts.max())}


def _write(
    folder: Path, report: dict[str, Any], source: Source, duplicates: dict[str, Sequence[list[int]]]
) -> None:
    lines = [
        json.dumps({"kind": kind, "keys": [source.keys[i] for i in group]}, ensure_ascii=False)
        for kind, groups in duplicates.items()
        for group in groups
    ]
    texts = {
        "report.json": json.dumps(report, indent=2, ensure_ascii=False),
        "duplicates.jsonl": "\n".join(lines),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            data = text.encode("utf-8", "backslashreplace")
            (folder / name).write_bytes(data + b"\n" if data else b"")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}.") from error
    pictures = []
    count = min(SHOWN, len(source))
    for i in (number * len(source) // count for number in range(count)):
        try:
            pictures.append((source[i].image, source.captions[i] or source.keys[i]))
        except BadExample:  # it was sound when the findings were made
            continue
    if pictures:
        write_png(folder / "sheet.png", contact_sheet(pictures), {"data": source.name})


def _show(report: dict[str, Any], rejected: Sequence[tuple[str, str]], folder: Path) -> None:
    """Print a report as a table."""
    table = Table(title=f"{report['name']}: {report['usable']:,} of {report['examples']:,} examples usable")
    table.add_column("")
    table.add_column("", overflow="fold")
    for name in ("sizes", "captions", "classes"):
        for key, value in report[name].items():
            shown = " / ".join(f"{number:g}" for number in value) if isinstance(value, list) else str(value)
            table.add_row(f"{name}: {key.replace('_', ' ')}", printable(shown)[:_SHORT_KEY])
    for reason, count in report["rejected"].items():
        named = [key for key, why in rejected if why == reason][:_NAMED]
        more = ", …" if count > len(named) else ""
        table.add_row(
            f"rejected: {reason}", f"{count:,} ({', '.join(key[:_SHORT_KEY] for key in named)}{more})"
        )
    for kind, tally in report["duplicates"].items():
        table.add_row(f"duplicates: {kind}", f"{tally['more_than_one_each']:,} in {tally['groups']:,} groups")
    rate = f"{report['decoded_per_second']:,} a second" if report["decoded"] else "the others are known"
    table.add_row("decoded", f"{report['decoded']:,}, {rate}")
    Console(markup=False, highlight=False).print(table)
    print(f"In {folder}: report.json, {FILE}, duplicates.jsonl, sheet.png", flush=True)
