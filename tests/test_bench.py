"""The benchmarks' own arithmetic, on models that take no time and on a stand-in for the peer."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from bench import pretrain_cpu
from bench import tokenizer as tokenizer_bench
from cli import UserError

STAND_IN = """
import sys
flags = dict(word.removeprefix("--").split("=") for word in sys.argv[1:] if word.startswith("--"))
steps = int(flags["max_iters"])
assert (flags["n_embd"], flags["block_size"], flags["dataset"]) == ("16", "8", "bytes")
print("step 0: train loss 9.0000, val loss 9.0000")
for step in range(steps + 1):
    if step == steps:
        print(f"step {step}: train loss 1.0000, val loss 1.2500")
    milliseconds = 4 if 5 <= step < steps else 900  # warm, and not the last, which holds an evaluation
    print(f"iter {step}: loss 1.0000, time {milliseconds}.00ms, mfu 1.00%")
"""


@pytest.fixture
def tiny(monkeypatch):
    size = pretrain_cpu.Size("tiny", 1, 1, 16, 8, 1e-2, 30, 12, 8, 1.5, None)
    monkeypatch.setattr(pretrain_cpu, "SIZES", [size])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for its runs: threads that wait for each other's turn cost the most


def test_pretraining_beside_a_peer(tiny, tmp_path: Path):
    """Times of warm steps and of the last one, which holds an evaluation, do not count; ratios are what they say."""
    peer = tmp_path / "nanogpt"
    (peer / "config").mkdir(parents=True)
    for name in ("model.py", "configurator.py"):
        (peer / name).touch()
    (peer / "train.py").write_text(STAND_IN)
    text = ROOT / "CONTRIBUTING.md"
    pretrain_cpu.main(pretrain_cpu.BenchConfig(peer, text, ("tiny",), 2, tmp_path / "results"))
    row = json.loads((tmp_path / "results" / "pretrain_cpu_tiny.json").read_text())
    assert {"date", "machine", "versions", "rounds", "threads"} <= row.keys()
    assert row["seconds_a_step"]["nanogpt"] == 0.004 and row["tokens_a_second"]["nanogpt"] == 24000
    assert row["ours_over_nanogpt"] == pytest.approx(0.004 / row["seconds_a_step"]["ours"], abs=0.005)
    assert row["seconds_a_step"]["ours"] == min(row["seconds_a_step_of_each_round"]["ours"])
    assert row["validation_loss"]["nanogpt"] == row["target_loss"] == 1.25
    assert 2 < row["validation_loss"]["ours"] < 5.5  # it began at ln 259 = 5.56
    assert row["products_alone_seconds"]["bfloat16"] > 0


def test_a_peer_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="is no checkout of nanoGPT"):
        pretrain_cpu.BenchConfig(tmp_path)
    with pytest.raises(UserError, match="a file of ASCII text"):
        pretrain_cpu.BenchConfig(text=ROOT / "README.md")


def test_tokenizers_side_by_side(tmp_path: Path, monkeypatch):
    """Ours, tokenizers' and sentencepiece's on a small text; that ours and tokenizers' ids agree is asserted inside."""
    monkeypatch.setattr(tokenizer_bench, "stdlib_texts", lambda: [(ROOT / "training.py").read_text()] * 3)
    tokenizer_bench.main(tokenizer_bench.BenchConfig((400,), 1, tmp_path / "bench.json"))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["train", "encode"]
    assert all(row["megabytes_per_second"].keys() == {"ours", "tokenizers", "sentencepiece"} for row in rows)
