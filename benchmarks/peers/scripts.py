"""Loading the third-party driver scripts from the folder in which a peer was unpacked."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from peers.base import Unavailable


def load_script(folder: Path | None, name: str, *needed: str) -> Any:
    """``folder/name.py`` as a module, its folder importable.

    Raises:
        Unavailable: the folder was not given, or the script or one of ``needed`` is not in it.
    """
    if folder is None:
        raise Unavailable("needs --peer-folder")
    for file in (f"{name}.py", *needed):
        if not (folder / file).exists():
            raise Unavailable(f"no {file} in {folder}")
    if name in sys.modules:
        return sys.modules[name]
    for path in (folder, folder / "deps", folder / "late"):
        if path.is_dir() and str(path) not in sys.path:
            sys.path.append(str(path))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
