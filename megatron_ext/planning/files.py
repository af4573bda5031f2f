"""Files that are whole or not there: written beside their place, then renamed.

write_text(Path("best.yaml"), text)
"""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 text; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
