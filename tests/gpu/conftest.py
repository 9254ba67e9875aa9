"""The fixtures of the serving tests, for engines on a GPU."""

from tests.e2e.conftest import environment, run_engines, serving

__all__ = ["environment", "run_engines", "serving"]
