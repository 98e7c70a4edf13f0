"""What a user gets wrong: one line that names it, exit code 1, nothing overwritten."""

import json
from types import SimpleNamespace

import pytest
import torch
from coco_files import write_coco
from commands import run
from detectron2.config import instantiate
from toys import faster_rcnn_config

from dfd.engine.checks import check_output_dir


@pytest.fixture(scope="module")
def given(tmp_path_factory, data):
    """Overrides to build bad runs from: good data, a good teacher, and other data."""
    folder = tmp_path_factory.mktemp("given")
    path = folder / "teacher.pth"
    torch.manual_seed(1)
    model = instantiate(faster_rcnn_config(channels=12))
    torch.save({"model": model.state_dict(), "class_names": ["disc", "box", "bar"]}, path)
    empty = folder / "empty.json"
    empty.write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )

    def dataset(name, classes, splits=("train", "test")):
        return [
            f"dataloader.{split}.{override}"
            for split in splits
            for override in write_coco(folder, f"{name}_{split}", 4, classes=classes)
        ]

    return SimpleNamespace(
        data=data,
        teacher=f"model.teacher.checkpoint={path}",
        good=[*data, f"model.teacher.checkpoint={path}"],
        empty=f"dataloader.train.dataset.json={empty}",
        five=dataset("five", list("abcde")),
        renamed=dataset("renamed", ["disc", "bar", "box"]),
        five_test=dataset("five_only", list("abcde"), splits=("test",)),
    )


def fail(capsys, config, *arguments):
    """(exit code, the lines on stderr) of a run that must fail."""
    with pytest.raises(SystemExit) as stop:
        run(config, *arguments)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(arguments, named, id=name)
        for name, arguments, named in [
            (
                "no such json",
                lambda g: [*g.good, "dataloader.train.dataset.json=absent.json"],
                "absent.json",
            ),
            (
                "no data given",
                lambda g: [g.teacher],
                "json is empty: set dataloader.train.dataset.json",
            ),
            ("empty dataset", lambda g: [*g.good, g.empty], "empty.json"),
            (
                "no such teacher",
                lambda g: [*g.data, "model.teacher.checkpoint=absent.pth"],
                "model.teacher.checkpoint: no such file: absent.pth",
            ),
            (
                "config without a teacher checkpoint",
                lambda g: g.data,
                "model.teacher.checkpoint is empty",
            ),
            (
                "teacher of another number of classes",
                lambda g: [
                    *g.five,
                    "model.teacher.model.roi_heads.num_classes=3",
                    g.teacher,
                ],
                "the teacher has 3 classes, the data 5",
            ),
            (
                "teacher of other class names",
                lambda g: [*g.renamed, g.teacher],
                "the teacher's classes are ['disc', 'box', 'bar'], the data's",
            ),
            (
                "test data of other classes",
                lambda g: [*g.good, *g.five_test],
                "the training data's classes are",
            ),
            (
                "student of another number of classes",
                lambda g: [*g.good, "model.student.roi_heads.num_classes=7"],
                "the student has 7 classes, the data 3",
            ),
            (
                "no such level",
                lambda g: [*g.good, "model.head.levels=[p9]"],
                "model.head.levels asks for ['p9']",
            ),
            (
                "pyramids that share no stride",
                lambda g: [
                    *g.good,
                    "model.student.backbone.in_features=[res5]",
                    "model.teacher.model.backbone.in_features=[res2,res3]",
                    "model.teacher.model.backbone.top_block=null",
                    "model.teacher.checkpoint=''",
                    "model.teacher.allow_random=True",
                ],
                "share no stride",
            ),
            (
                "image larger than a square padding",
                lambda g: [*g.good, "model.student.backbone.square_pad=64"],
                "is larger than the square of 64 that the student's backbone pads to",
            ),
            (
                "non-finite loss",
                lambda g: [*g.good, "model.head.weight=1e39"],
                "loss_dfd_p2 (distillation, level p2) is inf at iteration 0",
            ),
            (
                "misspelt override",
                lambda g: [*g.good, "train.maxiter=1"],
                "train has no 'maxiter'",
            ),
            (
                "no such initial checkpoint",
                lambda g: [*g.good, "train.init_checkpoint=absent.pth"],
                "train.init_checkpoint: no such file: absent.pth",
            ),
            (
                "loader in another channel order than the student",
                lambda g: [*g.good, "dataloader.train.mapper.image_format=RGB"],
                "image_format is RGB, but the student takes BGR",
            ),
            (
                "fp16 on the cpu",
                lambda g: [*g.good, "train.amp.enabled=True", "train.amp.dtype=fp16"],
                "needs CUDA",
            ),
            (
                "damaged initial checkpoint",
                lambda g: [*g.good, f"train.init_checkpoint={g.empty.partition('=')[2]}"],
                "is not a readable weight file",
            ),
            (
                "initial checkpoint of another width",
                lambda g: [
                    *g.good,
                    g.teacher.replace("model.teacher.checkpoint", "train.init_checkpoint"),
                    "model.student.backbone.bottom_up.stem.out_channels=6",
                    "model.student.backbone.bottom_up.stages.0.in_channels=6",
                    "model.student.backbone.bottom_up.stages.0.out_channels=6",
                    "model.student.backbone.bottom_up.stages.1.in_channels=6",
                    "model.student.backbone.bottom_up.stages.1.out_channels=12",
                    "model.student.backbone.bottom_up.stages.2.in_channels=12",
                    "model.student.backbone.bottom_up.stages.2.out_channels=24",
                    "model.student.backbone.bottom_up.stages.3.in_channels=24",
                    "model.student.backbone.bottom_up.stages.3.out_channels=48",
                ],
                "weights of the student's backbone",
            ),
            (
                "test loader in another channel order than the student",
                lambda g: [*g.good, "dataloader.test.mapper.image_format=RGB"],
                "dataloader.test.mapper.image_format is RGB, but the student takes BGR",
            ),
            (
                "evaluation of an image larger than a square padding",
                lambda g: [
                    "--eval-only",
                    *g.data,
                    g.teacher.replace("model.teacher.checkpoint", "train.init_checkpoint"),
                    "model.student.backbone.out_channels=12",
                    "model.student.proposal_generator.head.in_channels=12",
                    "model.student.roi_heads.box_head.input_shape.channels=12",
                    "model.student.backbone.square_pad=64",
                ],
                "is larger than the square of 64",
            ),
            (
                "unknown part to inherit",
                lambda g: [*g.good, "model.inherit=[neck]"],
                "model.inherit names 'neck'",
            ),
            (
                "evaluation without weights",
                lambda g: ["--eval-only", *g.good],
                "--eval-only needs train.init_checkpoint",
            ),
            (
                "evaluation of another model's weights",
                lambda g: [
                    "--eval-only",
                    *g.good,
                    g.teacher.replace("model.teacher.checkpoint", "train.init_checkpoint"),
                ],
                "does not fit the model",
            ),
        ]
    ],
)
def test_one_line_and_exit_code_1(given, configs, capsys, tmp_path, arguments, named):
    arguments = arguments(given)
    flags = [a for a in arguments if a.startswith("--")]
    rest = [a for a in arguments if not a.startswith("--")]
    code, lines = fail(
        capsys, configs["dfd"], *flags, *rest, f"train.output_dir={tmp_path / 'out'}"
    )
    assert code == 1
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0] == lines[-1]
    assert named in errors[0]
    assert not list(tmp_path.glob("out/*.pth"))


def test_no_such_config_file(capsys):
    code, lines = fail(capsys, "configs/absent.py")
    assert (code, lines) == (1, ["error: --config-file: no such file: configs/absent.py"])


@pytest.mark.parametrize("left", ["model_0000999.pth", "metrics.json"])
def test_output_folder_of_another_run_is_not_touched(given, configs, capsys, tmp_path, left):
    (tmp_path / left).write_text("precious")
    before = content(tmp_path)
    code, lines = fail(capsys, configs["dfd"], *given.good, f"train.output_dir={tmp_path}")
    assert code == 1
    assert lines[-1].startswith(f"error: train.output_dir {tmp_path} already holds a run ({left})")
    assert content(tmp_path) == before


def test_error_in_a_loader_worker_is_still_one_line(given, configs, capsys, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        (images / f"{i}.png").write_bytes(b"no image")
    code, lines = fail(
        capsys,
        configs["dfd"],
        *given.good,
        f"dataloader.train.dataset.images={images}",
        "dataloader.train.num_workers=1",
        f"train.output_dir={tmp_path / 'out'}",
    )
    assert code == 1
    assert lines[-1].startswith("error: cannot load image ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        # Alone in its batch, Detectron2 would crop the image without a word.
        (
            ["model.backbone.square_pad=64", "dataloader.train.total_batch_size=1"],
            "is larger than the square of 64",
        ),
        (["dataloader.train.mapper.image_format=RGB"], "the student takes BGR"),
        (["optimizer.params.model_part=backbone"], "not exactly once (proposal_generator"),
    ],
)
def test_plain_run_is_guarded_like_a_distilled_one(
    given, configs, capsys, tmp_path, arguments, named
):
    code, lines = fail(
        capsys, configs["partial"], *given.data, *arguments, f"train.output_dir={tmp_path / 'out'}"
    )
    assert code == 1
    assert named in lines[-1]


def test_failed_start_does_not_block_the_corrected_run(given, configs, capsys, tmp_path):
    out = f"train.output_dir={tmp_path}"
    fail(capsys, configs["dfd"], *given.good, out, "train.init_checkpoint=absent.pth")
    # Left by a run that was stopped before its first iteration.
    (tmp_path / "metrics.json").touch()
    check_output_dir(str(tmp_path))
    run(configs["dfd"], *given.good, out, "train.max_iter=1")


def test_mixed_precision_of_fcos_is_refused(given, configs, capsys, tmp_path):
    code, lines = fail(
        capsys,
        configs["fcos"],
        *given.data,
        "train.amp.enabled=True",
        f"train.output_dir={tmp_path / 'out'}",
    )
    assert code == 1
    assert "FCOS do not run in mixed precision" in lines[-1]
