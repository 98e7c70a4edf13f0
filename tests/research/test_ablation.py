"""What an ablation compares and how: cells, seeds, statistics, tables, the page, the time left."""

import csv
import hashlib
import json
import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy import stats

from dfd.engine.config.grammar import override
from dfd.engine.config.load import ConfigFile
from dfd.errors import UserError
from dfd.research.ablate import find_cell, make_cells, parse_seeds, parse_slurm, plan_runs
from dfd.research.ablate.cells import Cell
from dfd.research.ablate.estimates import (
    DONE,
    FAILED,
    OPEN,
    CellResult,
    Estimate,
    Outcome,
    average_is_not_compared,
    check_metric,
    compare,
    details,
    different_conditions,
    no_difference,
    run_table,
    to_csv,
)
from dfd.research.ablate.folders import CellRun
from dfd.research.ablate.manifest import manifest
from dfd.research.ablate.progress import Progress, share_done
from dfd.research.ablate.tables import (
    detail_table,
    draw_results,
    explanation,
    render_page,
    result_table,
    to_markdown,
)
from dfd.research.ablate.without_effect import without_effect

CONFIG = "tests/engine/configs/dfd.py"
PKD = "model.head.criterion=${criteria.pkd} criteria.pkd.weight="
LENIENT = "model.head.criterion.lenient_on=[high,low]"


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0:5", [0, 1, 2, 3, 4]), ("0,3,7", [0, 3, 7]), ("5", [5]), ("0:2, 7", [0, 1, 7])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("variants", "named"),
    [
        (["own=", "twice=model.head.criterion.weight=2"], "own and twice"),
        (["a=model.head.weight=2", "b=model.head.weight=3", "c=model.head.levels=[p3]"], "a and b"),
        ([f"a={PKD}3", f"b={PKD}6"], "a and b"),
        ([f"a={PKD}3", f"b={PKD}3 criteria.pkd.sync_statistics=true"], None),
        (["plain=model.head.weight=0", "own="], None),
        (["a=model.head.weight=2", "b=model.head.gradient_share=0.5"], None),
        (["own=model.head.gradient_share=null", "b=model.head.weight=2"], None),
        (["own=model.head.levels=[p3]", "b=model.head.levels=[p4]"], None),
    ],
)
def test_weights_that_change_nothing_under_the_limit_are_told(variants, named):
    """Else two equal students would be compared, and their noise read."""
    found = without_effect(ConfigFile(CONFIG), make_cells(variants=variants))
    assert len(found) == (named is not None)
    assert not found or found[0].startswith(f"{named} differ in the weight of distillation alone")


@pytest.mark.parametrize(
    "value",
    ["high", "1", "null", "true", "a b", "it's", "a\\b", "[x]", "a=b", "a,b", "", "/p-1/q.pth", "é"]
    + ["${criteria.pkd}", 1, -1, 0.5, 1e-6, None, True, [1, "a b"], {"p3": 1.0, "x": ["a"]}, []],
)
def test_an_override_is_read_as_the_value_that_it_was_made_of(value):
    read = OverridesParser.create().parse_override(override("key", value)).value()
    assert read == value and type(read) is type(value)


def test_cells_are_the_product_of_variants_and_grids():
    cells = make_cells(
        variants=["plain=model.head.weight=0", "dfd="],
        grids=[LENIENT, "optimizer.lr=[0.1,1]"],
        overrides=["train.max_iter=3"],
    )
    assert len(cells) == 8
    assert cells[1].name == "plain, lenient_on=high, lr=1"
    assert cells[1].slug == "plain__lenient_on-high__lr-1"
    assert cells[1].columns == {
        "variant": "plain",
        "model.head.criterion.lenient_on": "high",
        "optimizer.lr": "1",
    }
    assert sorted(cells[1].overrides) == [
        "model.head.criterion.lenient_on=high",
        "model.head.weight=0",
        "optimizer.lr=1",
        "train.max_iter=3",
    ]
    assert cells[4].name == "dfd, lenient_on=high, lr=0.1"


def test_without_grids_and_variants_there_is_one_cell():
    assert [cell.name for cell in make_cells()] == ["all"]


def test_names_have_the_shortest_ends_of_keys_that_differ():
    grids = ["a.weight=[1]", "b.weight=[2]", "c.delta=[3]", "d.topk.0=[4]"]
    assert make_cells(grids=grids)[0].name == "a.weight=1, b.weight=2, delta=3, topk.0=4"
    assert make_cells(grids=["weight=[1]", "a.weight=[2]"])[0].name == "weight=1, a.weight=2"


@pytest.mark.parametrize(
    ("grid", "name", "slug"),
    [
        ("k=['${criteria.mimic}']", "k=criteria.mimic", "k-criteria.mimic"),
        ("k=[[p3,p4]]", "k=[p3,p4]", "k-p3-p4"),
        ("k=[null]", "k=null", "k-null"),
        ("k=['a/../b']", "k=a/../b", "k-a-..-b"),
        ("k=['..']", "k=..", "k-.."),
        ("k=[-1]", "k=-1", "k--1"),
    ],
)
def test_folders_have_names_that_are_safe(grid, name, slug):
    (cell,) = make_cells(grids=[grid])
    assert (cell.name, cell.slug) == (name, slug)


def test_a_folder_s_name_has_an_end():
    long = [Cell("x" * 300 + end, ()) for end in "ab"]
    assert all(len(cell.slug) < 200 for cell in long)
    assert long[0].slug != long[1].slug
    assert Cell("../..", ()).slug == "cell"


def test_a_part_of_the_config_is_set_before_what_is_changed_within_it():
    (cell,) = make_cells(grids=["a.b=[{c: 1}]"], variants=["x=a.b.c=2"])
    assert cell.overrides == ("a.b={c:1}", "a.b.c=2")


def test_slurm_parameters_go_by_submitit_s_names():
    text = "partition=gpu timeout_min=600 slurm_qos=low mem_gb=1.5"
    expected = {"slurm_partition": "gpu", "timeout_min": 600, "slurm_qos": "low", "mem_gb": 1.5}
    assert parse_slurm(text) == expected


def test_runs_go_seed_by_seed_each_with_its_whole_config(tmp_path):
    cells = make_cells(grids=[LENIENT])
    runs = plan_runs(config=ConfigFile(CONFIG), cells=cells, seeds=[0, 3], out=tmp_path)
    assert [(run.cell.name, run.seed) for run in runs] == [
        ("lenient_on=high", 0),
        ("lenient_on=low", 0),
        ("lenient_on=high", 3),
        ("lenient_on=low", 3),
    ]
    settings = runs[3].settings
    assert settings["train"]["seed"] == 3 and settings["train"]["output_dir"] == ""
    assert settings["model"]["head"]["criterion"]["lenient_on"] == "low"
    assert settings["dataloader"]["train"]["seed"] == 3  # Which refers to train.seed.
    assert settings["model"]["head"]["_target_"] == "dfd.distill.head.DFDHead"


def test_an_estimate_by_hand_and_by_scipy():
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert (estimate.n, estimate.mean, estimate.sd) == (3, 2.0, 1.0)
    assert estimate.half_width == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    ours, theirs = [31.2, 29.8, 30.9, 33.0], [30.1, 30.2, 29.5, 31.0]
    difference = Estimate.of([a - b for a, b in zip(ours, theirs, strict=True)])
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert difference.mean - difference.half_width == pytest.approx(low)
    assert difference.mean + difference.half_width == pytest.approx(high)
    assert Estimate.of([5.0]) == Estimate(1, 5.0, None)
    assert Estimate.of([5.0]).half_width is None
    assert Estimate.of([]) == Estimate(0, None, None)


CELLS = [Cell("a", (), {"k": "1"}), Cell("b|c", ("k=2",), {"k": "2"}), Cell("d", (), {"k": "3"})]


def outcomes(tmp_path):
    """Cell a over seeds 0 to 3; b|c lacks seed 1, which failed, and seed 2, not run; d has one."""

    def done(cell, seed, ap):
        scores = {"AP": ap, "AP50": 2 * ap, "AP75": math.nan, "AP-disc": 1.0}
        summary = {"results": {"bbox": scores}, "seconds_per_iteration": 0.1, "threads": 1}
        return Outcome(CellRun(cell, seed, tmp_path, {}), DONE, summary)

    a, b, d = CELLS
    return [
        *(done(a, seed, ap) for seed, ap in enumerate([10.0, 20.0, 30.0, 40.0])),
        done(b, 0, 11.0),
        Outcome(CellRun(b, 1, tmp_path, {}), FAILED, {}, "no, such file"),
        Outcome(CellRun(b, 2, tmp_path, {}), OPEN, {}),
        done(b, 3, 39.0),
        done(d, 2, 30.5),
    ]


def test_differences_are_of_the_seeds_that_both_cells_have(tmp_path):
    a, b, d = compare(outcomes(tmp_path), CELLS, baseline=CELLS[0], metric="AP")
    assert a.differences is None and a.scores["AP"].mean == 25.0
    assert b.differences == {0: 1.0, 3: -1.0} and b.wins == 1
    assert b.difference.half_width == pytest.approx(12.706205, abs=1e-5)  # sd sqrt(2), n 2
    assert d.differences == {2: 0.5} and d.wins == 1


def test_the_table_says_how_many_pairs_there_are(tmp_path):
    results = compare(outcomes(tmp_path), CELLS, baseline=CELLS[0], metric="AP")
    assert result_table(results, metric="AP") == [
        ["cell", "n", "AP mean ± sd", "AP50", "AP75", "difference to baseline ± 95 %"]
        + ["wins", "verdict"],
        ["a", "4", "25.00 ± 12.91", "50.00", "–", "baseline", "–", "–"],
        ["b|c", "2", "25.00 ± 19.80", "50.00", "–", "+0.00 ± 12.71", "1 of 2"]
        + ["not settled (visible from 16.33)"],
        ["d", "1", "30.50 ± –", "61.00", "–", "+0.50 ± –", "1 of 1", "–"],
    ]


def test_a_cell_that_changed_nothing_is_told(tmp_path):
    """Else an average of weights, say, which no table shows, would pass for measured."""
    runs = outcomes(tmp_path)
    runs[4].summary["results"]["bbox"]["AP"] = 10.0
    runs[7].summary["results"]["bbox"]["AP"] = 40.0
    results = compare(runs, CELLS, baseline=CELLS[0], metric="AP")
    (note,) = no_difference(results)
    assert note.startswith("the results of b|c are those of the baseline on every seed")
    assert result_table(results, metric="AP")[2][-1] == "not settled"
    assert draw_results(results, metric=r"AP-a$\foo$").startswith(b"\x89PNG")
    # Two students that find nothing differ in nothing either.
    nothing = CellResult(CELLS[1], {0: 0.0, 1: 0.0}, {}, {0: 0.0, 1: 0.0})
    assert not no_difference([nothing])


def test_another_metric_takes_the_first_place(tmp_path):
    results = compare(outcomes(tmp_path), CELLS, baseline=CELLS[2], metric="AP50")
    rows = result_table(results, metric="AP50")
    assert rows[0][2:5] == ["AP50 mean ± sd", "AP", "AP75"]
    assert rows[1][-3:] == ["-1.00 ± –", "0 of 1", "–"]
    assert rows[2][-3:] == ["–", "–", "–"]  # b|c has no seed that d has.
    with pytest.raises(UserError, match="--metric AP-bar: no run has it; they have AP, AP50, AP-d"):
        compare(outcomes(tmp_path), CELLS, baseline=CELLS[0], metric="AP-bar")


def test_every_run_is_a_row_of_the_csv(tmp_path):
    text = to_csv(run_table(outcomes(tmp_path)))
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 9
    assert list(rows[0])[:4] == ["cell", "seed", "status", "k"]
    assert rows[4]["AP"] == "11" and rows[4]["AP75"] == "" and rows[4]["AP-disc"] == "1"
    assert rows[5]["status"] == "failed" and rows[5]["error"] == "no, such file"
    assert rows[6]["status"] == "not run" and rows[6]["AP"] == ""


def test_runs_made_under_other_conditions_are_noted(tmp_path):
    runs = outcomes(tmp_path)
    assert different_conditions(runs) == []
    teacher = {"path": "t.pth", "sha256": "1"}
    runs[0].summary.update(threads=2, teacher=teacher)
    runs[1].summary.update(teacher=teacher | {"sha256": "2"})
    for i, outcome in enumerate(runs[:3]):
        code = {"sha256": "ab" if i else "cd", "commit": None if i else "123+changes"}
        outcome.summary.update(code=code)
    runs[0].summary.update(train_images=29)
    runs[1].summary.update(train_images=205)
    runs[4].run.settings["dataloader"] = {"train": {"dataset": "other"}}
    runs[4].summary.update(train_images=7, train_data="9")  # As its cell has other data.
    runs[0].summary.update(test_data="1")
    runs[1].summary.update(test_data="2")
    threads, images, labels, code, replaced = different_conditions(runs)
    assert labels == "the labels of the test data were changed between runs: AP do not compare"
    assert images == "the runs of a differ in their number of training images: 29, 205"
    # Of two cells, though each agrees with itself.
    runs[0].summary.update(train_images=205)
    runs[8].summary.update(train_images=206)
    assert "the runs of a, d differ in their number of training images: 205, 206" in (
        different_conditions(runs)
    )
    assert code == ("the runs differ in this project's code: 123+changes, no commit, sha256 ab")
    assert threads == "the runs differ in threads: 2, 1"
    assert "t.pth was replaced" in replaced


@pytest.mark.parametrize(
    ("facts", "note"),
    [
        ({"train_data": "1"}, "the training data were changed between runs: other images or"),
        (
            {"start": {"path": "init.pth", "sha256": "1"}},
            "train.init_checkpoint init.pth was replaced between runs: their hashes differ",
        ),
        (
            {"pretrained": [{"path": "lite0.pth", "sha256": "1"}]},
            "the trunk's weight file lite0.pth was replaced between runs: their hashes differ",
        ),
    ],
)
def test_what_all_cells_begin_with_may_not_change(tmp_path, facts, note):
    runs = outcomes(tmp_path)
    runs[0].summary.update(facts)
    runs[4].summary.update(facts)
    assert different_conditions(runs) == []
    ((key, value),) = facts.items()
    other = {str: "2", dict: {"path": "init.pth", "sha256": "2"}}
    other[list] = [{"path": "lite0.pth", "sha256": "2"}]
    runs[4].summary[key] = other[type(value)]
    (said,) = different_conditions(runs)
    assert said.startswith(note)


def test_averages_are_compared_where_they_are_asked_for(tmp_path):
    runs = outcomes(tmp_path)
    assert average_is_not_compared(runs, "AP") == []
    for outcome in runs[:5]:
        outcome.summary["results"]["ema"] = {"bbox": {"AP": outcome.scores["AP"] + 2}}
    (said,) = average_is_not_compared(runs, "AP")
    assert said.startswith("a, b|c kept an average of the student (train.ema)")
    assert average_is_not_compared(runs, "ema/AP") == []
    check_metric("ema/AP50")
    results = compare(runs, CELLS, baseline=CELLS[0], metric="ema/AP")
    assert results[1].differences == {0: 1.0}
    assert result_table(results, metric="ema/AP")[0][2] == "ema/AP mean ± sd"
    with pytest.raises(UserError, match="--metric ema/mAP: it must be AP"):
        check_metric("ema/mAP")


def test_one_file_is_another_teacher_at_another_size(tmp_path):
    runs = outcomes(tmp_path)
    for i, size, ap in ((4, 1, 35.0), (7, 1, 35.0), (8, 2, 50.0)):
        teacher = {"checkpoint": f"{i}.pth", "scale": size}
        runs[i].run.settings["model"] = {"teacher": teacher}
        runs[i].summary.update(teacher={"path": "t", "sha256": "1", "AP": ap})
    runs[4].summary["results"]["bbox"]["AP"] = 21.0  # b|c is 5 above a on seeds 0 and 3: 25, 30.
    found = details(runs, CELLS, baseline=CELLS[0], metric="AP")
    assert found["b|c"].recovered == pytest.approx(5 / 10)
    assert found["d"].recovered == pytest.approx(0.5 / 20)


def test_without_any_spread_nothing_is_settled():
    assert Estimate.of([0.5, 0.5]).p_value == 1.0


def test_details_are_ratios_of_the_same_seeds_and_shares_of_the_lead(tmp_path):
    runs = outcomes(tmp_path)
    a, b, d = CELLS
    for outcome in runs:
        outcome.summary.update(peak_memory_mib=100.0)
    runs[4].summary.update(seconds_per_iteration=0.3, peak_memory_mib=150.0)
    runs[4].summary["results"]["bbox"]["APs"] = 7.0
    found = details(runs, CELLS, baseline=a, metric="AP")
    assert found["a"].seconds == found["a"].memory == 1.0
    # Seeds 0 and 3: 0.3 / 0.1 and 1; 150 / 100 and 1.
    assert found["b|c"].seconds == pytest.approx(2.0) and found["b|c"].memory == 1.25
    assert found["b|c"].sizes == {"APs": 7.0, "APm": None, "APl": None}
    assert found["d"].recovered is None  # No run has measured a teacher.
    # One that has, speaks for all with that teacher: d has 30.5, a 30 with that seed, the teacher
    # 35; of a's other seeds nothing is known of d.
    runs[8].summary.update(teacher={"path": "t", "sha256": "1", "AP": 35.0})
    runs[4].summary.update(teacher={"path": "t", "sha256": "1"})
    runs[7].summary.update(teacher={"path": "t", "sha256": "2"})
    found = details(runs, CELLS, baseline=a, metric="AP")
    assert found["d"].recovered == pytest.approx(0.5 / 5) and found["b|c"].recovered == 0.0
    assert found["a"].recovered is None
    runs[8].summary["teacher"]["AP"] = 29.0  # It has no lead that could be made up.
    assert details(runs, CELLS, baseline=a, metric="AP")["d"].recovered is None
    rows = detail_table(found)
    assert rows[0] == ["cell", "APs", "APm", "APl", "teacher's lead recovered", "time", "memory"]
    assert rows[2] == ["b|c", "7.00", "–", "–", "0%", "2.00", "1.25"]
    assert rows[3] == ["d", "–", "–", "–", "10%", "1.00", "1.00"]


def test_manifest_has_what_each_number_was_made_of(tmp_path):
    runs = outcomes(tmp_path)
    code = {"sha256": "ab", "commit": "123"}
    runs[4].summary.update(code=code, teacher={"path": "t", "sha256": "1"})
    runs[4].run.folder.mkdir(parents=True)
    (runs[4].run.folder / "model_final.pth").write_bytes(b"weights")
    command = ["dfd", "ablate", "--out", "my folder"]
    told = json.loads(manifest(runs, CELLS, config_file="c.py", baseline="a", command=command))
    assert told["command"] == "dfd ablate --out 'my folder'" and told["baseline"] == "a"
    assert told["config_file"] == "c.py" and list(told["cells"]) == ["a", "b|c", "d"]
    done, failed, open_run, other = told["cells"]["b|c"]["runs"]
    assert told["cells"]["b|c"]["overrides"] == ["k=2"]
    assert done["seed"] == 0 and done["status"] == "done" and done["code"] == code
    assert done["results"]["bbox"]["AP"] == 11.0 and done["teacher"]["sha256"] == "1"
    assert done["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert failed == {"seed": 1, "status": "failed"}
    assert open_run == {"seed": 2, "status": "not run"}
    assert other["weights_sha256"] is None


def test_markdown_keeps_its_columns():
    text = to_markdown([["cell", "n"], ["b|c", "2"]], "Note.")
    assert text == "| cell | n |\n|---|---:|\n| b\\|c | 2 |\n\nNote.\n"


def test_the_page_has_all_of_it_and_needs_nothing_else(tmp_path):
    runs = outcomes(tmp_path)
    for outcome in runs[:6]:
        outcome.run.folder.mkdir(parents=True)
        lines = [{"iteration": i, "loss_cls": 1.0, "loss_dfd_p2": 0.5} for i in range(3)]
        text = "\n".join(map(json.dumps, lines)) + '\n{"iterat'
        (outcome.run.folder / "metrics.json").write_text(text)
        object.__setattr__(outcome.run, "settings", {"train": {}})
    results = compare(runs, CELLS, baseline=CELLS[0], metric="AP")
    page = render_page(
        title="<T>",
        rows=result_table(results, metric="AP"),
        notes=[explanation(baseline="a", metric="AP")],
        plot=b"plot",
        more=detail_table(details(runs, CELLS, baseline=CELLS[0], metric="AP")),
        outcomes=runs,
        overrides=[(cell.name, cell.overrides) for cell in CELLS],
    )
    plot, curves = 1, 2  # Curves of a and b|c; d logged nothing.
    assert page.count("<img ") == page.count('src="data:image/') == page.count("src=")
    assert page.count("<img ") == plot + curves
    assert "http" not in page and "<script" not in page
    assert "&lt;T&gt;" in page and "<td>+0.00 ± 12.71</td>" in page and "no, such file" in page
    assert "not corrected for the number of comparisons" in page


def test_time_left_is_by_the_pace_so_far(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(total=10, done=2)
    now[0] += 60
    assert progress.seconds_left(0.0) is None
    assert progress.seconds_left(0.5) == pytest.approx(60 * 7.5 / 0.5)
    progress.add(failed=False)
    progress.add(failed=True)  # Neither made nor left.
    assert progress.seconds_left(0.5) == pytest.approx(60 * 5.5 / 1.5)
    assert progress.text([]) == "3 of 10 runs done, 0 running, 1 failed, about 6 min 00 s left"
    run = CellRun(CELLS[0], 0, tmp_path, {})
    assert share_done(run) == 0.0
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("train: {max_iter: 8}")
    assert share_done(run) == 0.0
    (run.folder / "metrics.json").write_text('{"iteration": 1}\n{"iteration": 5}\n{"itera')
    assert share_done(run) == 0.75


def test_what_an_earlier_attempt_did_is_no_pace(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run = CellRun(CELLS[0], 0, tmp_path, {})
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("train: {max_iter: 8}")
    (run.folder / "metrics.json").write_text('{"iteration": 5}\n')
    progress = Progress(total=2, done=0)
    assert progress.text([run]).endswith("time left not known yet")
    now[0] += 60  # For an eighth of a run; an eighth of this one and all of another are left.
    (run.folder / "metrics.json").write_text('{"iteration": 6}\n')
    assert progress.text([run]).endswith("about 9 min 00 s left")


def test_the_baseline_is_the_first_cell_unless_named():
    assert find_cell(CELLS, None) is CELLS[0]
    assert find_cell(CELLS, "d") is CELLS[2]


@pytest.mark.parametrize(
    "key",
    ["test.dataset.num_images=2", "test.dataset.json=other.json", "test.dataset.subset_seed=3"]
    + ["evaluator.dataset=other"],
)
def test_cells_that_are_tested_on_other_data_are_refused(key, tmp_path):
    cells = make_cells(variants=["one=", f"two=dataloader.{key}"])
    where = key.partition(".dataset")[0]
    match = f"cell two would be tested on other data .*dataloader.{where}.dataset: .* is .*"
    with pytest.raises(UserError, match=match):
        plan_runs(config=ConfigFile(CONFIG), cells=cells, seeds=[0], out=tmp_path)
