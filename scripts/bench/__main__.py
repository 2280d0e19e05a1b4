"""`python scripts/bench`: a folder that runs has no package of its own, so it makes itself importable first."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT / "scripts"), str(ROOT)]

from bench.cli import main  # noqa: E402

sys.exit(main())
