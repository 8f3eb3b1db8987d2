"""More samples from a run's generator: a function of seed, class and number."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import mlo
from lfmcw_app.build_modules import make_generator
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.generators import GAMES
from lfmcw_app.recipe_loading import load_recipe, parsed_settings
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.sampling import draw_sheet, load_generator, measured_quality, save_images

NAMES = ("T-shirt/top", "cost $", "dog")


def searched(path, *settings, game="dcgan", stage="search", rounds=7):
    """A run folder with the checkpoint of a search that is still running."""
    options = (f"search.generator.name={game}", "search.generator.channels=4", *settings)
    recipe = load_recipe("smoke", overrides=parsed_settings(options))
    folder = RunFolder.create(path, recipe)
    torch.manual_seed(0)
    generator = make_generator(
        recipe.search.generator, num_classes=3, image_size=8, image_channels=3,
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    module = {f"generator.{key}": value for key, value in generator.state_dict().items()}
    module["discriminator.weight"] = torch.ones(1)
    state = {"round": rounds, "problems": {"gan": {"module": module}}}
    mlo.CheckpointStore(path, stage).save({"optimizer": state})
    described = {"class_names": NAMES, "image_size": 8, "channels": 3, "more": 1}
    folder.write("dataset.json", json.dumps(described))
    return path, generator


def lines_of(run, *measured):
    """Gives a run three rounds, with measures of variety in some: round → variety."""
    none = [None] * len(NAMES)
    by_class = dict.fromkeys(("gan_test", "gan_train", "real", "variety"), none)
    lines = []
    for number, variety in enumerate(measured, start=1):
        line = {"phase": "search", "round": number, "losses": {}, "metrics": {}}
        if variety is not None:
            quality = {"gan_test": 80.0, "gan_train": 40.0, "real": 90.0, "variety": variety}
            line["quality"] = {**quality, "by_class": by_class}
        lines.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))


def test_what_the_run_measured_of_its_generator_is_known(tmp_path):
    """Of the checkpoint's round at most: later measures are of other weights."""
    run, _ = searched(tmp_path / "run", rounds=2)
    trained = load_generator(run)
    assert measured_quality(run, trained) is None
    lines_of(run, 0.9, None, 0.02)
    number, quality, doubts = measured_quality(run, trained)
    assert (number, quality.variety, doubts) == (1, 0.9, [])
    lines_of(run, 0.9, 0.02)
    number, quality, doubts = measured_quality(run, trained)
    assert (number, quality.variety) == (2, 0.02)
    assert "are all alike" in doubts[0]


@pytest.mark.parametrize("game", GAMES)
def test_samples_depend_on_seed_class_and_number_alone(game, tmp_path):
    run, _ = searched(tmp_path / "run", game=game)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    trained = load_generator(run)
    assert (trained.class_names, trained.rounds, trained.stage) == (NAMES, 7, "search")
    many = trained.images(1, 70, seed=0)
    assert many.shape == (70, 3, 8, 8)
    assert many.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained.images(1, 5, seed=0), many[:5])
    assert torch.equal(load_generator(run).images(1, 5, seed=0), many[:5])
    others = (trained.images(1, 5, seed=1), trained.images(0, 5, seed=0), many[64:69])
    assert not any(torch.equal(other, many[:5]) for other in others)


def test_samples_are_the_generators_pixels(tmp_path):
    """In 0 to 255, with the average of the weights where the run's pictures have it."""
    run, generator = searched(tmp_path / "run", game="biggan")
    with torch.no_grad():
        for _ in range(2):
            generator.track()
    trained = load_generator(run)
    torch.manual_seed(0 * 3 + 2)
    shown = trained.generator.show(torch.full((64,), 2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    expected = ((shown * std + mean) * 255).clamp(0, 255)
    found = trained.images(2, 64, seed=0).float()
    assert float((found - expected).abs().max()) <= 0.51
    assert float(found.std()) > 1


def test_the_last_stage_with_a_checkpoint_counts(tmp_path):
    recipe = load_recipe("smoke", space="pdarts")
    run, _ = searched(tmp_path / "run", "search.space=pdarts", stage="search-2")
    assert recipe.search.space == "pdarts"
    assert load_generator(run).stage == "search-2"


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        (["search.method=darts"], None, "has no generator: its method is darts"),
        ([], "search.pt", "has no checkpoint: there is none yet"),
        ([], "config.yaml", "is not a run folder"),
        ([], "dataset.json", "cannot be used"),
    ],
)
def test_a_run_without_a_generator_says_why(settings, change, words, tmp_path):
    run, _ = searched(tmp_path / "run", *settings)
    if change is not None:
        (run / change).unlink()
    with pytest.raises(InputError, match=words):
        load_generator(run)


def test_a_search_with_real_images_has_no_generator(tmp_path):
    changes = {"dataset": "digits", "search.generator.name": "real"}
    run = RunFolder.create(tmp_path / "run", load_recipe("smoke", overrides=changes)).path
    with pytest.raises(InputError, match="name is real, so images of digits were drawn"):
        load_generator(run)


def test_an_evaluation_has_no_generator(trained):
    with pytest.raises(InputError, match="holds the evaluation of a given genotype"):
        load_generator(trained.path)


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"class_names": ["a", "b"], "image_size": 8, "channels": 3}, "does not fit"),
        ({"class_names": NAMES, "image_size": 16, "channels": 3}, "does not fit"),
        ({"class_names": NAMES, "image_size": 8, "channels": 1}, "does not fit"),
        ({"class_names": NAMES, "image_size": "8", "channels": 1}, "cannot be used"),
        ({"class_names": [], "image_size": 8, "channels": 1}, "cannot be used"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(described, words, tmp_path):
    run, _ = searched(tmp_path / "run")
    (run / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=words):
        load_generator(run)


def test_a_checkpoint_without_a_generator_is_refused(tmp_path):
    run, _ = searched(tmp_path / "run")
    for state in ({}, {"round": 1, "problems": {}}, {"round": 1, "problems": {"gan": 3}}):
        mlo.CheckpointStore(run, "search").save({"optimizer": state})
        with pytest.raises(InputError, match="it has no generator"):
            load_generator(run)


def test_an_unknown_class_is_answered_with_the_nearest(tmp_path):
    run, _ = searched(tmp_path / "run")
    with pytest.raises(InputError, match="Did you mean 'dog'"):
        load_generator(run).label("dgo")


# ------------------------------ files


def made(count):
    torch.manual_seed(0)
    return {name: torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8) for name in NAMES}


def test_files_are_a_folder_of_images(tmp_path):
    """One that can be searched on; each file has the image's pixels."""
    images = made(6)
    save_images(images, tmp_path / "made")
    dataset = load_dataset(f"folder:{tmp_path / 'made'}")
    assert dataset.class_names == ("T-shirt-top", "cost $", "dog")
    assert len(dataset.train) + len(dataset.test) == 18
    with Image.open(tmp_path / "made" / "dog" / "0005.png") as image:
        expected = images["dog"][5].movedim(0, -1).numpy().tobytes()
        assert image.tobytes() == expected
    with pytest.raises(InputError, match="nothing is overwritten"):
        save_images(images, tmp_path / "made")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_folder_of_files_is_complete_or_not_there(error, tmp_path, monkeypatch):
    """So the same command can be given again."""
    place, saved = tmp_path / "made", []
    save = Image.Image.save

    def ends(image, path):
        save(image, path)
        saved.append(path)
        if len(saved) == 8:
            raise error

    monkeypatch.setattr(Image.Image, "save", ends)
    with pytest.raises((KeyboardInterrupt, InputError)):
        save_images(made(6), place)
    assert len(saved) == 8
    assert list(tmp_path.iterdir()) == []
    save_images(made(6), place)
    assert len(list(place.rglob("*.png"))) == 18


@pytest.mark.parametrize("names", [("a/b", "a-b"), ("Cat", "cat"), ("\u00e9", "e\u0301")])
def test_classes_whose_folders_would_be_one_are_named(names, tmp_path):
    """The last two are one on some systems only; the images shall go to any."""
    images = {name: made(1)["dog"] for name in names}
    with pytest.raises(InputError, match=f"'{names[0]}' and '{names[1]}' would be one folder"):
        save_images(images, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_no_file_leaves_the_folder(name, tmp_path):
    with pytest.raises(InputError, match="cannot be the name of a folder"):
        save_images({name: made(1)["dog"]}, tmp_path / "made")
    save_images({"../../up": made(1)["dog"]}, tmp_path / "made-too")
    assert (tmp_path / "made-too" / "..-..-up" / "0000.png").exists()


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_sheet_has_room_for_every_image(count, tmp_path):
    sizes = []
    for images in (made(count), {"dog": made(count)["dog"]}):
        draw_sheet(images, tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.format == "PNG"
            sizes.append(sheet.size)
    assert sizes[0][1] > 1.8 * sizes[1][1] - 40
