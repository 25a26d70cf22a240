"""`[NAME=]PATH[@SCALE]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgelora.adapter_ref import AdapterRef
from edgelora.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "name", "path", "scale"),
    [
        ("support.gguf", "support", "support.gguf", 1.0),
        ("support.gguf@0.5", "support", "support.gguf", 0.5),
        ("vip=tenants/7.gguf", "vip", "tenants/7.gguf", 1.0),
        ("vip=tenants/7.gguf@-1e-1", "vip", "tenants/7.gguf", -0.1),
        ("a/b.gguf@.5", "b", "a/b.gguf", 0.5),
        ("runs/support", "support", "runs/support", 1.0),
        ("team@home/support.gguf", "support", "team@home/support.gguf", 1.0),
        ("x=team@home/support.gguf@2", "x", "team@home/support.gguf", 2.0),
        ("a/k=v/b.gguf", "b", "a/k=v/b.gguf", 1.0),
    ],
)
def test_parse(text: str, name: str, path: str, scale: float) -> None:
    assert AdapterRef.parse(text) == AdapterRef(name, Path(path), scale)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no path"),
        ("x=", "no path"),
        ("=x.gguf", "no name"),
        ("x.gguf@", "not a scale"),
        ("x.gguf@half", "not a scale"),
        ("x.gguf@inf", "not a scale"),
        ("none=x.gguf", "names the bare base"),
        ("base.gguf", "names the bare base"),
        ("my adapter.gguf", "cannot name an adapter"),
    ],
)
def test_refused(text: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        AdapterRef.parse(text)
    assert caught.value.hint


def test_a_file_that_exists_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "v=2@0.5"
    path.touch()
    with pytest.raises(SettingsError, match="cannot name an adapter"):  # the name needs help, the path is understood
        AdapterRef.parse(str(path))
    assert AdapterRef.parse(f"two={path}") == AdapterRef("two", path, 1.0)


@pytest.mark.parametrize("text", ["a\0b", "~nouser/x.gguf", "x=~nouser/y", "x" * 300, "n=" + "x" * 300 + "@2"])
def test_a_path_that_the_system_cannot_look_at(text: str) -> None:
    with pytest.raises(SettingsError, match="not a path"):
        AdapterRef.parse(text)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", True])
def test_a_scale_is_a_finite_number(scale: Any) -> None:
    with pytest.raises(SettingsError, match="expected a finite number"):
        AdapterRef("x", Path("x.gguf"), scale)
