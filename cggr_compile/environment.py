"""What a measurement was made with: command, commit, device, versions."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "transformers", "triton"),
    *("liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl"),
)


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The command, the commit ("-dirty" with changes, "unknown" outside a checkout), the device and the versions."""
    versions = {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": command_line(),
        "commit": commit or commit_of_checkout(),
        "device": name,
        "versions": versions,
    }


def command_line() -> str:
    """The command that runs, without the folders of this machine."""
    return shlex.join(["python", *_program(Path(sys.argv[0])), *map(_without_folder, sys.argv[1:])])


def _program(path: Path) -> list[str]:
    """How the program was named: the folder it lies in is the machine's business."""
    if path.name == "__main__.py":
        return ["-m", path.parent.name]
    return [path.name if path.is_absolute() else str(path)]


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def commit_of_checkout() -> str:
    """`git describe` of the working directory, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
