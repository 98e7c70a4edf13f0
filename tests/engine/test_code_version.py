"""The version of the code that a run's summary names."""

import subprocess

import pytest

from dfd.engine.code_version import ROOT, code_version


@pytest.fixture
def package(tmp_path):
    """A small package in a repository of its own, as git has it."""
    root = tmp_path / "repository" / "projects" / "dfd"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "inner" / "a.py").write_text("x = 1\n")
    return root


def commit(root):
    top = root.parents[1]
    run = ["git", "-C", str(top), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "init", "-q", str(top)], check=True)
    subprocess.run([*run, "add", "-A"], check=True)
    subprocess.run([*run, "commit", "-qm", "m"], check=True)


def again(root):
    code_version.cache_clear()
    return code_version(root)


def test_hash_is_of_every_source_file_and_its_place(package):
    first = again(package)
    assert first == again(package) and first["commit"] is None
    (package / "notes.txt").write_text("no code")
    assert again(package) == first
    (package / "inner" / "a.py").write_text("x = 2\n")
    assert again(package)["sha256"] != first["sha256"]
    (package / "inner" / "a.py").rename(package / "inner" / "b.py")
    (package / "inner" / "b.py").write_text("x = 1\n")
    assert again(package)["sha256"] != first["sha256"]


def test_commit_is_named_with_what_was_changed_since(package):
    commit(package)
    clean = again(package)
    assert len(clean["commit"]) == 40
    (package.parents[1] / "elsewhere.txt").write_text("not of the package")
    assert again(package) == clean
    (package / "inner" / "a.py").write_text("x = 2\n")
    assert again(package)["commit"] == clean["commit"] + "+changes"


def test_package_that_is_installed_within_another_repository_has_no_commit(package):
    commit(package)
    installed = package.parents[1] / ".venv" / "dfd"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert again(installed)["commit"] is None


def test_without_git_there_is_no_commit(package, monkeypatch):
    commit(package)
    monkeypatch.setenv("PATH", str(package))
    assert again(package)["commit"] is None


def test_it_is_of_this_package():
    assert (ROOT / "engine" / "code_version.py").is_file()
    assert len(again(ROOT)["sha256"]) == 64


def test_it_is_that_of_the_start_whatever_is_changed_later(package):
    first = again(package)
    (package / "inner" / "a.py").write_text("x = 2\n")
    assert code_version(package) == first
