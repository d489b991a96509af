"""Files that are whole or not there."""
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text beside `path` and renames it, so that no reader and no kill sees half of it."""
    replacement = path.with_name(f"{path.name}.tmp")
    replacement.write_text(text, encoding="utf-8")
    os.replace(replacement, path)
