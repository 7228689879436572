"""The networks of mode `evaluate` together, against what each of them says alone."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from random_weights import random_pictures
from safetensors.numpy import load_file, save_file

from diffjax import judges, measures
from diffjax.errors import UserError
from diffjax.evaluation.features import Extractor, Features, PairDistance
from diffjax.evaluation.prepare import cropped, unchanged
from diffjax.evaluation.statistics import Moments, Statistics
from diffjax.interop import clip, vision
from diffjax.interop.clip_towers import open_clip
from diffjax.interop.model import open_network
from diffjax.interop.text import read_tokenizer
from diffjax.judges import Judges, Known, Seen, judge, judge_real, look, together, variety
from diffjax.measures import Reference

GOLDEN = Path(__file__).parent / "golden"
CAPTIONS = ["a red apple", "a black cat", "two dogs", "", "a red apple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole CLIP of the two towers in golden/, which transformers wrote, and a tokenizer beside them."""
    path = tmp_path_factory.mktemp("clip")
    towers = {
        name: tensor
        for name, tensor in load_file(GOLDEN / "features" / "clip" / "model.safetensors").items()
        if name.startswith(("vision_model.", "visual_projection."))
    }
    for name, tensor in load_file(GOLDEN / "text" / "clip_lp" / "model.safetensors").items():
        prefixed = name.startswith(("text_model.", "text_projection."))
        towers[name if prefixed else f"text_model.{name}"] = tensor
    # As they are, all their cosines are negative, which the score makes 0.
    towers["text_projection.weight"] = -towers["text_projection.weight"]
    save_file(towers, path / "model.safetensors")
    config = json.loads((GOLDEN / "features" / "clip" / "config.json").read_text())
    config["text_config"] = json.loads((GOLDEN / "text" / "clip_lp" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config))
    for part in (GOLDEN / "text" / "tokenizer_clip").iterdir():
        shutil.copy(part, path)
    with (path / "pytorch_model.bin").open("wb") as file:  # larger than any file of a tokenizer
        file.truncate(64 * 2**20)
    return path


def embeddings(images, captions):
    """What the two towers alone say, opened from where transformers wrote them."""
    opened = open_network(GOLDEN / "features" / "clip", vision.FAMILIES)
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (cropped(42)(images) / 255 - mean) / deviation
    seen = opened.module.apply({"params": opened.read()}, pixels.astype(np.float32))
    opened = open_network(GOLDEN / "text" / "clip_lp", clip.FAMILIES)
    tokenizer = read_tokenizer(GOLDEN / "text" / "tokenizer_clip")
    ids = tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="np")
    read = opened.module.apply({"params": opened.read()}, ids["input_ids"].astype(np.int32)).pooled
    return np.asarray(seen, np.float64), -np.asarray(read, np.float64)


def cosines(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def reference(features):
    moments = Moments(features.shape[1]).add(features)
    statistics = Statistics(moments.mean, moments.cov, moments.count, "")
    return Reference("pictures", "digest", statistics, features)


def extractor(width):
    """The first pixels of a picture."""
    return Extractor(
        "Plain",
        "FD-Plain",
        width,
        0,
        unchanged,
        lambda params, x: (x.reshape(len(x), -1)[:, :width], None),
        {},
    )


def difference(params, pairs):
    pairs = pairs.astype(np.float32)
    return abs(pairs[..., :3] - pairs[..., 3:]).mean(axis=(1, 2, 3))


def test_clip_says_what_its_towers_say(folder, monkeypatch):
    images = random_pictures(5, 30, 40)
    seen, read = embeddings(images, CAPTIONS)
    own = open_clip(folder)
    assert own.distance == "MMD-CLIP-L/14@42"  # not CMMD, which is of one network alone
    trusted = Judges(clip=own)
    found = together([look(trusted, images[:2]), look(trusted, images[2:])])
    np.testing.assert_allclose(found.clip, seen, atol=1e-4 * np.abs(seen).max())
    real = reference(found.clip[:3] + 1.0)
    monkeypatch.setattr(judges, "_WRONG", 3)
    scores, suspects = judge(trusted, Known(clip=real), found, CAPTIONS, count=2, seed=0)
    assert not suspects
    expected = 100.0 * cosines(seen, read).clip(0.0)
    assert scores["CLIP score"].value == pytest.approx(expected.mean(), rel=1e-4)
    assert expected.mean() > 1.0
    # With as many wrong captions as there are, chance has no part in it.
    unit = read / np.linalg.norm(read, axis=1, keepdims=True)
    hits = [(row @ unit.T)[i] >= (row @ unit.T).max() for i, row in enumerate(seen)]
    hits[4] = (seen[4] @ unit.T).argmax() in (0, 4)
    assert scores["R-precision"].value == np.mean(hits)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (seen, real.features))
    kernel = [np.exp((x @ y.T - 1.0) / 100.0).mean() for x, y in ((a, a), (b, b), (a, b))]
    assert scores[own.distance].value == pytest.approx(
        1e3 * (kernel[0] + kernel[1] - 2 * kernel[2]), rel=1e-3
    )
    assert "CLIP score" not in judge(trusted, Known(clip=real), found, (), count=2, seed=0)[0]
    assert set(judge_real(trusted, Known(clip=real), CAPTIONS[:3], seed=0)) == {"CLIP score"}


def test_captions_are_encoded_once(folder, monkeypatch):
    own = open_clip(folder)
    first = own.read(CAPTIONS)
    monkeypatch.setattr(own.text, "encode", None)
    assert np.array_equal(own.read(CAPTIONS[::-1]), first[::-1])


def test_a_clip_that_is_none_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="holds no CLIP"):
        open_clip(tmp_path)
    broken = shutil.copytree(folder, tmp_path / "clip")
    (broken / "merges.txt").unlink()
    with pytest.raises(UserError, match=f"{broken}: holds no tokens"):
        open_clip(broken)
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["patch_size"] = 21
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="patches of 21; expected a CLIP with patches of 14 or 32"):
        open_clip(broken)


def test_copies_are_found():
    rng = np.random.default_rng(0)
    training, held_out, samples = (rng.normal(size=(n, 4)).astype(np.float32) for n in (60, 20, 10))
    samples[[3, 7]] = training[[20, 5]]
    samples[7] += 1e-4
    plain = extractor(4)
    known = Known(reference(held_out), reference(training))
    seen = Seen(Features(samples, None), None)
    scores, suspects = judge(Judges(plain), known, seen, (), count=2, seed=0)
    assert [pair[:2] for pair in suspects] == [(3, 20), (7, 5)]
    assert scores["memorised"].value >= 0.2
    distances = np.linalg.norm(samples[:, None].astype(float) - training, axis=-1)
    ordered = np.sort(distances, axis=1)
    assert scores["memorised"].value == np.mean(ordered[:, 0] < ordered[:, 1] / 3.0)
    expected = np.mean(ordered[:, 0] / ordered[:, 1:50].mean(axis=1))
    assert scores["nearest ratio"].value == pytest.approx(expected, rel=1e-6)
    # Held-out pictures are the control; training pictures are none, and statistics alone tell nothing.
    real = judge_real(Judges(plain), known, (), seed=0)
    assert real["nearest ratio"].value > scores["nearest ratio"].value
    assert judge_real(Judges(plain), Known(known.training, known.training), (), seed=0) == {}
    bare = known.reference._replace(features=None)
    assert set(judge(Judges(plain), Known(bare), seen, (), count=2, seed=0)[0]) == {"FD-Plain"}


def test_variety_is_of_the_samples_of_a_prompt():
    images = random_pictures(6, 4, 4)
    features = np.array([[1, 0], [0, 1], [2, 0], [0, 3], [0, 1], [0, 1]], np.float32)
    seen = Seen(Features(features, None), None)

    trusted = Judges(lpips=PairDistance("LPIPS (alex)", difference, {}))
    prompts, numbers = [0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2]
    found = variety(trusted, seen, [images[:4], images[4:]], prompts, numbers)
    # Prompt 0 has (1, 0), (1, 0), (0, 1), two of whose three pairs are at right angles; 1 has equal ones.
    assert found["diversity"].value == pytest.approx(1.0 / 3.0)
    x = images.astype(float)
    pairs = [[(0, 2), (0, 4), (2, 4)], [(1, 3), (1, 5), (3, 5)]]
    expected = np.mean([np.mean([np.abs(x[i] - x[j]).mean() for i, j in group]) for group in pairs])
    assert found["diversity, LPIPS (alex)"].value == pytest.approx(expected, rel=1e-5)
    assert variety(trusted, seen, [images], range(6), [0] * 6) == {}


@pytest.mark.slow
def test_all_are_asked_in_the_mode(run, own, folder, monkeypatch):
    lpips = PairDistance("LPIPS (alex)", difference, {})
    monkeypatch.setattr(judges, "open_lpips", lambda name, folder, mesh: lpips)
    monkeypatch.setattr(measures, "open_extractor", lambda name, folder, mesh: extractor(12))
    status, text, _ = run(
        "--mode=evaluate",
        "--config.evaluate.splits=('train', 'heldout_concepts')",
        "--config.evaluate.num_images=18",  # two more than there are captions in training
        "--config.evaluate.num_restored=2",
        "--config.evaluate.baselines=False",
        "--config.evaluate.held_out.num_images=3",
        "--config.evaluate.held_out.bits=True",
        "--config.evaluate.lpips=somewhere",
        f"--config.evaluate.clip={folder}",
    )
    assert status == 0, text
    with (own / "evaluation" / "results.csv").open() as file:
        found = {(row["split"], row["name"]): row for row in csv.DictReader(file)}

    def known(split, name):
        return {key for key, value in found[split, name].items() if value and not key.endswith(" error")}

    of_clip, copied = {"CLIP score", "MMD-CLIP-L/14@42"}, {"memorised", "nearest ratio"}
    assert of_clip | copied | {"FD-Plain"} <= known("train", "as configured") & known(
        "heldout_concepts", "as configured"
    )
    diverse = {"diversity", "diversity, LPIPS (alex)"}
    assert diverse <= known("train", "as configured")
    assert not diverse & known("heldout_concepts", "as configured")
    assert "LPIPS (alex)" in known("train", "real low-res, restored")
    # The control, which there is of pictures alone that were not trained on.
    assert copied | {"CLIP score", "R-precision"} <= known("heldout_concepts", "real pictures")
    assert not copied & known("train", "real pictures")
    for split in ("train", "heldout_concepts"):
        assert (own / f"memorisation-{split}.png").is_file()
        for stage in ("base", "super_resolution"):
            row = found[split, f"real pictures, {stage}"]
            errors = [float(row[f"error at log-SNR {level}"]) for level in (-8, -4, 0, 4, 8)]
            assert errors[0] > errors[-1] > 0.0
            assert float(row["bits per dimension"]) > 0.0
            assert row["images"] == "3"
    assert "Nearest training pictures, heldout_concepts" in (own / "report.html").read_text()
