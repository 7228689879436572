"""Which examples of a source are trained on: those that can be used, the same in every process."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax.data.checked import Findings, check_pictures, fingerprint, without
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.experiment.tables import Log
from diffjax.parallel import hosts

# What changes neither the pictures nor whether they can be decoded.
_WITHOUT_EFFECT = ("cache_dir", "num_threads", "num_concepts", "flip", "check", "max_rejects")


def open_rejects(config: ConfigDict, workdir: Path, *, resumed: bool, log: Log = print) -> Rejects:
    """The bad examples of a stage's run, with files in `workdir`; all processes must open it together."""
    with hosts.first_alone("rejects"):  # it removes the files of a run that is not resumed
        return Rejects(
            workdir,
            max_share=config.data.max_rejects,
            process=jax.process_index(),
            resumed=resumed,
            log=log,
        )


def usable_examples(
    config: ConfigDict,
    source: Source,
    rejects: Rejects,
    *,
    decode: bool = False,
    log: Log = print,
    check: Callable[[], None] = lambda: None,
) -> Source:
    """The source without the examples that are known to be bad before the training; `rejects` notes them.

    Those are what the source itself rejected, and with `data.check="decode"`, or cached latents, what cannot
    be decoded.

    Args:
      config: a stage's configuration.
      source: the pictures.
      rejects: see `open_rejects`.
      decode: whether to decode every picture once, whatever `data.check` says.
      log: receives lines about the checks, as `print` would.
      check: called every now and then; what it raises ends the decoding, and what was found is kept.

    Raises:
      UserError: too many are bad, none is left, or the processes do not see the same data.
    """
    if config.data.check not in ("header", "decode"):
        raise UserError(f"data.check={config.data.check!r} does not exist; there are: decode, header.")
    _check_same(source)
    found = list(getattr(source, "rejected", ()))
    listed = len(source) + len(found)
    # A latent's picture and caption are of one example: none can take the place of another.
    if decode or config.data.check == "decode" or config.latent.cache:
        reasons = find_bad(config.data, source, log=log, check=check).reasons
        bad = hosts.anywhere(reasons != "")
        found += [
            (source.keys[i], str(reasons[i]) or "it cannot be used by another process")
            for i in np.flatnonzero(bad).tolist()
        ]
        source = without(source, bad)
    rejects.found(found, listed)
    if found:
        counts = ", ".join(f"{count:,}: {reason}" for reason, count in rejects.counts.items())
        named = f"; {rejects.path} names them" if rejects.path else ""
        log(f"{len(found):,} of {listed:,} examples are left out ({counts}){named}.")
    if not len(source):
        raise UserError(f"None of the {listed:,} examples of {source.name} can be used.")
    return source


def find_bad(
    data: ConfigDict,
    source: Source,
    *,
    again: bool = False,
    log: Log = print,
    check: Callable[[], None] = lambda: None,
) -> Findings:
    """Decode every picture, or find in the cache what came of it; several processes share the work.

    Args:
      data: the part `data` of a stage's configuration.
      source: its pictures.
      again: whether to decode those anew that could not be used.
      log: receives lines about progress.
      check: called every now and then, see `diffjax.data.checked.check_pictures`.
    """
    settings = {key: value for key, value in data.to_dict().items() if key not in _WITHOUT_EFFECT}
    options = {
        "settings": json.dumps(settings, sort_keys=True, default=str),
        "num_threads": max(data.num_threads, os.cpu_count() or 1),  # the devices have nothing to do yet
        "log": log,
        "check": check,
    }
    folder = Path(data.cache_dir).expanduser() / "checked"
    part = (jax.process_index(), jax.process_count())
    found = check_pictures(source, folder, part=part, again=again, **options)
    if part[1] == 1:
        return found
    hosts.wait("pictures are checked")
    whole = check_pictures(source, folder, **options)  # in another folder than the others' all are decoded
    return whole._replace(decoded=found.decoded + whole.decoded)


def _check_same(source: Source) -> None:
    """Refuse processes that see different data: each would take other examples for the same place."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(fingerprint(source)), np.uint8)).astype(bool)
    if (hosts.anywhere(bits) & hosts.anywhere(~bits)).any():
        raise UserError(
            f"The processes see different data ({source.name}, {len(source):,} examples here): all need the "
            "same files."
        )
