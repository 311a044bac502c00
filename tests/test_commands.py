"""Every command in the README and the recipes runs, shortened; the layout is what CONTRIBUTING says."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# What makes a command short: a small text for the library's, a small vocabulary, and few steps.
SHORTER = [
    (r"--vocab-size \d+", "--vocab-size 300"),
    (r"--steps \d+", "--steps 2"),
    (r"--max-new-tokens \d+", "--max-new-tokens 4"),
    (r"--samples (\d+)", r"--samples \1 --max-new-tokens 4"),
]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of some of the library's texts, under the name of the whole."""
    folder = tmp_path / "python-stdlib"
    folder.mkdir()
    for source in sorted(Path(os.__file__).parent.glob("[a-c]*.py"))[:30]:
        shutil.copy(source, folder / f"{source.stem}.txt")
    return folder


def shortened(script: str, library: Path) -> str:
    for long, short in SHORTER:
        script = re.sub(long, short, script)
    return script.replace("python-stdlib --out", f"{library} --out")


def run_script(script: str, *arguments: str, threads: str = "1") -> str:
    """Run a bash script in the project's folder, with this Python; returns what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", script, *arguments]
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": threads}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_readme_commands(tmp_path: Path, library: Path):
    commands = [line for line in readme_commands() if not line.startswith("make ")]
    assert commands.pop(0) == "source .venv/bin/activate"  # here another Python's folder is on the PATH already
    assert len(commands) >= 11
    script = shortened("\n".join(commands), library).replace("runs/", f"{tmp_path}/")
    said = run_script(script)
    assert "124,439,808" in said  # the plan
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["import ", "import ", "class ", "class "]
    for run in ("base", "ddp", "deep", "further"):
        assert (tmp_path / run / "model.safetensors").is_file()


def test_make_targets_of_the_readme(tmp_path: Path):
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in readme_commands() if line.startswith("make ")]
    assert targets == ["quickstart", "test"] and all(f"\n{target}:" in makefile for target in targets)
    dry = subprocess.run(["make", "-n", *targets, "test-slow", "lint"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0 and "bash recipes/quickstart.sh" in dry.stdout, dry.stderr
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = subprocess.run(["make", "test", "PYTHON=false"], capture_output=True, cwd=tmp_path)
    assert old.returncode == 2 and b"error: false is not Python 3.11 or newer" in old.stderr


def test_quickstart(tmp_path: Path, library: Path):
    script = shortened((ROOT / "recipes" / "quickstart.sh").read_text(), library)
    said = run_script(script, "recipes/quickstart.sh", str(tmp_path / "out"))
    assert re.findall(r"^== (\d)\.", said, re.MULTILINE) == list("123456")
    assert said.splitlines()[-1].startswith(f"All of it lies in {tmp_path / 'out'}: ")
    assert (tmp_path / "out" / "base" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "the run is NOT below the bigram" in said  # two steps of training beat nothing
    assert "resumed from" in run_script(script, "recipes/quickstart.sh", str(tmp_path / "out"))


@pytest.mark.slow
def test_quickstart_in_full(tmp_path: Path):
    """The recipe as it stands beats the bigrams fitted on the same training split."""
    script, threads = (ROOT / "recipes" / "quickstart.sh").read_text(), str(os.cpu_count())
    said = run_script(script, "recipes/quickstart.sh", str(tmp_path / "out"), threads=threads)
    figures = [float(line.split()[-4]) for line in said.splitlines() if re.match(r"(bigram|/.*base): .*byte$", line)]
    assert len(figures) == 2 and figures[1] < figures[0]
    assert "the run is below the bigram" in said


def test_links_of_the_pages():
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page} links to {target}"


def test_figures_are_those_of_the_results():
    """The README's table, from the files that the benchmarks wrote."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    read = lambda name: json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    pretraining = [read(f"pretrain_cpu_{size}") for size in ("small", "medium")]
    for row in pretraining:
        speed, loss = row["tokens_a_second"], row["validation_loss"]
        ratio = f"{row['ours_over_nanogpt']:.2f}"
        assert f"| {speed['ours']:,} tokens/s | nanoGPT {speed['nanogpt']:,} | {ratio} |" in page
        assert f"| {loss['ours']:.3f}" in page and f"| nanoGPT {loss['nanogpt']:.3f}" in page
    assert f"could reach {pretraining[1]['nanogpt_over_bf16_products']}." in page
    for row in read("tokenizer")["rows"][:2]:
        speed, ratio = row["megabytes_per_second"], row["ours_over_tokenizers"]
        peers = f"tokenizers {speed['tokenizers']:.1f}, sentencepiece {speed['sentencepiece']:.1f}"
        assert f"| {speed['ours']:.1f} MB/s | {peers} | {ratio:.2f} |" in page


FLOORS = [
    {"cli"},
    {"tokenizer", "objectives"},
    {"model", "model_folder", "data"},
    {"distributed", "checkpoint", "planning", "sampling"},
    {"training", "generate"},
    {"train_pretrain"},
]
BESIDE = [("model_folder", "model")]
NEVER = {"transformers", "tokenizers", "peft", "trl", "tiktoken", "pickle", "tests", "bench"}


def program_files() -> list[Path]:
    return [path for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("[dkt]*/*.py")) if "tests" not in path.parts]


@pytest.mark.parametrize("path", program_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_lower_floors_alone(path: Path):
    """Or from its own floor where CONTRIBUTING says so; and never an oracle of the tests."""
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 600
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for other in (name.split(".")[0] for name in names):
            assert other not in NEVER
            lower = floor_of.get(other, -1) < floor_of[room] or other == room or (room, other) in BESIDE
            assert lower, f"{path.name}:{node.lineno} imports {other}"
