"""Reading weight files: everything that a good one holds, and nothing that runs code."""

import collections
import json
import pickle

import evil
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toys import build

from dfd import FrozenTeacher, UserError
from dfd.weights import files
from dfd.weights.files import ForeignContentError, read_file
from dfd.weights.strict import read_weights

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones((2, 2), np.float16),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">i4"),
    "bool": np.array([True, False]),
    "scalar": np.float64(2.5),
    "no dimension": np.array(7),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_and_plain_containers_are_read_as_they_are(tmp_path, protocol):
    arrays = {k: v for k, v in ARRAYS.items() if protocol > 2 or k != "empty"}
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "names": ["a", ("b", 1.5, None)]}, protocol))
    content = read_file(str(path))
    assert content["names"] == ["a", ("b", 1.5, None)]
    for key, expected in arrays.items():
        assert content["model"][key].dtype == expected.dtype.newbyteorder("="), key
        np.testing.assert_array_equal(content["model"][key], expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_beside_tensors_are_read(tmp_path, zipped):
    """YOLOX's own code keeps its best AP so."""
    arrays = {k: v for k, v in ARRAYS.items() if k != "empty"}
    content = {"model": {"x": torch.arange(3)}, "best_ap": np.float64(0.4), **arrays}
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_file(str(path))
    assert found["best_ap"] == 0.4
    for key, expected in arrays.items():
        np.testing.assert_array_equal(found[key], expected)
    assert read_weights(str(path), "w").model["x"].tolist() == [0, 1, 2]
    content["best_ap"] = np.array(["text", None])
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ForeignContentError, match="it refers to numpy.dtype"):
        read_file(str(path))


@pytest.mark.parametrize(("ending", "protocol"), [("pkl", 2), ("pkl", 4), ("pkl", 5), ("pth", 2)])
@pytest.mark.parametrize(
    "value", [evil.Evil, evil.ObjectArray, evil.ObjectScalar, evil.ForgedArray]
)
def test_code_in_a_weight_file_is_not_run(tmp_path, monkeypatch, value, ending, protocol):
    monkeypatch.chdir(tmp_path)
    path = evil.write(f"teacher.{ending}", value(), protocol)
    with pytest.raises(UserError, match=f"^teacher: {path} is not a readable weight file: ") as e:
        read_weights(path, "teacher")
    assert "\n" not in str(e.value)
    assert "weights_only" not in str(e.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("objects", [np.array(["a", None]), np.array([{}], dtype=object)])
def test_arrays_of_objects_are_refused_even_if_harmless(tmp_path, objects):
    with pytest.raises(UserError, match="it refers to numpy.dtype"):
        read_weights(evil.write(tmp_path / "a.pkl", objects), "teacher")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zip.pth", {}),
        ("old.pth", {"_use_new_zipfile_serialization": False}),
    ],
)
def test_what_a_refused_checkpoint_refers_to_is_named(tmp_path, name, options):
    torch.save({"model": {"x": torch.ones(2), "y": evil.Evil()}}, tmp_path / name, **options)
    with pytest.raises(ForeignContentError, match="refers to posix.system"):
        read_file(str(tmp_path / name))


def test_what_torch_itself_takes_for_safe_is_not_named(tmp_path):
    content = {"hits": collections.Counter("aab"), "best": np.float64(1), "y": evil.Evil()}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ForeignContentError, match="refers to posix.system"):
        read_file(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_that_names_nothing_reads_tensors_and_refuses_the_rest(
    tmp_path, monkeypatch, zipped
):
    """As torch before 2.6."""
    monkeypatch.setattr(files, "_NAMES_UNSAFE", None)
    monkeypatch.chdir(tmp_path)
    for name, value in (("good", torch.ones(2)), ("number", np.float64(1)), ("bad", evil.Evil())):
        torch.save({"x": value}, f"{name}.pth", _use_new_zipfile_serialization=zipped)
    assert read_file("good.pth")["x"].tolist() == [1, 1]
    for name in ("number", "bad"):
        with pytest.raises(ForeignContentError, match="it refers to"):
            read_file(f"{name}.pth")
    assert not (tmp_path / "pwned").exists()


def test_bare_pickle_under_the_name_of_a_checkpoint(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": evil.Evil()}))
    with pytest.raises(ForeignContentError, match="refers to posix.system"):
        read_file(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("content", [b"", b"not weights", bytes(1000), b"PK\3\4" + bytes(100)])
def test_damage_is_not_taken_for_code(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint") as error:
        read_file(str(path))
    assert not isinstance(error.value, ForeignContentError)


def test_safetensors_bring_weights_and_class_names(tmp_path):
    model, path = build(seed=1), str(tmp_path / "teacher.safetensors")
    save_file(model.state_dict(), path, metadata={"class_names": json.dumps(["a", "b", "c"])})
    teacher = FrozenTeacher(model=build(seed=2), checkpoint=path)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(teacher.model.state_dict()[key], value)
    assert teacher.class_names == ["a", "b", "c"]
    assert len(teacher.weights.sha256) == 64


def test_safetensors_without_metadata(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    weights = read_weights(str(tmp_path / "a.safetensors"), "w")
    assert (list(weights.model), weights.class_names) == (["x"], None)


@pytest.mark.parametrize("names", ["disc, box", '"disc"'])
def test_class_names_of_safetensors_must_be_a_list(tmp_path, names):
    path = str(tmp_path / "a.safetensors")
    save_file({"x": torch.ones(2)}, path, metadata={"class_names": names})
    with pytest.raises(UserError, match="a.safetensors is not a readable weight file"):
        read_weights(path, "w")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.ones(1)], "holds a list, not named weights"),
        ({"model": [torch.ones(1)]}, "holds no named weights"),
        ({1: torch.ones(1)}, "holds no named weights"),
        ({"x": "text"}, "holds 'x', a str, not a tensor"),
    ],
)
def test_file_of_something_else_is_named(tmp_path, content, named):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=named):
        read_weights(str(tmp_path / "a.pth"), "w")
