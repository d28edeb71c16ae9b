"""Zip archives of torch, looked at before they are read: they hold no more than the file is long."""

import zipfile
from pathlib import Path


def unfolds(path: str | Path) -> str | None:
    """Why a file of torch would take far more memory than disk, in words; None where it does not, or is no zip.

    `torch.save` stores its entries as they are, one behind the other. Compressed ones, or entries that share bytes,
    make gigabytes out of a small file.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        return None  # told as damage by those that read it
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "compressed, which torch never does"
    if sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        return "its entries are longer than the file"
    return None
