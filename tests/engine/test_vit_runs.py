"""Whole runs of a ViT student from a weight file, under a CNN that sees larger images."""

import json

import pytest
import timm
import torch
from commands import run
from detectron2.config import LazyConfig
from toys import faster_rcnn_config, instantiate_seeded, save_checkpoint

from dfd.research.analyse import analyse
from dfd.weights.files import file_sha256

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(5)
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2)
    path = tmp_path_factory.mktemp("timm") / "vit.pth"
    torch.save(vit.state_dict(), path)
    return path


def test_run_from_data_to_analysis(configs, data, weights, tmp_path, capsys):
    detector = instantiate_seeded(faster_rcnn_config(channels=12))
    teacher = save_checkpoint(detector, tmp_path / "teacher.pth")
    out = tmp_path / "out"
    settings = [
        *data,
        f"model.teacher.checkpoint={teacher}",
        f"model.student.backbone.net.pretrained={weights}",
        f"train.output_dir={out}",
        "train.max_iter=2",
        "train.val_loss.period=1",
    ]
    run(configs["vit"], "--dry-run", *settings)
    printed = capsys.readouterr().out
    assert f"vit_tiny_patch16_224: {weights}" in printed
    run(configs["vit"], *settings)
    saved = LazyConfig.load(str(out / "config.yaml"))
    assert saved.model.student.pixel_mean == [127.5] * 3
    assert saved.dataloader.test.mapper.image_format == "RGB"
    assert saved.model.student.backbone.net.pretrained == str(weights)
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert "dfd/last_feat/disparity" in metrics[0] and "loss_dfd_p2" in metrics[0]
    assert list((out / "disparity").iterdir())

    began = {"path": str(weights), "sha256": file_sha256(weights)}
    assert json.loads((out / "summary.json").read_text())["pretrained"] == [began]

    # What replaces the weights needs their file no more.
    weights.unlink()
    run(configs["vit"], "--resume", *settings, "train.max_iter=3")
    assert json.loads((out / "summary.json").read_text())["pretrained"] == [began]
    kept = LazyConfig.load(str(out / "config.yaml")).model.student.backbone.net
    assert kept.pretrained == str(weights)
    final = f"train.init_checkpoint={out}/model_final.pth"
    run(configs["vit"], "--eval-only", *settings, final)
    run(configs["vit"], "--eval-teacher", *settings)
    analysis = tmp_path / "analysis"
    analyse(run=str(out), out=str(analysis), num_pictures=1, score=0.0)
    strides = json.loads((analysis / "analysis.json").read_text())["strides"]
    assert strides["last_feat"] == strides["p4"] == 16
