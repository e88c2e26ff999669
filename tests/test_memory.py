"""Memory of a lock: it does not grow with the number of layers, has the embeddings once, and the prediction is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, command_line
from tiny import save_tiny

from lockkit.files import LOCK_RECORD, read_json
from lockkit.models.activation_cache import ActivationCache

# By default, glibc raises these thresholds at run time and keeps freed blocks: up to 30 MB of 180, different in each run.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}


def memory_of_lock(original: Path, out: Path, settings: dict) -> dict:
    """Lock a model in its own process. Returns the entry on memory in `lockkit.json`."""
    command = [sys.executable, "-m", "lockkit", "lock", original, out, *command_line(QUICK | settings)]
    environment = os.environ | RETURN_FREED_MEMORY
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    memory = read_json(out / LOCK_RECORD, "")["memory"]
    assert f"{memory['peak_bytes'] / 1e9:.2f} GB" in done.stdout
    return memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux reports it")
def test_four_times_the_layers_need_no_more_memory(tmp_path):
    def memory(layers: int) -> dict:
        original = save_tiny("qwen3", tmp_path / f"{layers}-layers", num_hidden_layers=layers, **WIDE)
        settings = {"tokens": 1_024, "end_to_end_tokens": 512, "offload": "disk"}
        return memory_of_lock(original, tmp_path / f"{layers}-locked", settings)

    few, many = memory(2), memory(8)
    sizes = [memory["peak_bytes"] - memory["idle_bytes"] for memory in (few, many)]
    weights = sum(file.stat().st_size for file in (tmp_path / "8-layers").glob("*.safetensors"))
    assert weights > 3 * (sizes[1] - sizes[0])  # keeping all layers in memory would add these
    assert sizes[1] < 1.05 * sizes[0]
    assert many["predicted_bytes"] < 1.3 * few["predicted_bytes"]  # tensors are collected up to the size of a shard
    assert 0.6 < sizes[1] / many["predicted_bytes"] < 1.6


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux reports it")
@pytest.mark.parametrize(("data", "tables"), [("stdlib", 2), ("self", 2.5)])
def test_a_large_table_of_embeddings_is_in_memory_once(tmp_path, data, tables):
    """While transformers loads the model that samples, what it has read of the file counts, too."""
    original = save_tiny("gemma3_text", tmp_path / "original", vocab_size=49_152, hidden_size=1_024)
    settings = {"data": data, "tokens": 512, "block_tokens": 16, "end_to_end_tokens": 0, "coupling": 0.1}
    memory = memory_of_lock(original, tmp_path / "locked", settings)
    peak = memory["peak_bytes"] - memory["idle_bytes"]
    assert peak < tables * 4 * 49_152 * 1_024
    assert 0.75 < peak / memory["predicted_bytes"] < 1.25


def test_activations_beyond_the_budget_are_in_files(tmp_path):
    cache = ActivationCache(tmp_path, budget_bytes=4_000)
    small, large = cache.allocate("small", (500,)), cache.allocate("large", (10, 100))
    assert [file.name for file in tmp_path.iterdir()] == ["large.float32"]
    small[:], large[:] = 1, 2
    assert (cache.attach("large", (10, 100)) == 2).all() and (small == 1).all()
    cache.release("large")
    assert list(tmp_path.iterdir()) == [] and (large == 2).all()  # a tensor stays valid after its file is deleted


def test_a_full_disk_is_an_error_before_writing(tmp_path):
    """Disk space for a memory-mapped file is reserved when it is created. Otherwise a full disk is a bus error later."""
    program = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from pathlib import Path\nfrom lockkit.models.activation_cache import ActivationCache\n"
        f"ActivationCache(Path({str(tmp_path)!r}), 0).allocate('x', (1000,))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "UsageError: the disk is full: activations need" in done.stderr and "--work" in done.stderr
