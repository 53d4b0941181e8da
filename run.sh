#!/usr/bin/env bash
# ./run.sh [arguments of train_gpt.py]     set up on the first call, prepare the track's data, train on all GPUs or on the CPU
# ./run.sh compare ARM ARM ...              the same preparation, then compare.py: arms against each other, with a verdict
# ./run.sh test [arguments of pytest]      the linter and the tests
# ./run.sh python [arguments of Python]    anything else in the same environment
# PYTHON names the interpreter to build on (3.11 or newer), VENV the folder of the virtual environment. pip's own settings, such as
# PIP_EXTRA_INDEX_URL for PyTorch's CPU builds, apply.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=${VENV:-.venv}
python=$venv/bin/python
stamp=$venv/requirements.installed.txt
if ! cmp -s requirements.txt "$stamp"; then
    base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        { echo "run.sh: error: $base is not Python 3.11 or newer; install one and name it: PYTHON=/path/to/python3.12 ./run.sh" >&2; exit 1; }
    echo "run.sh: installing the requirements into $venv (once)"
    [ -x "$python" ] || "$base" -m venv "$venv" ||
        { echo "run.sh: error: $base cannot make a virtual environment; install its venv package (Debian: apt install python3-venv)" >&2; exit 1; }
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
        { echo "run.sh: error: pip could not install requirements.txt (its message is above); later calls try again" >&2; exit 1; }
    cp requirements.txt "$stamp"
fi

case "${1:-}" in
test)
    shift
    "$python" -m ruff check .
    exec "$python" -m pytest -n auto "$@"
    ;;
python)
    shift
    exec "$python" "$@"
    ;;
esac

script=train_gpt.py
if [ "${1:-}" = compare ]; then
    script=compare.py
    shift
fi
track='' data='' arguments=("$@")
while [ $# -gt 0 ]; do
    case "$1" in
    --track) track=${2:-} ;;
    --track=*) track=${1#*=} ;;
    --data | --resume) data=${2:-} ;;
    --data=* | --resume=*) data=${1#*=} ;;
    -h | --help) exec "$python" "$script" --help ;;
    esac
    shift
done
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ -z "$track$data" ] && [ "$script" = train_gpt.py ] && [ "$gpus" -gt 0 ] && ls data/fineweb10B/*train*.bin >/dev/null 2>&1; then
    track=small
    arguments+=(--track small)
fi
if [ -z "$data" ]; then
    case "${track:-cpu}" in
    cpu) [ -f data/python_bytes/meta.json ] || "$python" data/local_corpus.py ;;
    *)  # a third more than the track's tokens: rows that begin with a document leave the ends of long documents out
        shards=$("$python" -c 'import math, sys, train_gpt; t = train_gpt.TRACKS.get(sys.argv[1]); print(math.ceil(t["tokens"] * 1.33 / 1e8) if t else 0)' "$track")
        [ "$shards" -eq 0 ] || "$python" data/cached_fineweb10B.py "$shards" ;;
    esac
fi
if [ "$gpus" -gt 1 ] && [ "$script" = train_gpt.py ]; then
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" train_gpt.py "${arguments[@]}"
fi
exec "$python" "$script" "${arguments[@]}"
