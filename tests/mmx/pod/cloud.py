"""A place with the double of gcloud first on PATH, a checkout to ship, and hosts that really run what ssh is told."""

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent.parent
DOUBLE = Path(__file__).parent / "double"
NAME, SLICES, HOSTS = "moe", 2, 4
POD = (f"--name={NAME}", "--zone=us-east5-a", "--accelerator_type=v5p-16", f"--slices={SLICES}", "--spot")


def load_double():
    """The double as a module."""
    loader = importlib.machinery.SourceFileLoader("gcloud_double", str(DOUBLE / "gcloud"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


class Cloud:
    """The double's folder, and the user's."""

    def __init__(self, folder: Path, monkeypatch):
        self.root, self.checkout, self.workdir = folder / "cloud", folder / "checkout", folder / "shared" / "run"
        monkeypatch.setenv("GCLOUD_DOUBLE", str(self.root))
        monkeypatch.setenv("PATH", f"{self._make_programs()}{os.pathsep}{os.environ['PATH']}")
        # Hosts have what was shipped to them, and nothing of this checkout.
        monkeypatch.delenv("PYTHONPATH", raising=False)
        monkeypatch.setenv("PYTHON", sys.executable)
        monkeypatch.setenv("MMX_WRITER", f"{NAME}-0")
        self.double = load_double()
        self.double.ROOT = self.root
        self._make_checkout()
        self._make_image()
        self.settings()

    def settings(self, **settings) -> None:
        """Latency of each call and time of each state, in seconds; errors to give; and so on."""
        self.double.write("settings.json", {"latency": 0.01, "step": 0.2} | settings)

    def pod(self, action: str, *arguments: str, status: int = 0) -> str:
        """Calls launch.pod; what it prints, both streams together."""
        result = self.start(action, *arguments)
        out, _ = result.communicate(timeout=60)
        assert result.returncode == status, out
        return out

    def start(self, action: str, *arguments: str) -> subprocess.Popen:
        """The same without waiting."""
        return subprocess.Popen(
            [sys.executable, "-m", "launch.pod", action, "--poll=0.05", *arguments],
            cwd=self.checkout,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def calls(self) -> list[list[str]]:
        """Every call of gcloud so far."""
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def actions(self) -> list[str]:
        """What was asked of queued resources, without looking."""
        made = [call[3] for call in self.calls() if call[2:3] == ["queued-resources"]]
        return [action for action in made if action in ("create", "delete", "scp")]

    def steps(self) -> list[int]:
        """Steps in metrics.jsonl."""
        file = self.workdir / "metrics.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for(self, step: int) -> None:
        """Returns when the run has got that far."""
        limit = time.time() + 60
        while not self.steps() or self.steps()[-1] < step:
            assert time.time() < limit, f"never reached step {step}: stands at {self.steps()[-1:]}"
            time.sleep(0.01)

    def go_on(self, step: int) -> None:
        """Lets a run that was told to hold at this step go on."""
        (self.workdir / f"go-{step}").touch()

    def logs(self, host: str = f"{NAME}-0-w-0") -> str:
        """What a host's log holds."""
        return (self.root / "homes" / host / "mmx-run" / "log").read_text()

    def _make_programs(self) -> Path:
        programs = self.root / "programs"
        programs.mkdir(parents=True)
        (programs / "gcloud").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{DOUBLE}/gcloud" "$@"\n')
        (programs / "gcloud").chmod(0o755)
        (programs / "gcsfuse").symlink_to(DOUBLE / "gcsfuse")
        return programs

    def _make_checkout(self) -> None:
        for folder in ("launch", "mmx/pod", "mmx/config"):
            shutil.copytree(REPOSITORY / folder, self.checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "mmx" / "__init__.py", self.checkout / "mmx")
        shutil.copy(DOUBLE / "pretrain.py", self.checkout / "launch")
        (self.checkout / "setup.py").write_text("nothing to install\n")
        (self.checkout / ".gitignore").write_text("__pycache__/\n/runs/\n")
        subprocess.run(["git", "init", "--quiet"], cwd=self.checkout, check=True)

    def _make_image(self) -> None:
        """A disk on which everything is installed: mmx.venv, stamped as launch/environment.sh does."""
        venv = self.root / "image" / "mmx.venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to(sys.executable)
        version = subprocess.run([sys.executable, "--version"], capture_output=True, check=True).stdout
        contents = (self.checkout / "setup.py").read_bytes() + b"[tpu]\n" + version
        stamp = subprocess.run(["cksum"], input=contents, capture_output=True, check=True).stdout.decode().strip()
        (venv / "mmx-installed").write_text(stamp)
