"""The presets of the folder callbacks/ ship inside the package; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPresets(build_py):
    """Copies callbacks/*.yaml to lightning_muter/presets; an editable install reads the folder."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "lightning_muter" / "presets"
        self.mkpath(str(target))
        for preset in sorted(Path("callbacks").glob("*.yaml")):
            self.copy_file(str(preset), str(target / preset.name))


setup(cmdclass={"build_py": BuildWithPresets})
