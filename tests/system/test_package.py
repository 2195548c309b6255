"""An installed relaxmim has, beside its code, every file that the code reads."""

import tomllib
from pathlib import Path

from setuptools import find_namespace_packages

ROOT = Path(__file__).parents[2]
READ = {".yaml", ".json", ".html"}


def test_every_file_that_is_read_is_in_the_wheel():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_namespace_packages(ROOT, **tool["packages"]["find"])
    packed = {
        path
        for package, patterns in tool["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package).glob(pattern)
    }
    rooms = ("pipeline", "shard_tools", "eval", "ds_configs")
    files = [path for room in rooms for path in (ROOT / room).rglob("*")]
    read = {path for path in files if path.suffix in READ}
    assert read
    assert read <= packed
    assert {str(path.relative_to(ROOT).parts[0]) for path in read} <= set(packages)
