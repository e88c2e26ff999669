"""How fast an export runs, beside other exports and PyTorch models, in one run."""

from lockkit.bench.config import BenchConfig, Runtime
from lockkit.bench.run import BenchResult, bench

__all__ = ["BenchConfig", "BenchResult", "Runtime", "bench"]
