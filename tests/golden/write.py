"""python tests/golden/write.py: run the small curves again and write them. Look at the difference before
committing it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from curve import FILE, RECIPES, curve


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        curves = {recipe: curve(recipe, Path(scratch) / recipe) for recipe in RECIPES}
    FILE.write_text(json.dumps(curves, indent=1) + "\n")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
