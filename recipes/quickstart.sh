#!/usr/bin/env bash
# Raw text to a pretrained model that writes, in a few minutes on two CPU cores and without a download: the text is
# that of the Python that runs. `make quickstart` installs what it needs and runs it. Killed while it pretrains, it goes on
# from the last checkpoint.
#
#     bash recipes/quickstart.sh [FOLDER]
set -euo pipefail
out=${1:-runs/quickstart}
[[ $# == 0 || $out == /* ]] || out=$PWD/$out
cd "$(dirname "$0")/.."

echo "== 1. Curate: the standard library's source files become a corpus with a held-out split"
python -m data.curate python-stdlib --out "$out/corpus"

echo "== 2. Tokenizer: byte-level BPE"
python -m tokenizer.train --input "$out/corpus" --vocab-size 8192 --out "$out/tokenizer"

echo "== 3. Prepare: text to shards of tokens"
python -m data.prepare --input "$out/corpus" --tokenizer "$out/tokenizer" --out "$out/tokens"

echo "== 4. Pretrain: predict the next token"
python train_pretrain.py --data "$out/tokens" --preset tiny --shape context_length=128 --steps 300 --batch-size 24 \
  --optimizer muon --learning-rate 0.012 --warmup-steps 20 --schedule linear --final-learning-rate 0 \
  --eval-every 100 --save-every 50 --out "$out/base"

echo "== 5. Held out, beside what counting pairs of tokens can do: lower is better"
python -m data.ngram --data "$out/tokens" --run "$out/base"

echo "== 6. Samples"
python generate.py --model "$out/base" --prompt "import " "def main(" "class Error(" --max-new-tokens 80 --temperature 0.7

echo "All of it lies in $out: corpus/report.json, tokenizer/, tokens/, base/ (the model) and base/loss.png (its loss curve)"
