#!/bin/sh
# Trains a model like examples/things.safetensors, in about fifteen hours of one core:  sh examples/things.sh FOLDER
# A stage that is there is not done again, and one that was stopped goes on. Needs npm, and the environment of the
# checkout (source .venv/bin/activate).
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && cd "$1"
pip install --quiet resvg-py==0.5.0
test -d all || python "$root/benchmarks/emoji_corpus.py" all
test -d things || python "$root/benchmarks/emoji_corpus.py" things --designs noto --without people flags
test -f params.yaml || echo 'ingest: {size: 64}' >params.yaml
darkroom ingest all/training --local --dataset all
darkroom ingest things/training --local --dataset things --set ingest.held_out=0.01

train() {
    name=$1 && shift
    test -f "runs/$name/final.safetensors" || darkroom train --local --set training.output="runs/$name" \
        --set training.batch_size=128 --set training.cpu_threads=1 --set training.checkpoints=8 "$@"
}
denoise() {
    train "$@" --set training.guide=null --set model.text=true --set model.conditional=false \
        --set model.autoencoder=runs/vae/final.safetensors --set model.width=96 --set 'model.channel_mult=[1,2]' --set training.log_sigma_mean=-0.6
}

train vae --dataset all --set model.family=vae --set training.images=90000 --set training.batch_size=64
# All designs first, then one alone, with ever smaller steps.
denoise all --dataset all --set training.images=362880 --set training.batch_size=64 \
    --set training.learning_rate_decay=constant
denoise first --dataset things --set training.images=453376 --set training.learning_rate_decay=constant \
    --set training.init_from=runs/all/final.safetensors
denoise second --dataset things --set training.images=300000 --set training.learning_rate_decay=linear \
    --set training.ema_decay=0.995 --set training.init_from=runs/first/final.safetensors
denoise third --dataset things --set training.images=140000 --set training.learning_rate_decay=linear \
    --set training.learning_rate=0.002 --set training.ema_decay=0.995 \
    --set training.init_from=runs/second/final.safetensors
again() {
    denoise "$1" --dataset things --set training.init_from="runs/$2/final.safetensors" --set training.images="$3" \
        --set training.batch_size=64 --set training.learning_rate=0.003 --set training.learning_rate_decay=linear \
        --set training.ema_decay=0.998
}
again fourth third 500000
again fifth fourth 600000
again sixth fifth 600000
again seventh sixth 600000
again eighth seventh 600000
again ninth eighth 700000
python - <<EOF
from pathlib import Path
from diffusion.checkpoints import export
from diffusion.process.samplers import sampling_config
export(Path("runs/ninth/final.safetensors"), Path("things.safetensors"), sampling_config(guidance=2))
EOF
