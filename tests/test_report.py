"""The report: one self-contained page with the figures of the results, which renders in a browser."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess

import pytest
from test_attack import SMALL

from lockkit.attack.config import audit_config
from lockkit.attack.run import run_audit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert('x')</script>&\"|`"
pytest.importorskip("matplotlib", reason="pip install lockkit[report]")

VERIFY = {
    "schema": "lockkit-verify/1",
    "export": "somewhere/demo-onnx",
    "passed": False,
    "precision": "int4",
    "perplexity": {"onnx_over_original": 1.0211},
    "fidelity": {"kl_divergence": 1.27131, "top1_agreement": 0.0625},
    "parity": [
        {"mode": "prefill", "tokens": 4096, "kl_divergence": None, "top1_agreement": 0.5, "max_difference": 2e-5}
    ],
    "gates": [{"gate": "max_kl", "figure": "prefill", "value": None, "limit": 1e-6, "passed": False}],
}


@pytest.fixture(scope="module")
def audit(originals, locks, tmp_path_factory):
    """A small audit of a tiny lock, with a search. One attack cannot run, and its note contains HTML and Markdown."""
    out = tmp_path_factory.mktemp("audit")
    config = audit_config("quick", **SMALL | {"held_out_tokens": 128, "evaluation_tokens": 128, "sweep": 2})
    run_audit(str(locks("llama")), str(originals("llama")), out, config, ["full-ft", "stack-solve", "redistill"])
    summary = json.loads((out / "summary.json").read_text())
    summary["locked"] = HOSTILE
    assert summary["tasks"]["signatures"]["attacks"][-1]["attack"] == "redistill"
    summary["tasks"]["signatures"]["attacks"][-1] |= {"valid": False, "says": "attack invalid"}
    summary["runs"]["not_finished"].append(
        {"attack": "galore", "model": "locked", "task": "$x$ _y", "status": "failed", "note": HOSTILE}
    )
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def test_a_missing_folder_is_named(cli, tmp_path):
    outcome = cli("report", tmp_path / "nowhere")
    assert outcome.code == 2
    assert "there is no folder" in outcome.err
    assert "change DIR" in outcome.err


@pytest.fixture
def results(audit, locks, tmp_path):
    """A real lock's record, with an audit and a verification beside it."""
    folder = tmp_path / "results"
    (folder / "lock").mkdir(parents=True)
    shutil.copy(locks("llama") / "lockkit.json", folder / "lock")
    (folder / "verify.json").write_text(json.dumps(VERIFY))
    for name in ("summary.json", "rows.jsonl"):
        shutil.copy(audit / name, folder)
    (folder / "other.json").write_text("{not ours")
    return folder


class Page(html.parser.HTMLParser):
    """The text of a page outside of tags, its tags, ids, and the addresses it refers to."""

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


def test_the_page_has_the_figures_of_the_results_and_no_external_resources(results, cli):
    outcome = cli("report", results)
    assert outcome.code == 0, outcome.err
    text = (results / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" in page.tags
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert HOSTILE in page.text and "Verification of demo-onnx: FAILED" in page.text
    summary = json.loads((results / "summary.json").read_text())
    figures = summary["tasks"]["signatures"]
    for resource in ("tokens", "flops", "seconds", "peak_tensor_bytes"):
        found = figures["amplification"][resource]
        assert f"costs {found['value']:.2f} times as much" in page.text
    for said in (
        f"{summary['quality']['perplexity_ratio']:.4f}",  # beside the headline
        summary["effective_depth"]["says"],
        summary["unlock_ratio"]["says"],
        f"target {figures['target_loss']:.3f}",
        f"{figures['attacks'][0]['locked']['tokens']:,.0f}",
        summary["adversary"],
        "falsified by any attack",
        "Not tried: badam",
        "attack invalid",
        "1.27131",  # KL of the lock to the original, from the verification
    ):
        assert said in page.text, said
    record = json.loads((results / "lock" / "lockkit.json").read_text())
    for layer in record["layers"]:
        assert f"{layer['nmse']:.5f}" in page.text
    # Loss against three resources; KL against stages and tokens; errors of layers, twice; one search.
    assert text.count("<svg") == 3 + 2 + 2 + 1
    assert "#c0ffe" not in text  # the placeholders were replaced by the page's colours
    card = (results / "report.md").read_text()
    assert f"costs {figures['amplification']['tokens']['value']:.2f} times as much" in card and "<script>" not in card
    beside = json.loads((results / "report.json").read_text())
    assert beside["schema"] == "lockkit-report/2"
    heads = [section["title"].split()[0] for section in beside["sections"] if not section["part"]]
    assert heads == ["Audit", "Lock", "Verification"]


def test_an_audit_in_which_no_attack_reached_a_target_has_a_warning(results, cli):
    summary = json.loads((results / "summary.json").read_text())
    for figures in summary["tasks"].values():
        figures["amplification"] = dict.fromkeys(figures["amplification"])
    (results / "summary.json").write_text(json.dumps(summary))
    (results / "rows.jsonl").unlink()
    assert cli("report", results, "--out", results / "page.html").code == 0
    text = Page((results / "page.html").read_text()).text
    assert "this audit does not show what the lock costs an attacker" in text and "times as much" not in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "rows.jsonl").write_text('{"key": "1"}\n{broken\n'), "rows.jsonl, line 2, is not a row"),
        (lambda folder: (folder / "summary.json").write_text('{"schema": "lockkit-attack-summary/2"}'), "does not match its schema"),
        (lambda folder: (folder / "verify.json").write_text('{"schema": "lockkit-verify/1", "parity": [1]}'), "does not match its schema"),
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.json")], "has no results"),
    ],
)  # fmt: skip
def test_broken_results_are_named_in_one_line(results, cli, damage, said):
    damage(results)
    outcome = cli("report", results, "--out", results.parent / "page.html")
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert not (results.parent / "page.html").exists()


def test_an_incomplete_row_is_ignored(results, cli):
    assert cli("report", results, "--out", results.parent / "before.html").code == 0
    with (results / "rows.jsonl").open("a") as file:
        file.write('{"key": "cut sh')
    assert cli("report", results, "--out", results.parent / "page.html").code == 0
    before, after = (Page((results.parent / name).read_text()).text for name in ("before.html", "page.html"))
    assert after.count("signatures") == before.count("signatures")


def test_an_output_path_that_cannot_be_written_is_refused(results, cli):
    for out in (results / "page.txt", results / "absent" / "page.html", results):
        outcome = cli("report", results, "--out", out)
        assert outcome.code == 2 and "change --out" in outcome.err


WIDTHS = {"desktop": (1280, 2000), "phone": (390, 3000)}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", WIDTHS)
def test_it_renders_in_a_browser_without_console_messages(results, cli, tmp_path, width):
    assert cli("report", results).code == 0
    page, shot = results / "report.html", tmp_path / "shot.png"
    # Headless Chromium opens no window narrower than 500 pixels, so a frame sets the width.
    width, height = WIDTHS[width]
    frame = results / "frame.html"
    frame.write_text(
        f'<!doctype html><link rel="icon" href="data:,"><style>body{{margin:0}}</style><iframe src="report.html" '
        f'style="border:0;width:{width}px;height:{height}px" onload="const e=this.contentDocument.documentElement;'
        "document.title='overflow '+(e.scrollWidth-e.clientWidth)\"></iframe>"
    )
    common = [
        CHROMIUM, *["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
        "--disable-component-update", "--allow-file-access-from-files", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},{height}",
    ]  # fmt: skip
    for arguments in ([f"--screenshot={shot}", frame.as_uri()], ["--dump-dom", frame.as_uri()]):
        done = subprocess.run([*common, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-1000:]
        assert "CONSOLE" not in done.stderr
    assert "<title>overflow 0</title>" in done.stdout
    assert page.stat().st_size < 2_000_000
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (max(width, 500), height)
        assert len(image.convert("RGB").getcolors(2**24)) > 50  # the page is not blank
