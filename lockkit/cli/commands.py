"""All commands, in the order `lockkit --help` lists them."""

from lockkit.cli import plan, lock, export, verify, kernel, bench, attack, generate, serve, report, env  # noqa: F401, I001
