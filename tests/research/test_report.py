"""dfd report: right numbers, a complete page, refusals of one line."""

import copy
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from coco_files import write_coco
from detectron2.config import LazyConfig
from matplotlib.axes import Axes
from omegaconf import OmegaConf
from toys import build

from dfd.engine.config.load import load_config
from dfd.engine.config.resolve import resolve_config
from dfd.errors import UserError
from dfd.research import command, format_text, load_runs, parse_runs
from dfd.research.compare import differences, gains, tables
from dfd.research.curves import loss_curves
from dfd.research.report import _short_names, render_page

AP = {"student": 20.25, "dfd": 31.5}


def write_run(folder, kind, data):
    """What train_net.py would leave behind of a toy run."""
    folder.mkdir()
    opts = [f"dataloader.{split}.{o}" for split, opts in data.items() for o in opts]
    cfg = resolve_config(load_config(f"tests/engine/configs/{kind}.py", opts))
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    torch.save({"model": build().state_dict()}, folder / "model_final.pth")
    lines = [
        {"iteration": i, "loss_cls": 2.0 - i, "loss_rpn_loc": 1.0, "total_loss": 9.0}
        for i in range(2)
    ]
    if kind == "dfd":
        lines = [line | {"loss_dfd_p2": 0.5, "loss_dfd_p3": 0.25} for line in lines]
        (folder / "disparity").mkdir()
        for iteration in (0, 1, 2):
            picture = np.full((40, 80, 3), iteration, np.uint8)
            cv2.imwrite(str(folder / "disparity" / f"{iteration:07d}.png"), picture)
    lines.append({"iteration": 2, "bbox/AP": AP[kind]})
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"AP": AP[kind], "AP50": 40.0, "AP75": float("nan"), "AP-disc": 7.0, "AP-bar": 8.5}
    summary = {
        "iterations": 4,
        "seconds_per_iteration": 0.1234,
        "peak_memory_mib": 512,
        "results": {"bbox": scores},
        "parameters": 1_234_567,
        "train_images": 8,
        "seed": 0,
        "device": "cpu",
        "processor": "A CPU",
        "threads": 1,
        "torch": "2.0",
        "detectron2": "0.6",
        "teacher": {"path": "t.pth", "sha256": "0123456789abcdef" * 4} if kind == "dfd" else None,
        "start": None,
        "pretrained": [{"path": "lite0.pth", "sha256": "fedcba9876543210" * 4}],
    }
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain and a distilled run of one recipe, by name."""
    root = tmp_path_factory.mktemp("report")
    data = {
        "train": write_coco(root, "train", 4),
        "test": write_coco(root, "val", 5, seed=1),
    }
    for kind in AP:
        write_run(root / kind, kind, data)
    return {kind: str(root / kind) for kind in AP}


def test_the_tables_hold_the_summaries_numbers(folders):
    runs = load_runs(folders)
    summary, classes = tables(runs)
    assert summary[1:] == [
        ["student", "20.2", "40.0", "–", "8", "1.23", "4", "0.123", "512"],
        ["dfd", "31.5", "40.0", "–", "8", "1.23", "4", "0.123", "512"],
    ]
    assert classes[1:] == [["disc", "7.0", "7.0"], ["bar", "8.5", "8.5"]]
    text = format_text(runs)
    assert "One run each" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_distilled_run_is_set_beside_its_plain_one_only_if_nothing_else_differs(folders):
    plain, distilled = load_runs(folders)
    assert ["20.2 without, 31.5 with" in text for text in gains([plain, distilled])] == [True]
    plain.cfg.optimizer.lr = 1.0
    assert gains([plain, distilled]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.accumulation_steps", 2),
        ("train.clip_grad_norm", 1.0),
        ("train.ema.decay", 0.9),
        ("train.early_stop.metric", "bbox/AP"),
        ("train.seed", 1),
        ("train.max_iter", 5),
        ("train.init_checkpoint", "x.pth"),
        ("train.amp.enabled", True),
        ("train.amp.dtype", "fp16"),
        ("train.device", "cuda"),
        ("train.cudnn_benchmark", True),
        ("train.a_setting_of_tomorrow", 1),
        ("optimizer.weight_decay", 0.5),
        ("optimizer.params.weight_decay_norm", 0.5),
        ("optimizer.params.lr_decay", 0.7),
        ("lr_multiplier.warmup_length", 0.5),
        ("dataloader.train.total_batch_size", 3),
        ("dataloader.train.seed", 7),
        ("dataloader.train.dataset.num_images", 3),
        ("dataloader.train.mapper.augmentations.0.max_size", 50),
        ("dataloader.test.mapper.augmentations.0.max_size", 50),
        ("model.proposal_generator.nms_thresh", 0.5),
    ],
)
def test_everything_that_decides_how_a_run_is_trained_counts(folders, key, value):
    plain, distilled = load_runs(folders)
    OmegaConf.update(plain.cfg, key, value, force_add=True)
    assert gains([plain, distilled]) == []
    assert [key.startswith(found) for found in differences(plain, distilled)].count(True) == 1


def test_an_average_has_a_row_of_its_own(folders):
    (plain,) = load_runs({"a": folders["student"]})
    plain.summary["results"]["ema"] = {"bbox": {"AP": 21.0}}
    _, student, average = tables([plain])[0]
    assert student[:2] == ["a", "20.2"] and average[:3] == ["a, its average (EMA)", "21.0", "–"]


def test_runs_tested_on_other_labels_are_not_compared(folders):
    plain, distilled = load_runs(folders)
    plain.summary["test_data"] = "1"  # The other is of a version that kept no hash.
    assert "20.2 without" in gains([plain, distilled])[0]
    distilled.summary["test_data"] = "2"
    (said,) = gains([plain, distilled])
    assert said.startswith('The labels of the test data were changed between "student" and "dfd"')
    assert len(gains([plain, distilled, plain, distilled])) == 1


def test_number_of_training_images_counts(folders):
    plain, distilled = load_runs(folders)
    plain.summary["train_images"] = 9
    assert gains([plain, distilled]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.output_dir", "x"),
        ("train.checkpointer.period", 3),
        ("train.wandb.project", "x"),
        ("train.log_period", 3),
        ("train.eval_period", 3),
        ("train.epochs", 3),
        ("train.val_loss.period", 3),
        ("train.best_checkpoint.metric", "bbox/AP"),
        ("train.disparity_images.period", 3),
        ("train.min_teacher_ap", 3),
        ("dataloader.train.num_workers", 3),
        ("dataloader.evaluator.output_dir", "x"),
        ("optimizer.params.head_lr_multiplier", 3),
        # What a run of another version leaves to its default, written out here.
        ("optimizer.amsgrad", False),
        ("train.clip_grad_norm", None),
    ],
)
def test_what_does_not_touch_the_training_does_not_count(folders, key, value):
    plain, distilled = load_runs(folders)
    OmegaConf.update(distilled.cfg, key, value, force_add=True)
    assert differences(plain, distilled) == []


def test_evaluation_counts_where_it_may_end_the_run(folders):
    plain, distilled = load_runs(folders)
    for run in (plain, distilled):
        run.cfg.train.early_stop.metric = "bbox/AP"
    assert differences(plain, distilled) == []
    plain.cfg.train.eval_period = 3
    assert differences(plain, distilled) == ["train.eval_period"]


def test_inherited_weights_are_named_beside_the_gain(folders):
    plain, distilled = load_runs(folders)
    distilled.cfg.model.inherit = ["fpn_output"]
    assert "and fpn_output initialised from the teacher's weights" in gains([plain, distilled])[0]


def test_start_and_distillation_are_told_apart(folders):
    plain, distilled = load_runs(folders)
    distilled.cfg.model.inherit = ["fpn_output"]
    start = copy.deepcopy(distilled)
    object.__setattr__(start, "name", "start")
    start.cfg.model.head.weight = 0
    runs = [plain, start, distilled]
    assert [text.partition(", all else")[0] for text in gains(runs)] == [
        '"start" is "student" with fpn_output initialised from the teacher\'s weights',
        '"dfd" is "student" with a teacher beside it in training and fpn_output initialised from '
        "the teacher's weights",
        '"dfd" is "start" with a teacher beside it in training, from the same start',
    ]
    # Another start, another teacher, or nothing inherited from the teacher.
    start.cfg.model.inherit = ["heads"]
    assert not any('is "start"' in text for text in gains(runs))
    start.cfg.model.inherit = ["fpn_output"]
    start.summary["teacher"]["sha256"] = "other"
    assert not any('is "start"' in text for text in gains(runs))
    start.cfg.model.inherit = []
    assert not any(text.startswith('"start"') for text in gains(runs))


def test_a_loss_on_the_heads_alone_is_distillation(folders):
    plain, distilled = load_runs(folders)
    heads = copy.deepcopy(distilled)
    object.__setattr__(heads, "name", "heads")
    heads.cfg.model.head.weight = 0
    OmegaConf.update(heads.cfg, "model.predictions", {"weight": 1.0}, force_add=True)
    assert [text.partition(", all else")[0] for text in gains([plain, heads, distilled])] == [
        '"heads" is "student" with a teacher beside it in training',
        '"dfd" is "student" with a teacher beside it in training',
    ]
    heads.cfg.model.predictions.weight = 0
    assert '"dfd" is "heads" with a teacher beside it' in "".join(gains([heads, distilled]))


def test_other_code_and_other_processes_are_not_all_else_equal(folders):
    plain, distilled = load_runs(folders)
    plain.summary.update(code={"sha256": "a" * 64, "commit": "123"}, processes=1)
    distilled.summary.update(code={"sha256": "a" * 64, "commit": "124"}, processes=1)
    assert ", all else equal: AP" in gains([plain, distilled])[0]
    distilled.summary.update(code={"sha256": "b" * 64, "commit": None}, processes=2)
    said = "all settings equal, but not the code and the number of processes: AP"
    assert said in gains([plain, distilled])[0]
    distilled.summary.update(plain.summary | {"torch": "9.9", "threads": 7})
    assert "but not the threads and torch: AP" in gains([plain, distilled])[0]
    distilled.summary.update(code={"sha256": "b" * 64, "commit": None}, processes=2)
    page = render_page(runs=[plain, distilled], title="", num_images=0)
    assert "processes 1" in page and "code 123" in page and "code bbbbbbbbbbbb" in page


def test_curves_of_any_name_are_drawn(folders):
    """A name that begins with _ is left out by matplotlib, and $ begins a formula."""
    names = ["_old", r"a$\foo$", *map(str, range(10))]
    runs = load_runs(dict.fromkeys(names, folders["student"]))
    drawn = []
    legend = Axes.legend
    with pytest.MonkeyPatch.context() as patch:
        # Drawn all the same: a formula that cannot be read raises only then.
        patch.setattr(Axes, "legend", lambda axes, **k: drawn.append(axes) or legend(axes, **k))
        assert loss_curves({run.name: run.metrics for run in runs}).startswith(b"\x89PNG")
    handles, labels = drawn[0].get_legend_handles_labels()
    assert len(labels) == len(names)
    assert len({(h.get_color(), h.get_linestyle()) for h in handles}) == len(names)


def test_the_page_is_complete_and_needs_nothing_else(folders):
    page = render_page(runs=load_runs(folders), title="<T> & co", num_images=2)
    curves, tiles, disparity = 1, 2 * 3, 2
    assert page.count("<img ") == curves + tiles + disparity
    # At the scale of the criterion, which the run's config need not name.
    assert "in units of the variance of each channel" in page
    assert page.count('src="data:image/') == page.count("src=")
    assert "http" not in page and "<script" not in page
    assert "&lt;T&gt; &amp; co" in page
    assert ">before training<" in page and "after 2 iterations" in page
    assert "after 1 iterations" not in page
    assert "device cpu; processor A CPU; threads 1; torch 2.0; detectron2 0.6" in page
    assert "begins with lite0.pth, sha256 fedcba987654<" in page
    assert "teacher t.pth, sha256 0123456789ab; begins with" in page
    assert "2 boxes" in page  # The ground truth of every image.


def test_more_images_than_there_are_shows_all_of_them(folders):
    page = render_page(runs=load_runs(folders)[:1], title="T", num_images=99)
    assert page.count("<h3>") == 5 + 1  # And a table of classes.


def test_what_a_criterion_calls_scale_may_be_anything(folders, monkeypatch):
    monkeypatch.setattr("dfd.research.report.instantiate", lambda _: SimpleNamespace(scale=2.0))
    page = render_page(runs=load_runs({"dfd": folders["dfd"]}), title="T", num_images=0)
    assert "own variance on that level" in page


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ({"_target_": "dfd.data.coco_json", "json": "/gone/val.json"}, "/gone/val.json"),
        ({"_target_": "dfd.data.voc_folder", "root": "/gone", "split": "test"}, "/gone test"),
        ({"names": ["coco_2017_val"]}, "coco_2017_val"),
        ("nowhere_registered", "nowhere_registered"),
        ({"_target_": "csv_boxes.csv_boxes", "file": "a.csv"}, "csv_boxes.csv_boxes"),
    ],
)
def test_without_pictures_a_page_needs_no_test_data(folders, dataset, named):
    runs = load_runs(folders)
    for run in runs:
        run.cfg.dataloader.test.dataset = dataset
    assert f"Test data: {named}<" in render_page(runs=runs, title="T", num_images=0)


def test_curves_show_what_was_logged(folders, monkeypatch):
    drawn = {}

    def plot(axes, x, y, label, **kwargs):
        drawn[label] = (x, y)

    monkeypatch.setattr("matplotlib.axes.Axes.plot", plot)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *args, **kwargs: None)
    loss_curves({run.name: run.metrics for run in load_runs(folders)})
    assert drawn["student"] == drawn["dfd"] == ([0, 1], [3.0, 2.0])
    assert drawn["dfd: p3"] == ([0, 1], [0.25, 0.25])


def broken(tmp_path, folders, change):
    """A copy of the plain run's folder with one thing changed."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["student"], copy)
    change(copy)
    return str(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "summary.json").unlink(), "summary.json: the run has not finished"),
        (lambda f: (f / "model_final.pth").unlink(), "has no model_final.pth"),
        (lambda f: (f / "metrics.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "summary.json").write_text('{"results": {}}'), "holds no box AP"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_run_that_is_not_complete_is_refused(tmp_path, folders, change, message):
    with pytest.raises(UserError, match=message) as error:
        load_runs({"a": folders["student"], "b": broken(tmp_path, folders, change)})
    assert "--run b" in str(error.value) and "\n" not in str(error.value)


def test_runs_of_different_test_data_are_refused(tmp_path, folders):
    def use_the_training_images(folder):
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("val.json", "train.json"))

    other = broken(tmp_path, folders, use_the_training_images)
    with pytest.raises(UserError, match="json is .*train.json, not .*val.json"):
        load_runs({"a": folders["student"], "b": other})


def test_weights_of_another_model_are_refused(tmp_path, folders):
    def take_others(folder):
        torch.save({"model": build("fcos").state_dict()}, folder / "model_final.pth")

    runs = load_runs({"a": broken(tmp_path, folders, take_others)})
    with pytest.raises(UserError, match="--run a: .* does not fit"):
        render_page(runs=runs, title="T", num_images=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["a"], "NAME=FOLDER"), (["=x"], "NAME=FOLDER"), (["a=x", "a=y"], "given before")],
)
def test_run_arguments_of_another_form_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_runs(arguments)


def test_report_fails_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--run", f"a={tmp_path / 'none'}", "--out", str(tmp_path / "r.html")])
    said = capsys.readouterr().err if stop.value.code == 1 else f"{stop.value}\n"
    assert said == f"error: --run a: no such folder: {tmp_path / 'none'}\n"
    assert not (tmp_path / "r.html").exists()


def test_images_of_one_name_are_told_apart():
    assert _short_names(["/a/x/1.png", "/a/x/2.png"]) == ["1.png", "2.png"]
    assert _short_names(["/a/x/1.png", "/b/y/1.png"]) == ["x/1.png", "y/1.png"]
    assert _short_names(["dfd-upright:///a/1.png", "/a/1.png", "/a/1.png"])[2] == "3: /a/1.png"
    assert _short_names([]) == []
