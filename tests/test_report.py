"""The report: one page that needs nothing else, says what the results say, and renders in a browser."""

from __future__ import annotations

import html.parser
import json
import shutil
import struct
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert('x')</script>&\"|`"
pytest.importorskip("matplotlib", reason="pip install lockkit[report]")

SUMMARY = {
    "schema": "lockkit-attack/1",
    "model": HOSTILE,
    "headline": {
        "tokens": {"attack": "stack-solve", "amplification": 1.25},
        "seconds": {"attack": "full-ft", "amplification": None},
    },
    "quality": {"perplexity_ratio": 1.0042},
    "effective_depth": 1,
    "unlock_ratio": 0.013,
    "not_tried": ["soap: not installed"],
}
ROWS = [
    {"attack": "full-ft", "model": model, "task": "$HOSTILE$ _x", "seed": seed, "valid": True, "loss": 2.0 - seed / 10,
     "tokens": 1000, "flops": 1e12, "seconds": 3.0, "peak_memory_bytes": 10**8,
     "curve": [{"tokens": t, "flops": t * 1e9, "seconds": t / 300, "loss": 3 - t / 2000} for t in (100, 1000)]}
    for model in ("original", "locked") for seed in (0, 1)
] + [{"attack": "galore", "model": "locked", "valid": False, "reason": HOSTILE, "loss": None}]  # fmt: skip
VERIFY = {
    "schema": "lockkit-verify/1",
    "export": "somewhere/demo-onnx",
    "passed": False,
    "precision": "int4",
    "perplexity": {"onnx_over_original": 1.0211},
    "parity": [
        {"mode": "prefill", "tokens": 4096, "kl_divergence": None, "top1_agreement": 0.5, "max_difference": 2e-5}
    ],
    "gates": [{"gate": "max_kl", "figure": "prefill", "value": None, "limit": 1e-6, "passed": False}],
}


@pytest.fixture
def results(locks, tmp_path):
    """A real lock's record, with an audit and a verification beside it."""
    folder = tmp_path / "results"
    (folder / "lock").mkdir(parents=True)
    shutil.copy(locks("llama") / "lockkit.json", folder / "lock")
    (folder / "verify.json").write_text(json.dumps(VERIFY))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (folder / "other.json").write_text("{not ours")
    return folder


class Page(html.parser.HTMLParser):
    """What a page holds: text outside of tags, tags, ids, and addresses it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.ids, self.addresses = "", set(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href"):
                self.addresses.add(value)

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_results_say_and_needs_nothing_else(results, cli):
    outcome = cli("report", results)
    assert outcome.code == 0, outcome.err
    text = (results / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" in page.tags
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert HOSTILE in page.text
    for said in ("costs 1.25 times as much", "target not reached: > budget", "stack-solve", "1.0042", "attack invalid"):
        assert said in page.text
    assert "Not tried: soap: not installed" in page.text and "Verification of demo-onnx: FAILED" in page.text
    record = json.loads((results / "lock" / "lockkit.json").read_text())
    for layer in record["layers"]:
        assert f"{layer['nmse']:.5f}" in page.text
    assert text.count("<svg") == 3 + 1 + 1  # loss against three resources, best so far, NMSE
    assert "cannot be fine-tuned" not in page.text
    card = (results / "report.md").read_text()
    assert "costs 1.25 times as much" in card and "<script>" not in card
    beside = json.loads((results / "report.json").read_text())
    assert beside["schema"] == "lockkit-report/1" and len(beside["sections"]) == 3


def test_an_audit_without_figures_does_not_pretend(results, cli):
    (results / "summary.json").write_text(json.dumps({"schema": "lockkit-attack/1"}))
    (results / "rows.jsonl").unlink()
    assert cli("report", results, "--out", results / "page.html").code == 0
    text = Page((results / "page.html").read_text()).text
    assert "nothing is known of what this lock is worth" in text and "Not tried: the results do not say" in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "rows.jsonl").write_text('{"attack": 1}\n{broken'), "rows.jsonl, line 2, is not JSON"),
        (lambda folder: (folder / "verify.json").write_text('{"schema": "lockkit-verify/1", "parity": [1]}'), "schema says"),
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.json")], "has no results"),
    ],
)  # fmt: skip
def test_broken_results_are_named_in_one_line(results, cli, damage, said):
    damage(results)
    outcome = cli("report", results, "--out", results.parent / "page.html")
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert not (results.parent / "page.html").exists()


def test_an_impossible_page_is_refused(results, cli):
    for out in (results / "page.txt", results / "absent" / "page.html", results):
        outcome = cli("report", results, "--out", out)
        assert outcome.code == 2 and "change --out" in outcome.err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize(("width", "height"), [(1280, 2000), (390, 3000)])
def test_it_renders_in_a_browser_without_a_word_in_the_console(results, cli, tmp_path, width, height):
    assert cli("report", results).code == 0
    shot = tmp_path / "shot.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}", f"--screenshot={shot}",
         (results / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert "CONSOLE" not in done.stderr
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (width, height) == struct.unpack(">II", shot.read_bytes()[16:24])
        assert len(image.convert("RGB").getcolors(2**24)) > 50  # text and plots, not a blank page
