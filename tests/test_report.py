"""The report: one self-contained page with the figures of the results, which renders in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess

import pytest
from test_attack import ONE_RATE

from lockkit.attack.config import audit_config
from lockkit.attack.run import run_audit
from lockkit.report.glossary import terms_in
from lockkit.report.sections import builders

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
    config = audit_config("quick", **ONE_RATE | {"held_out_tokens": 128, "evaluation_tokens": 128, "sweep": 2})
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
    assert "there is no file or folder" in outcome.err
    assert "change RESULTS" in outcome.err


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
        assert found["says"] in page.text
    for said in (
        f"Audited: {HOSTILE} (a lock of llama, family llama,",  # the name in the lock's record
        f"{summary['quality']['perplexity_ratio']:.4f}",  # beside the headline
        summary["effective_depth"]["says"],
        summary["unlock_ratio"]["says"],
        f"target {figures['target_loss']:.3f}",
        f"{figures['attacks'][0]['locked']['spent']['tokens']:,.0f}",
        summary["verdict"]["sentence"],
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
    # Loss of the attacks besides the headline's, of one group, against two resources; KL against stages and tokens; errors of layers, twice; one search.
    assert text.count("<svg") == 2 + 2 + 2 + 1
    assert "#c0ffe" not in text  # the placeholders were replaced by the page's colours
    card = (results / "report.md").read_text()
    assert figures["amplification"]["tokens"]["says"] in card and "<script>" not in card
    beside = json.loads((results / "report.json").read_text())
    assert beside["schema"] == "lockkit-report/4" and beside["created"][:4].isdigit()
    [attacks] = [section for section in beside["sections"] if section["title"] == "Attacks on the task signatures"]
    loss = attacks["tables"][0]["head"].index("loss")
    runs = [figures["attacks"][0][model]["best_loss"] for model in ("original", "locked")]
    assert attacks["tables"][0]["rows"][0][loss] == runs  # stacked in the page; numbers in JSON
    heads = [section["title"].split()[0] for section in beside["sections"] if not section["part"]]
    assert heads == ["Audit", "Lock", "Verification"]


BENCH = {
    "schema": "lockkit-bench/1",
    "ratios": [
        {"runtime": "onnxruntime", "against": "orig", "batch_size": 1, "prompt_length": 512, "decode": 0.874, "prefill": 1.29}
    ],
    "measurements": [
        {
            "model": name, "runtime": "onnxruntime", "batch_size": 1, "prompt_length": 512,
            "prefill_tokens_per_second": 2029.4, "decode_tokens_per_second": 98.6, "time_to_first_token_seconds": 0.25,
            "step_seconds": {"p50": 0.0101, "p95": 0.012, "p99": 0.014},
        }
        for name in ("locked4", "orig")
    ],
    "models": [
        {
            "model": name, "runtime": "onnxruntime", "locked": True, "precision": "int4", "size_bytes": 2 * 10**8,
            "load_seconds": 0.5, "peak_memory_bytes": 452 * 10**6,
        }
        for name in ("locked4", "orig")
    ],
    "config": {"rounds": 5}, "versions": {"lockkit": "0.1.0"}, "git_hash": "96ca9d9", "machine": {"cpu": "AMD EPYC"},
    "created": "2026-11-26T12:00:00+00:00",
}  # fmt: skip


def test_a_report_of_one_file(cli, tmp_path):
    """Verdict, ratios, speeds, sizes and how it was measured; figures are numbers in JSON."""
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    (tmp_path / "verify.json").write_text(json.dumps(VERIFY))
    assert cli("report", tmp_path / "bench.json").code == 0
    text = Page((tmp_path / "report.html").read_text()).text
    for said in (
        "0.87 times the decoding speed and 1.29 times the prefill speed of orig",
        "2,029",
        "452",
        "250.0",
        "96ca9d9",
    ):
        assert said in text, said
    assert "2026-11-26 12:00:00" in text and "AMD EPYC" in text and "Verification" not in text
    [section] = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert section["tables"][0]["rows"] == [["orig", "onnxruntime", 1, 512, 0.874, 1.29]]
    both = cli("report", tmp_path / "bench.json", tmp_path / "verify.json", "--out", tmp_path / "both.html")
    assert both.code == 0 and "2 sections" in both.out


def test_failed_gates_come_first_in_red_with_the_reason(cli, tmp_path):
    gates = [{"gate": "min_top1", "figure": "prefill", "value": 1.0, "limit": 0.99, "passed": True}]
    record = VERIFY | {"gates": [*gates, *VERIFY["gates"]]}
    (tmp_path / "verify.json").write_text(json.dumps(record))
    passed = record | {"passed": True, "gates": gates, "export": "fine", "created": "2026-11-26T12:00:00+00:00"}
    (tmp_path / "a.json").write_text(json.dumps(passed))
    assert cli("report", tmp_path).code == 0
    html = (tmp_path / "report.html").read_text()
    page, body = Page(html), html.partition("<main>")[2]
    top = html.partition("<main>")[0]
    assert "1 of 2 limits are exceeded: max_kl (prefill) is not finite, limit 1e-06." in page.text
    assert top.index("demo-onnx: FAILED") < top.index("fine: passed")  # the verdicts, failed ones first
    failed = body.partition("demo-onnx: FAILED")[2]
    assert failed.index("<tr class=bad><td>max_kl") < failed.index("<td>min_top1")
    assert all(f"#s{number}" in page.addresses and f"s{number}" in page.ids for number in range(2))  # contents
    card = (tmp_path / "report.md").read_text()
    assert "**1 of 2 limits are exceeded" in card
    sections = json.loads((tmp_path / "report.json").read_text())["sections"]
    values = [row[2] for section in sections for row in section["tables"][0]["rows"]]
    assert values == [1.0, None, 1.0] or values == [None, 1.0, 1.0]
    assert {"KL divergence", "Gate"} <= set(terms_in(page.text)) and "Words" in page.text
    assert "Unlock" not in page.text  # only words that the page uses


def test_nothing_empty_is_shown(cli, tmp_path):
    (tmp_path / "lockkit.json").write_text('{"schema": "lockkit-lock/2", "model": "m", "layers": []}')
    (tmp_path / "sweep.json").write_text('{"schema": "lockkit-asymmetry/1", "rows": []}')
    assert cli("report", tmp_path).code == 0
    text = (tmp_path / "report.html").read_text()
    assert (
        "<svg" not in text
        and "<table" not in text
        and "–" not in Page(text.partition("<main>")[2]).text.partition("Words")[0]
    )


def test_an_audit_of_an_earlier_version_is_still_read(results, cli):
    """As commit 89d919b wrote it: losses and costs of several runs in one line, no verdict."""
    summary = json.loads((results / "summary.json").read_text())
    for figures in summary["tasks"].values():
        for name in ("runs", "off_the_shelf", "within_utility"):
            del figures[name]
        for line in figures["attacks"]:
            del line["kind"]
            for model in ("original", "locked"):
                run = line[model]
                line[f"best_loss_{model}"], line[model] = run and run["best_loss"], run and run["spent"]
    for name in ("verdict", "has_chains", "rows_written", "models"):
        del summary[name]
    summary["schema"] = "lockkit-attack-summary/2"
    (results / "summary.json").write_text(json.dumps(summary))
    assert cli("report", results, "--out", results / "page.html").code == 0
    text = Page((results / "page.html").read_text()).text
    figures = summary["tasks"]["signatures"]
    assert f"Audited: {HOSTILE} (2 layers, chains of depth 5), compared with llama." in text
    assert "It does not record a verdict, the runs that its ratios come from" in text
    assert "later ones in rows.jsonl are not noticed" in text
    assert "made before verdicts" in text and figures["amplification"]["tokens"]["says"] in text
    assert f"{figures['attacks'][0]['locked']['tokens']:,.0f}" in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "rows.jsonl").write_text('{"key": "1"}\n{broken\n'), "rows.jsonl, line 2, is not a row"),
        (lambda folder: (folder / "summary.json").write_text('{"schema": "lockkit-attack-summary/2"}'), "does not match its schema"),
        (lambda folder: (folder / "summary.json").write_text('{"schema": "lockkit-attack-summary/3"}'), "does not match its schema"),
        (lambda folder: [p.write_text('{"schema": "lockkit-attack-summary/1"}') for p in folder.rglob("*.json")], "/1, which this version of lockkit does not read"),
        (lambda folder: (folder / "verify.json").write_text('{"schema": "lockkit-verify/1", "parity": [1]}'), "does not match its schema"),
        (lambda folder: shutil.rmtree(folder), "there is no file or folder"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.json")], "has no results"),
    ],
)  # fmt: skip
def test_broken_results_are_named_in_one_line(results, cli, damage, said):
    damage(results)
    outcome = cli("report", results, "--out", results.parent / "page.html")
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert not (results.parent / "page.html").exists()


@pytest.mark.parametrize("schema", builders())
def test_a_result_without_content_replaces_no_page(cli, tmp_path, schema):
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    assert cli("report", tmp_path / "bench.json").code == 0
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "empty.json").write_text(json.dumps({"schema": schema}))
    outcome = cli("report", tmp_path / "empty.json")
    assert outcome.code == 2 and "does not match its schema" in outcome.err and outcome.err.count("\n") == 1
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_result_without_a_verdict_is_refused(cli, tmp_path):
    for name, record in (
        ("gates", VERIFY | {"gates": []}),
        ("passed", VERIFY | {"passed": True}),
        ("models", BENCH | {"models": [], "ratios": []}),
        ("measurements", BENCH | {"measurements": []}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
        assert cli("report", tmp_path / f"{name}.json").code == 2
    assert not (tmp_path / "report.html").exists()


def test_an_incomplete_row_is_ignored(results, cli):
    assert cli("report", results, "--out", results.parent / "before.html").code == 0
    with (results / "rows.jsonl").open("a") as file:
        file.write('{"key": "cut sh')
    assert cli("report", results, "--out", results.parent / "page.html").code == 0
    before, after = (Page((results.parent / name).read_text()).text for name in ("before.html", "page.html"))
    assert after.count("signatures") == before.count("signatures")


def test_rows_that_are_newer_than_the_summary_are_named(results, cli):
    """As after an audit with more attacks that was interrupted. A run that is tried again counts once."""
    assert "newer than" not in cli("report", results).out
    lines = (results / "rows.jsonl").read_text().splitlines()
    more = [json.dumps(json.loads(lines[-1]) | {"key": key}) for key in ("a", "b", "b")]
    (results / "rows.jsonl").write_text("\n".join([*lines, *more, '{"key": "cut']))
    outcome = cli("report", results)
    said = "rows.jsonl are newer than summary.json, and not counted: run the same audit again"
    assert outcome.code == 0 and said in outcome.out and "2 runs of" in outcome.out
    top, _, body = (results / "report.html").read_text().partition("<main>")
    assert said in top and said in body
    assert "newer than summary.json" in (results / "report.md").read_text()


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
        "const t=[...this.contentDocument.querySelectorAll('.scroll')],s=t.filter(e=>e.scrollWidth>e.clientWidth);"
        "const h=t.filter(e=>e.querySelector('.hint').offsetHeight>9);"
        "document.title='overflow '+(e.scrollWidth-e.clientWidth)+', scroll '+s.length+' of '+t.length+', '+"
        "(s.length==h.length&&s.every(e=>h.includes(e))?'as':'not as')+' the hints say'\"></iframe>"
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
    found = re.search(r"<title>overflow 0, scroll (\d+) of (\d+), as the hints say</title>", done.stdout)
    assert found, done.stdout[:300]
    scrolling, tables = map(int, found.groups())
    assert scrolling == 0 if width == 1280 else 0 < scrolling < tables  # on the phone, tables of few columns fit
    assert page.stat().st_size < 2_000_000
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (max(width, 500), height)
        assert len(image.convert("RGB").getcolors(2**24)) > 50  # the page is not blank
