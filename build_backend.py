"""The PEP 517 backend: setuptools, building with the torch of the environment that pygpt is installed into.

pip builds in an isolated environment, which hides that torch. Were torch a requirement of the build, pip would fetch it
a second time, and it is gigabytes large. This backend looks for torch among the packages of the interpreter that runs
the build, which under pip is the interpreter that pygpt is installed for. Front ends that isolate the build in a
virtual environment of its own (uv, `python -m build`) hide torch completely, and the build ends at once with advice.
"""

import importlib.util
import site
import sys
from importlib.metadata import PackageNotFoundError, version

OLDEST_SETUPTOOLS = 77  # the first that reads pyproject.toml's license = "MIT"

_PACKAGES = site.getsitepackages()
if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's own packages
    _PACKAGES.append(site.getusersitepackages())
sys.path += [path for path in _PACKAGES if path not in sys.path]


def _has_setuptools() -> bool:
    try:
        return int(version("setuptools").partition(".")[0]) >= OLDEST_SETUPTOOLS
    except PackageNotFoundError:
        return False


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return [] if _has_setuptools() else [f"setuptools>={OLDEST_SETUPTOOLS}"]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "pygpt: the build needs torch >= 2.10 and cannot see any. It does not fetch torch (gigabytes).\n"
            "Either torch is not installed, or the build is isolated from the environment that has it. Type instead:\n"
            f"  pip install torch 'setuptools>={OLDEST_SETUPTOOLS}'\n"
            "  pip install --no-build-isolation .        (or: uv pip install, python -m build --no-isolation)"
        )
    return get_requires_for_build_sdist()


get_requires_for_build_editable = get_requires_for_build_wheel


def _hook(name: str):
    def run(*args, **kwargs):
        if not _has_setuptools():
            sys.exit(f"pygpt: the build needs a newer setuptools: pip install 'setuptools>={OLDEST_SETUPTOOLS}'")
        from setuptools import build_meta

        return getattr(build_meta, name)(*args, **kwargs)

    return run


build_sdist = _hook("build_sdist")
build_wheel = _hook("build_wheel")
build_editable = _hook("build_editable")
prepare_metadata_for_build_wheel = _hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _hook("prepare_metadata_for_build_editable")
