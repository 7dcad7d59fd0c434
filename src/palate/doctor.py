"""What is installed here and whether it works: the facts behind `palate doctor`, and the first thing to ask of a bug report."""

import os
import platform
import re
from importlib import metadata

from palate.errors import MissingExtraError
from palate.version import __version__

ENCODERS = ("items", "style", "minilm")
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)[^;]*(?:;.*extra == ['\"](?P<extra>\w+)['\"])?")


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, list[str]]:
    """Packages by the extra that brings them, "" being the core. Empty in a checkout that is not installed."""
    out: dict[str, list[str]] = {}
    for line in (metadata.requires("palate") or []) if installed("palate") else []:
        match = _REQUIREMENT.match(line)
        if match and match["name"] != "palate" and match["extra"] != "all":
            out.setdefault(match["extra"] or "", []).append(match["name"])
    return out


def core() -> list[tuple[str, str]]:
    """(what, version or figure) of this library, the interpreter, the machine and the core packages."""
    import torch

    system = f"{platform.system()} {platform.machine()}"
    rows = [("palate", __version__), ("python", platform.python_version()), ("system", system)]
    rows += [("cores", str(os.cpu_count())), ("torch threads", str(torch.get_num_threads()))]
    packages = requirements().get("", ["torch", "numpy", "scipy", "scikit-learn"])
    return rows + [(package, installed(package) or "missing") for package in packages]


def extras() -> list[tuple[str, str]]:
    """(extra, its versions, or the command that installs it)."""
    out = []
    for extra, packages in requirements().items():
        versions = {package: installed(package) for package in packages}
        if extra and None in versions.values():
            out.append((extra, f"missing: pip install 'palate[{extra}]'"))
        elif extra:
            out.append((extra, ", ".join(f"{package} {version}" for package, version in versions.items())))
    return out


def encoder_state(spec: str) -> tuple[str, bool]:
    """(what to say of an encoder after trying it, whether it is broken); an extra that is not there is no fault."""
    from palate.data.pairs import Choice, PairSet
    from palate.encoders import load_encoder

    pair = PairSet.from_choices([Choice("somebody", "What is for lunch?", "Soup. It is warm!", "Bread, and a bit of cheese.")])
    try:
        data = load_encoder(spec).embed(pair)
    except MissingExtraError as error:
        return str(error), False
    except Exception as error:  # a diagnosis: whatever it is, it is the answer
        return f"broken: {error}", True
    return f"works, {data.embeddings.shape[1]} features", False
