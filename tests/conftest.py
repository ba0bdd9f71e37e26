"""What the tests share: one simulator, built once per test session."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def sim():
    """libero_goal task 8, "put the bowl on the plate"; each test starts it anew."""
    from sim import Sim
    made = Sim("libero_goal", 8)
    yield made
    made.close()
