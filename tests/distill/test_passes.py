"""The teacher's features from a store: the same in every case, or computed anew."""

from pathlib import Path

import pytest
import torch
import toys
from forked import SERVER

from dfd import FrozenTeacher, UserError
from dfd.distill import passes
from dfd.weights.feature_store import FeatureStore


def teacher_of(tmp_path, seed=1, precision="fp32", model=None, **settings):
    return FrozenTeacher(
        model=model or toys.build(seed=seed),
        allow_random=True,
        precision=precision,
        store=str(tmp_path / "store"),
        **settings,
    )


@pytest.fixture
def computed(monkeypatch):
    """How many images the teacher computed, the fixed one of each network included."""
    count = []
    run = FrozenTeacher._run

    def counted(self, images, **what):
        count.append(len(images))
        return run(self, images, **what)

    monkeypatch.setattr(FrozenTeacher, "_run", counted)
    return count


BATCH = toys.make_batch(sizes=((64, 96), (80, 64)))


def assert_same(found, expected, within=0.0):
    """Within so much of the largest feature: a batch of one rounds otherwise than one of two."""
    assert set(found) == set(expected)
    for name, feature in expected.items():
        gap = (found[name].float() - feature.float()).abs().max()
        assert gap <= within * feature.abs().max(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_seen_before_is_not_computed_again(tmp_path, computed, precision):
    plain = FrozenTeacher(model=toys.build(seed=1), allow_random=True, precision=precision)
    expected = plain(BATCH, input_format="BGR")
    computed.clear()
    teacher = teacher_of(tmp_path, precision=precision)
    first = teacher(BATCH, input_format="BGR")
    assert sum(computed) == 3
    assert_same(first, expected, within=1e-5 if precision == "fp32" else 0.02)
    assert all(x.dtype == expected[name].dtype for name, x in first.items())
    # In another batch order, and by another teacher of the same weights: bit for bit.
    other = teacher_of(tmp_path, precision=precision)
    found = other(BATCH[::-1], input_format="BGR")
    assert sum(computed) == 4  # Its fixed image.
    assert_same(found, {name: x.flip(0) for name, x in first.items()})


def one_pixel(batch):
    image = batch[0]["image"].clone()
    image[1, 5, 7] += 1
    return [{**batch[0], "image": image}, *batch[1:]]


def mirrored(batch):
    return [{**batch[0], "image": batch[0]["image"].flip(-1)}, *batch[1:]]


def taller(batch):
    """The same image, padded to another size in its batch."""
    return [batch[0], toys.make_batch(sizes=((160, 64),))[0]]


@pytest.mark.parametrize(("change", "anew"), [(one_pixel, 1), (mirrored, 1), (taller, 3)])
def test_whatever_is_changed_is_computed(tmp_path, computed, change, anew):
    teacher = teacher_of(tmp_path)
    teacher(BATCH, input_format="BGR")
    computed.clear()
    changed = change(BATCH)
    found = teacher(changed, input_format="BGR")
    assert sum(computed) == anew
    plain = FrozenTeacher(model=toys.build(seed=1), allow_random=True, precision="fp32")
    assert_same(found, plain(changed, input_format="BGR"), within=1e-5)


def slightly_other():
    model = toys.build(seed=1)
    with torch.no_grad():
        model.backbone.fpn_output2.bias[0] += 1e-6
    return model


def other_mean():
    model = toys.build(seed=1)
    model.pixel_mean += 1
    return model


def other_on_larger_images():
    """As another size of windows is, which images of one window do not show.

    By a hook, which the teacher's folded copy has too: with another ``forward`` it would compute by
    the original, and round otherwise whatever the size.
    """
    model = toys.build(seed=1)
    model.backbone.register_forward_hook(
        lambda module, args, features: {
            name: feature * (1 + (args[0].shape[-1] > 64)) for name, feature in features.items()
        }
    )
    return model


@pytest.mark.parametrize(
    ("settings", "order", "what"),
    [
        ({"model": slightly_other}, "BGR", {}),
        ({"model": other_on_larger_images}, "BGR", {}),
        ({"model": other_mean}, "BGR", {}),
        ({"seed": 2}, "BGR", {}),
        ({"precision": "bf16"}, "BGR", {}),
        ({}, "RGB", {}),
        ({}, "BGR", {"trunk": True}),
    ],
)
def test_another_network_finds_nothing(tmp_path, computed, settings, order, what):
    teacher_of(tmp_path)(BATCH, input_format="BGR")
    computed.clear()
    if "model" in settings:
        settings = {"model": settings["model"]()}
    found = teacher_of(tmp_path, **settings)(BATCH, input_format=order, **what)
    assert sum(computed) == 3
    if what:
        assert "res4" in found


def test_entries_that_are_damaged_or_gone_are_computed(tmp_path, computed):
    teacher = teacher_of(tmp_path)
    expected = teacher(BATCH, input_format="BGR")
    first, second = sorted((tmp_path / "store").glob("??/*"))
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    computed.clear()
    assert_same(teacher(BATCH, input_format="BGR"), expected)
    assert sum(computed) == 2
    assert_same(teacher(BATCH, input_format="BGR"), expected)
    assert sum(computed) == 2


def test_a_disk_that_fails_costs_the_store_alone(tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dfd.weights.feature_store.os.replace", full)
    teacher = teacher_of(tmp_path)
    teacher(BATCH, input_format="BGR")
    teacher(BATCH, input_format="BGR")
    assert caplog.text.count("No space left on device") == 1
    assert not [p for p in (tmp_path / "store").rglob("*") if p.is_file()]


def size(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_the_folder_stays_within_its_limit_and_keeps_what_is_used(tmp_path):
    limit = 64 * 1024
    store = FeatureStore(str(tmp_path), limit / 2**30)
    entry = {"p3": torch.zeros(1000)}  # 4 kB
    keys = [f"{n:02x}{'0' * 62}" for n in range(60)]
    store.put(keys[0], entry)
    for key in keys[1:]:
        store.put(key, entry)
        assert store.get(keys[0]) is not None  # It is used all the time.
        assert size(tmp_path) <= limit
    assert size(tmp_path) > limit / 2 and store.get(keys[-1]) is not None
    assert store.get(keys[1]) is None
    store.put("ff" + "0" * 62, {"p3": torch.zeros(100000)})  # Larger than all of it.
    assert store.get("ff" + "0" * 62) is None and store.get(keys[-1]) is not None


def _write(folder, number):
    store = FeatureStore(folder, 1.0)
    for n in range(40):
        key = f"{n % 8:02x}{'0' * 62}"
        found = store.get(key)
        assert found is None or torch.equal(found["p3"], torch.full((5000,), float(n % 8)))
        store.put(key, {"p3": torch.full((5000,), float(n % 8))})


@pytest.mark.slow
def test_processes_share_it(tmp_path):
    processes = [SERVER.Process(target=_write, args=(str(tmp_path), n)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    assert len([p for p in Path(tmp_path).rglob("*") if p.is_file()]) == 8


def test_a_store_that_finds_nothing_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(passes, "_TELL_AFTER", 4)
    teacher = teacher_of(tmp_path)
    for seed in range(4):
        teacher(toys.make_batch(seed=seed), input_format="BGR")
    assert caplog.text.count("0 of 4 images were found. Images that are resized") == 1


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(tmp_path, gib):
    with pytest.raises(UserError, match="store_gib"):
        teacher_of(tmp_path, store_gib=gib)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(UserError, match="model.teacher.store: .*choose another"):
        teacher_of(tmp_path)


def test_a_store_takes_nothing_else_for_its_own(tmp_path):
    others = [tmp_path / "s0" / "model_final.pth", tmp_path / "ab" / "notes.safetensors"]
    for path in others:
        path.parent.mkdir()
        path.write_bytes(b"x" * 60_000)
    store = FeatureStore(str(tmp_path), 64 / 2**20)
    for n in range(60):
        store.put(f"{n:02x}{'0' * 62}", {"p3": torch.zeros(1000)})
    assert all(path.stat().st_size == 60_000 for path in others)
    assert 32_000 < size(tmp_path) - 120_000 <= 64 * 1024


def test_a_store_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    key = "ab" * 32
    FeatureStore(str(tmp_path), 1.0).put(key, {"p3": torch.ones(3)})

    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("dfd.weights.feature_store.os.utime", refused)
    assert torch.equal(FeatureStore(str(tmp_path), 1.0).get(key)["p3"], torch.ones(3))
