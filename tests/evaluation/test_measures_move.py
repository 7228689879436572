"""On real pictures, each measure goes the right way when they are spoilt; features are boxes of pixels."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from diffjax.data.emoji import load_emoji
from diffjax.data.transforms import downsample
from diffjax.evaluation.distances import cmmd, frechet_to, kid
from diffjax.evaluation.errorbars import jackknife
from diffjax.evaluation.images import consistency, psnr, ssim
from diffjax.evaluation.memorisation import memorisation
from diffjax.evaluation.precision import precision_recall_density_coverage
from diffjax.evaluation.retrieval import shuffled
from diffjax.evaluation.scores import clip_score, diversity, inception_score, r_precision
from diffjax.evaluation.statistics import Moments
from diffjax.interop.features import open_extractor

COUNT = 300


def see(images):
    """Colours and contrasts of 16 boxes: `[n, 96]`, each of about the same spread."""
    x = images.astype(np.float32) / 255.0
    boxes = (len(x), 4, 16, 4, 16, 3)
    contrast = sum(np.abs(np.diff(x, axis=axis, append=0.5)) for axis in (1, 2))
    colours, contrasts = (part.reshape(boxes).mean(axis=(2, 4)).reshape(len(x), -1) for part in (x, contrast))
    return np.concatenate([colours, 3.0 * contrasts], axis=1)


@pytest.fixture(scope="module")
def emoji(cache_dir):
    return load_emoji(cache_dir, resolution=64)


@pytest.fixture(scope="module")
def real(emoji):
    """Two halves of as many real pictures, of different concepts: what is compared, and the reference."""
    rows = np.random.default_rng(0).permutation(len(emoji))[: 2 * COUNT]
    images = np.stack([emoji[int(i)].image for i in rows])
    return images[:COUNT], images[COUNT:]


def blur(images, amount):
    return ndimage.gaussian_filter(images, (0.0, 2.0 * amount, 2.0 * amount, 0.0))


def noise(images, amount):
    off = np.random.default_rng(1).normal(0.0, 25.0 * amount, images.shape)
    return np.clip(np.rint(images + off), 0, 255).astype(np.uint8)


def dropped(images, amount):
    """Only the lightest pictures, repeated: the fewer the larger the amount."""
    order = np.argsort(-images.mean(axis=(1, 2, 3)), kind="stable")
    return images[np.resize(order[: int(len(images) / (1 + amount))], len(images))]


def rises(values):
    return all(low < high for low, high in itertools.pairwise(values))


@pytest.mark.parametrize("spoil", [blur, noise, dropped])
def test_distances_rise(real, spoil):
    ours, reference = real
    known = see(reference)
    distance = frechet_to(Moments(known.shape[1]).add(known))
    seen = [see(spoil(ours, amount) if amount else ours) for amount in (0, 1, 3)]
    for measure in (lambda x: jackknife(distance, x), lambda x: kid(x, known), lambda x: cmmd(x, known)):
        found = [measure(x) for x in seen]
        assert rises([value for value, _ in found])
        clear = found[2].value - found[0].value
        assert clear > 2.0 * np.hypot(found[0].error, found[2].error)  # beyond what chance does


def fidelity(ours, reference, spoil, amounts):
    known = see(reference)
    return [precision_recall_density_coverage(known, see(spoil(ours, a) if a else ours)) for a in amounts]


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (noise, ("precision", "recall", "density", "coverage")),
        (blur, ("recall", "coverage")),  # by their colours and contrasts, dull pictures could well be real
    ],
)
def test_spoilt_pictures_cost_fidelity(real, spoil, names):
    found = fidelity(*real, spoil, (0, 0.5, 1))
    assert found[0].precision.value > 0.7
    for name in names:
        assert rises([getattr(one, name).value for one in reversed(found)])


def test_dropped_modes_cost_recall_and_coverage_but_no_precision(real):
    found = fidelity(*real, dropped, (0, 1, 3, 7))
    for name in ("recall", "coverage"):
        assert rises([getattr(one, name).value for one in reversed(found)])
    assert found[-1].precision.value > found[0].precision.value - 0.1


def test_dropped_modes_cost_inception_score(real):
    """The classes are bands of brightness."""
    middles = np.linspace(60.0, 250.0, 8)

    def logits(images):
        return -0.05 * (images.mean(axis=(1, 2, 3))[:, None] - middles) ** 2

    found = [inception_score(logits(dropped(real[0], a))).value for a in (0, 1, 3)]
    assert rises(found[::-1])


@pytest.mark.parametrize("spoil", [blur, noise])
def test_psnr_ssim_and_consistency_fall(real, spoil):
    images = real[0][:40]
    small = downsample(images, 4)
    for measure in (psnr, ssim):
        found = [measure(spoil(images, amount), images).mean() for amount in (0.25, 1, 3)]
        assert rises(found[::-1])
    found = [consistency(spoil(images, amount), small).mean() for amount in (0.25, 1, 3)]
    assert rises(found[::-1])
    assert found[0] < consistency(images, small).mean() == np.inf


def test_shuffled_captions_are_noticed(emoji):
    """A caption is embedded as the picture that the other style draws of its concept."""
    places: dict[str, list[int]] = {}
    for i, concept in enumerate(emoji.concepts):
        places.setdefault(concept, []).append(i)
    pairs = {concept: rows for concept, rows in places.items() if len(rows) == 2}
    concepts = list(pairs)[:300]
    images, texts = (
        see(np.stack([emoji[pairs[concept][side]].image for concept in concepts])) for side in (0, 1)
    )
    images, texts = images - images.mean(axis=0), texts - texts.mean(axis=0)
    place = {concept: i for i, concept in enumerate(concepts)}
    wrong = texts[[place[concept] for concept in shuffled(concepts, 0)]]
    right, spoilt = clip_score(images, texts), clip_score(images, wrong)
    assert right.value - spoilt.value > 5.0 * np.hypot(right.error, spoilt.error)
    right, spoilt = (r_precision(images, found, concepts, wrong=19) for found in (texts, wrong))
    assert right.value > 0.2
    assert abs(spoilt.value - 0.05) < 3.0 * max(spoilt.error, 0.01)


def test_memorised_copies_are_noticed_and_distances_are_pleased(real):
    ours, training = real
    copies = noise(training[:100], 0.1)
    half = np.concatenate([ours[:100], copies])
    known = see(training)
    found = [memorisation(see(x), known) for x in (ours[:200], half)]
    assert found[0].share.value < 0.1
    assert abs(found[1].share.value - 0.5) < 0.1
    pairs = found[1].pairs(80)
    assert np.mean([sample >= 100 and sample - 100 == training for sample, training, _ in pairs]) > 0.9
    distance = frechet_to(Moments(known.shape[1]).add(known))
    assert distance(see(half)) < distance(see(ours[:200]))


def test_alike_pictures_cost_diversity(real):
    images, prompts = real[0][:40], [i // 4 for i in range(40)]

    def distance(a, b):
        return np.linalg.norm(see(a) - see(b), axis=1)

    collapsed = images.copy()
    collapsed[1::2] = collapsed[::2]
    one = np.repeat(images[::4], 4, axis=0)
    found = [diversity(x, prompts, distance).value for x in (one, collapsed, images)]
    assert found[0] == 0.0
    assert rises(found)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [blur, noise])
def test_a_network_notices_what_boxes_do_not(real, spoil):
    """To trained features blurred pictures are no more real than noisy ones."""
    extractor = open_extractor("efficientnet_lite0")
    ours, reference = (images[:120] for images in real)
    known = extractor(reference).features
    seen = [extractor(spoil(ours, amount) if amount else ours).features for amount in (0, 1)]
    found = [precision_recall_density_coverage(known, x) for x in seen]
    for name in found[0]._fields:
        assert rises([getattr(one, name).value for one in reversed(found)])
    distance = frechet_to(Moments(extractor.width).add(known))
    for measure in (distance, lambda x: kid(x, known).value, lambda x: cmmd(x, known).value):
        assert rises([measure(x) for x in seen])
