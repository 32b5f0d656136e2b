"""What stands for MLflow's registry in one process: versions, aliases, and outages at will."""

import shutil
from pathlib import Path

import pytest

from features.errors import InputError
from serving.models import Registered, RegistryAway

CHAMPION = "models:/small@champion"


class Registry:
    """Versions by their numbers, each a bundle's folder."""

    def __init__(self) -> None:
        self.bundles = dict[str, Path]()
        self.aliases = dict[str, str]()
        self.compatible = set[str]()
        self.away = False
        self.looks, self.downloads = 0, list[str]()

    def add(self, version: str, bundle: Path, alias: str | None = "champion") -> None:
        self.bundles[version] = bundle
        if alias:
            self.aliases[alias] = version

    def find(self, model: str) -> Registered:
        self.looks += 1
        self._require_up()
        name = model.removeprefix("models:/small").removeprefix("/")
        version = self.aliases.get(name.removeprefix("@"), name)
        if version not in self.bundles:
            raise InputError(f"model {model!r} is not in the registry")
        return Registered("small", version, f"m-{version}", 1, version in self.compatible)

    def download(self, found: Registered, folder: Path) -> Path:
        self._require_up()
        self.downloads.append(found.version)
        shutil.copytree(self.bundles[found.version], folder / "bundle")
        return folder / "bundle"

    def _require_up(self) -> None:
        if self.away:
            raise RegistryAway("Connection refused")

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """Be what the service asks."""
        patch.setattr("serving.life.opening.find_registered", self.find)
        patch.setattr("serving.life.following.find_registered", self.find)
        patch.setattr("serving.life.opening.download", self.download)
        patch.setattr("serving.life.opening.registry_uri", lambda: "http://mlflow:5000")
