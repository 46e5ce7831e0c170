"""Classifiers of pictures: any of transformers' models and timm's, rows in four forms, and what their exports are worth."""

import os
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import transformers
from PIL import Image

from cola_lightning import COLAImageClassifier, ImageDataModule, PredictionWriter, UserError
from cola_lightning.data.base import SeededBatches
from tests.helpers.tiny import CLASSES, IMAGE_MODELS, SIDE, draw, image_folder, picture, read_rows
from tests.helpers.toy import assert_bit_equal, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21, transformers 5.24

TARGETS = {"vit": "all-linear", "resnet": ["convolution"], "convnext": "all-linear"}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "convnext")]


def classifier(path, architecture="vit", **arguments):
    arguments = {"rank": 2, "alpha": 4, "seed": 0, "target_modules": TARGETS[architecture]} | arguments
    return COLAImageClassifier(image_folder(path / architecture, architecture), **arguments)


def data_of(source, **arguments):
    return ImageDataModule(str(source), **{"batch_size": 8, "val_size": 0.25, "random_flip": False} | arguments)


def class_of(data):
    """The class of each row in training and validation."""
    labels = [label for part in (data.train, data.val) if len(part) for label in part.with_format("numpy")["labels"][:]]
    return [data.label_names[label] for label in labels]


def set_up(data, *stages):
    data.image_processor = IMAGE_MODELS["vit"][1]()
    for stage in stages:
        data.setup(stage)
    return data


@pytest.mark.filterwarnings("ignore:Lightning couldn't infer the indices")
@pytest.mark.parametrize("architecture", ["vit", *SLOW])
def test_a_model_learns_with_its_new_head_and_resumes_to_the_bit_and_its_export_is_a_pipeline(tmp_path, architecture):
    data, names = data_of(draw(tmp_path / "rows"), random_crop=1), [*CLASSES, "back", "front"]

    def fit(ckpt_path=None, **options):
        optimizer = {"optimizer": lambda p: torch.optim.AdamW(p, lr=2e-2)}
        module = classifier(tmp_path, architecture, label_names=names, metric="f1", **optimizer)
        run = trainer(tmp_path, chain={"every_n_epochs": 1}, **{"max_epochs": 4} | options)
        run.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module, run

    (module, run), (_, part) = fit(), fit(max_steps=4)  # a step of the second epoch
    assert module.run.config.modules_to_save == ["classifier"]
    assert run.callback_metrics["val_f1"] > 0.5 or architecture != "vit"  # of six labels, two of which have no rows
    part.save_checkpoint(tmp_path / "part.ckpt")
    assert_bit_equal(weights(fit(tmp_path / "part.ckpt")[0].model), weights(module.model))
    line, *_ = module.export(tmp_path / "merged")
    assert "its logits differ from the module's" in line
    pipe = transformers.pipeline("image-classification", str(tmp_path / "merged"), device="cpu")
    picture_of_top = Image.open(tmp_path / "rows" / "top" / "0.png")
    scores = {found["label"]: found["score"] for found in pipe(picture_of_top, top_k=6)}
    batch = data.collate([{"image": picture_of_top, "labels": 3}])
    expected = module.eval().predict_step(batch, 0)["scores"].exp()[0].tolist()
    assert scores == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-5)


@pytest.mark.parametrize("architecture", ["convnext", pytest.param("vit", marks=pytest.mark.slow)])
def test_pefts_loader_reads_the_adapter_on_the_base_with_its_other_head(tmp_path, architecture):
    module = classifier(tmp_path, architecture)
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(module, datamodule=data_of(draw(tmp_path / "rows")))
    *_, code, line = module.export(tmp_path / "adapter", "peft")
    assert "loaded again with peft" in line
    base = eval(code.removeprefix("its base: "), {"transformers": transformers})
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=x).logits, module.eval().model(pixel_values=x).logits, atol=1e-5, rtol=0)


def test_timms_models_are_read_through_transformers_and_their_head_is_trained(tmp_path):
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "num_features": 32, "model_args": sizes}
    model = timm.create_model(config["architecture"], pretrained=False, num_classes=4, **sizes)
    config["pretrained_cfg"] = dict(model.pretrained_cfg) | {"input_size": [3, SIDE, SIDE], "num_classes": 4}
    wrapped = transformers.TimmWrapperConfig.from_dict(config, num_labels=4)
    transformers.AutoModelForImageClassification.from_config(wrapped).save_pretrained(tmp_path / "timm")
    rows = draw(tmp_path / "rows", 4)
    for names in (None, [*CLASSES, "other"]):  # as many as the head of the files, and more
        module = COLAImageClassifier(str(tmp_path / "timm"), rank=2, target_modules="all-linear", label_names=names, seed=0)
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=data_of(rows))
        assert module.run.config.modules_to_save == ["timm_model.head"]
        line, *_ = module.export(tmp_path / f"merged {names}")
        assert "its logits differ from the module's" in line
        pipe = transformers.pipeline("image-classification", str(tmp_path / f"merged {names}"), device="cpu")
        assert {found["label"] for found in pipe(picture("top", 0), top_k=5)} == set(names or CLASSES)


# ---------------------------------------------------------------------- rows


def listed(path, file="rows.csv", header="path,label", *, more=()):
    """The pictures in folders, and a file with a line for each, and for each of some more."""
    draw(path)
    lines = [f"{name}/{k}.png,{name}" for k in range(8) for name in CLASSES]
    (path / file).write_bytes("\n".join([header, *lines, *more, ""]).encode())
    return path / file


def as_metadata(path):
    """As Hugging Face's imagefolder has it."""
    return listed(path, "metadata.csv", "file_name,label").parent


def as_parquet(path):
    path.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = [{"image": picture(name, 4 * k + i), "label": name} for k in range(8) for i, name in enumerate(CLASSES)]
    datasets.Dataset.from_list(rows, features).to_parquet(path / "rows.parquet")
    return path / "rows.parquet"


def as_saved(path):
    datasets.load_dataset("parquet", data_files=str(as_parquet(path)))["train"].save_to_disk(path / "saved")
    return path / "saved"


def as_polars(path):
    """As polars and pandas with pyarrow's strings write it: the paths are large strings."""
    rows = pd.read_csv(listed(path))
    large = pa.schema([(name, pa.large_string()) for name in rows.columns])
    pq.write_table(pa.Table.from_pandas(rows, large), path / "rows.parquet")
    return path / "rows.parquet"


@pytest.mark.parametrize("form", [draw, listed, as_metadata, as_parquet, as_saved, as_polars])
def test_rows_in_each_form_are_the_same_pictures_and_labels_in_parts_with_the_same_share_of_each(tmp_path, form):
    data = set_up(data_of(form(tmp_path / "rows"), random_crop=1), "fit")
    assert data.label_names == CLASSES
    assert Counter(class_of(data)) == dict.fromkeys(CLASSES, 8)
    assert sorted(data.val.with_format("numpy")["labels"][:].tolist()) == sorted([0, 1, 2, 3] * 2)
    batches = [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
    found = torch.cat([batch["pixel_values"].flatten(1) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    for index, name in enumerate(CLASSES):
        pictures = [picture(name, 4 * k + index) for k in range(8)]
        expected = data.image_processor(pictures, return_tensors="pt")["pixel_values"].flatten(1)
        assert sorted(found[labels == index].sum(1).tolist()) == sorted(expected.sum(1).tolist())
    assert not data.can_be_tested
    assert data.identity


def test_unreadable_pictures_are_skipped_and_counted_and_their_replacement_is_seen(tmp_path, caplog):
    caplog.set_level("INFO")
    path = listed(tmp_path / "rows")
    broken, missing, cut = (path.parent / "top" / f"{k}.png" for k in range(3))
    whole = cut.read_bytes()
    broken.write_text("no picture")
    missing.unlink()
    cut.write_bytes(whole[: len(whole) // 2])
    data = set_up(data_of(path, max_skipped=0.2, val_size=0), "fit")
    assert len(data.train) == 29
    assert all(reason in caplog.text for reason in ("there is no such file", "the picture cannot be read"))
    with pytest.raises(UserError, match=r"3 of 32 rows cannot be used, more than data\.max_skipped 0\.05 allows"):
        set_up(data_of(path, val_size=0), "fit")
    cut.write_bytes(whole)  # the cache is not used for another file of the same name
    assert len(set_up(data_of(path, max_skipped=0.2, val_size=0), "fit").train) == 30


def pixels_of(folder):
    """The pixels, from 0 to 1, of each picture in a folder as it is trained on, by its name."""
    names = sorted(path.name for path in folder.iterdir())
    (folder / "rows.csv").write_text("path,label\n" + "".join(f"{name},a\n" for name in names))
    data = data_of(folder / "rows.csv", val_size=0, random_crop=1)
    data.label_names = ["a", "b"]
    data.image_processor = transformers.ViTImageProcessor(do_resize=False, do_normalize=False)
    data.setup("fit")
    pixels = (data.collate([data.augment(row, 0)])["pixel_values"][0] for row in data.train)
    return dict(zip(names, pixels, strict=True))


RAMP = np.linspace(0, 1, 64).reshape(8, 8)
STORED = {  # of a ramp from black to white
    "8 bits.png": (RAMP * 255).astype(np.uint8),
    "16 bits.png": (RAMP * 65535).astype(np.uint16),
    "12 bits in 16.tif": (RAMP * 4095).astype(np.uint16),
    "32 bits.tif": (RAMP * 10**6).astype(np.int32),
    "floats to 1.tif": RAMP.astype(np.float32),
    "floats below 0.tif": (RAMP * 100 - 50).astype(np.float32),
}


def test_a_picture_looks_the_same_at_any_depth(tmp_path):
    for name, pixels in STORED.items():
        Image.fromarray(pixels).save(tmp_path / name)
    expected = torch.tensor(RAMP, dtype=torch.float32).expand(3, 8, 8)
    for name, found in pixels_of(tmp_path).items():
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0, msg=name)


def test_a_picture_of_any_mode_is_trained_as_it_is_shown_and_the_right_way_up(tmp_path):
    """The upper half of the file is white, the lower one black, and its EXIF entry says that the right half is the top."""
    drawn = Image.new("RGB", (16, 16))
    drawn.paste((255, 255, 255), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    rotated = {"RGB.webp", "CMYK.jpg", "YCbCr.jpg", "CMYK.tif"}
    for name in ("1.png", "L.png", "P.png", "L.gif", *rotated):
        drawn.convert(name.partition(".")[0]).save(tmp_path / name, **({"exif": exif} if name in rotated else {}))
    for name, pixels in pixels_of(tmp_path).items():
        found = pixels.mean(0)
        white, black = (found[:, 8:], found[:, :8]) if name in rotated else (found[:8], found[8:])
        assert white.mean() > 0.97, name
        assert black.mean() < 0.03, name


def test_what_is_transparent_is_white(tmp_path):
    drawn = np.zeros((8, 8, 4), dtype=np.uint8)
    drawn[2:6, 2:6] = 200, 200, 200, 255  # a grey square on black that is transparent
    made = Image.fromarray(drawn)
    stored = {"RGBA.png": made, "LA.png": made.convert("LA"), "P.gif": made, "P.png": made.quantize(4)}
    for name, image in stored.items():
        image.save(tmp_path / name)  # a GIF has a palette anyway
    for name, found in pixels_of(tmp_path).items():
        assert found[:, 0, 0].tolist() == [1, 1, 1], name
        assert found[:, 3, 3].tolist() == pytest.approx([200 / 255] * 3, abs=0.02), name


def test_a_file_is_opened_as_a_picture_whatever_its_name_says(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was run"))
    draw(tmp_path / "rows")
    (tmp_path / "rows" / "top" / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    picture("top", 0).save(tmp_path / "rows" / "top" / "1.png", "BMP")
    data = set_up(data_of(tmp_path / "rows", val_size=0), "fit")
    assert len(data.train) == 31


@pytest.mark.parametrize("names", [["Train", "Test"], ["training", "TEST", "Val"]])
def test_the_folders_of_splits_are_found_in_any_case_and_are_no_classes(tmp_path, names):
    for name in names:
        draw(tmp_path / "rows" / name, 2)
    data = set_up(data_of(tmp_path / "rows"), "fit", "test")
    assert data.label_names == CLASSES
    assert len(data.train) + len(data.val) * (len(names) == 2) == 8
    assert len(data.test) == 8


def test_a_class_may_be_a_link_or_named_like_a_split_and_pictures_may_have_any_usual_ending(tmp_path):
    draw(tmp_path / "elsewhere")
    (tmp_path / "rows").mkdir()
    for name in CLASSES[:3]:
        (tmp_path / "rows" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "rows" / "Train").symlink_to(tmp_path / "elsewhere" / CLASSES[3])
    first = tmp_path / "elsewhere" / CLASSES[0]
    for k, (ending, kind) in enumerate([("jfif", "JPEG"), ("JPE", "JPEG"), ("avif", "AVIF"), ("jp2", "JPEG2000")]):
        picture("top", k).save(first / f"{k}.{ending}", kind)
    data = set_up(data_of(tmp_path / "rows", val_size=0), "fit")
    assert Counter(class_of(data)) == dict.fromkeys([*CLASSES[:3], "Train"], 8) | {CLASSES[0]: 12}
    (first / "9.heic").write_bytes(b"\0\0\0 ftypheic")  # which needs a package of its own
    assert set_up(data_of(tmp_path / "rows", val_size=0), "fit")._report.n_skipped == 1


@pytest.mark.parametrize("form", ["folder", "rows"])
def test_what_is_no_file_of_a_picture_is_one_row_that_is_skipped(tmp_path, form):
    if form == "rows":
        source = listed(tmp_path / "rows", more=["top/fifo.png,top", "top/gone.png,top", "top/a\0b.png,top"])
    else:
        source = draw(tmp_path / "rows")
        picture("top", 0).save(os.fsencode(source / "top") + b"/caf\xe9.png", "PNG")
    os.mkfifo(tmp_path / "rows" / "top" / "fifo.png")
    (tmp_path / "rows" / "top" / "gone.png").symlink_to(tmp_path / "nowhere")
    data = set_up(data_of(source, max_skipped=0.2, val_size=0), "fit")
    assert data._report.skipped.keys() == {"there is no such file"}
    assert (len(data.train), data._report.n_skipped) == (32, 3)
    assert data.identity


def test_a_crop_and_a_flip_depend_on_the_seed_the_epoch_and_the_row_alone(tmp_path):
    data = set_up(data_of(draw(tmp_path / "rows"), val_size=0, random_flip=True), "fit")

    def pixels(places, seed=0, epoch=0, augment=data.augment):
        batches = SeededBatches(data.train, data.collate, seed, augment)
        batches.epoch = epoch
        return batches.__getitems__(places)["pixel_values"]

    assert torch.equal(pixels([3, 5, 9])[1], pixels([5, 8])[0])
    assert not torch.equal(pixels([5]), pixels([5], seed=1))
    assert not torch.equal(pixels([5]), pixels([5], epoch=1))
    assert torch.equal(data.collate([data.train[k] for k in range(8)])["pixel_values"], pixels([*range(8)], augment=None))


def test_crops_and_flips_can_be_left_out_and_have_the_asked_size():
    black, marked = Image.new("RGB", (200, 200)), picture("left", 0)
    data = ImageDataModule("rows", random_crop=0.5, random_flip=False)
    shares = [np.prod(data.augment({"image": black}, seed)["image"].size) / 200**2 for seed in range(200)]
    assert 0.45 < min(shares) < 0.55 < 0.95 < max(shares) <= 1
    data.random_crop = 1
    assert data.augment({"image": marked}, 3)["image"].tobytes() == marked.tobytes()
    data.random_flip = True
    flipped = sum(data.augment({"image": marked}, seed)["image"].tobytes() != marked.tobytes() for seed in range(200))
    assert 70 < flipped < 130


def test_predict_writes_labels_and_scores_of_pictures_alone_and_why_one_has_none(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for k, name in enumerate(CLASSES):
        picture(name, k).save(alone / f"{k}.jpg")
    (alone / "9.jpg").write_text("no picture")
    module, run = classifier(tmp_path, label_names=CLASSES), trainer(tmp_path, PredictionWriter())
    run.predict(module, datamodule=data_of(alone), return_predictions=False)
    *lines, last = read_rows(tmp_path / "predictions.jsonl")
    assert [(line["image"], line["target"]) for line in lines] == [(str(alone / f"{k}.jpg"), None) for k in range(4)]
    assert all(line["prediction"] == CLASSES[int(np.argmax(line["scores"]))] for line in lines)
    assert last["prediction"] is None
    assert last["reason"].startswith("the picture cannot be read")
