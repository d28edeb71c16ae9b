"""Words of commands that use a checkpoint, refused before torch is imported."""

from pathlib import Path

from common.errors import ConfigError, DataError
from common.files import no_file, no_folder


def expect_pictures(source: Path, output: Path) -> None:
    """What `predict` reads and writes. Raises DataError without the folder, ConfigError as `expect_apart`."""
    if not source.expanduser().is_dir():
        raise DataError(f"input={source}: {no_folder(source.expanduser())}")
    expect_apart(source, output)


def expect_apart(source: Path, output: Path) -> None:
    """Raises ConfigError where the output would be read as pictures with the next call."""
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"output={output}: lies in the input folder and would be read as pictures; name another")


def expect_picture(path: Path) -> None:
    """Raises DataError where there is no such file."""
    if not path.is_file():
        raise DataError(f"image={path}: {no_file(path)}; name one picture")


def expect_names(name: str | None) -> None:
    """Raises ConfigError where `names=` is a file that is not there; `none` and None are no file."""
    if name not in (None, "none") and not Path(name).is_file():
        raise ConfigError(
            f"names={name}: {no_file(Path(name))}; `run.py clusters ckpt=…` writes one to edit, names=none: without"
        )


def expect_program(output: Path) -> None:
    """Raises ConfigError for an output of `export` that is not named as a program."""
    if output.suffix != ".pt2":
        raise ConfigError(f"output={output}: expected a file that ends in .pt2, which torch.export.load reads")
