"""Words of `run.py import-checkpoint`, refused before torch is imported."""

from collections.abc import Mapping
from pathlib import Path

from common.errors import CheckpointError, ConfigError, did_you_mean
from common.files import no_file

METHODS = {"stego": "stego", "hp": "hidden_positives"}
"""`from=` -> method."""


def expect(origin: str, file: Path, output: Path, words: Mapping[str, str]) -> Path:
    """Where the file's backbone is written, beside `output`. Raises ConfigError for words that do not fit and for an
    output that is there, CheckpointError without the file."""
    expect_origin(origin)
    check_words(words)
    backbone = output.with_suffix(".backbone.safetensors")
    if output.suffix != ".ckpt":
        raise ConfigError(
            f"output={output}: expected a file name that ends in .ckpt, as in output=imported/{origin}.ckpt"
        )
    for path in (output, backbone):
        if path.exists():
            raise ConfigError(f"output={output}: {path} exists already; choose another name, or delete it first")
    expect_file(file)
    return backbone


def expect_origin(origin: str) -> None:
    """Raises ConfigError for a release that nobody knows."""
    if origin not in METHODS:
        raise ConfigError(f"from={origin}: no such release; {did_you_mean(origin, METHODS)}")


def expect_file(path: Path) -> None:
    """Raises CheckpointError where there is no such file."""
    if not path.is_file():
        raise CheckpointError(f"file={path}: {no_file(path)}; give the checkpoint that the authors released")


def check_words(words: Mapping[str, str]) -> None:
    """Raises ConfigError for words that the file decides."""
    for key, value in words.items():
        if key in ("experiment", "method", "backbone", "trainer") or (
            key.startswith(("method.", "backbone.")) and key != "backbone.precision"
        ):
            raise ConfigError(
                f"{key}={value}: follows from the file; only data and values such as data.root can be given"
            )
