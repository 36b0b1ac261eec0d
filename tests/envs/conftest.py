"""What several test files share lies beside them; nothing else of the checkout is put on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "pieces"))
