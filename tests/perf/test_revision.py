"""Another commit's package, in a separate repository."""

import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

from perf.harness.parallel import map_in_processes
from perf.harness.revision import package_of


def git(folder, *args):
    who = "-c", "user.name=somebody", "-c", "user.email=somebody@example.org"
    subprocess.run(["git", "-C", folder, *who, *args], check=True)


@pytest.fixture
def checkout(tmp_path):
    """A commit `bare` without the package and one `old` with it. The package has changed since."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "nothing")
    git(tmp_path, "tag", "bare")
    package = tmp_path / "triton_attn" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "the package")
    git(tmp_path, "tag", "old")
    package.write_text("changed = True")
    return tmp_path


@pytest.mark.ci
def test_processes_import_the_package_of_the_commit_and_the_rest_from_here(checkout):
    path = list(sys.path)
    with package_of("old", checkout) as folder:
        package, perf = map_in_processes(resolve_name, ["triton_attn:__file__", "perf:__path__"])
    assert Path(package) == folder / "triton_attn" / "__init__.py"
    assert list(perf) == resolve_name("perf:__path__")
    assert not folder.exists()
    assert sys.path == path


@pytest.mark.parametrize("leaving", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_behind_when_it_is_left_early(checkout, leaving):
    path = list(sys.path)
    with pytest.raises(leaving), package_of("old", checkout) as folder:
        raise leaving
    assert not folder.exists()
    assert sys.path == path


@pytest.mark.parametrize(
    ("revision", "said"),
    [("no-such", "got 'no-such'"), ("--all", "got '--all'"), ("old:triton_attn", "a commit"), ("bare", "no package")],
)
def test_what_is_no_commit_with_a_package_is_refused(checkout, revision, said):
    with pytest.raises(ValueError, match=said), package_of(revision, checkout):
        pass
