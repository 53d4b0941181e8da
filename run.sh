#!/usr/bin/env bash
# Sets up an environment on the first call, prepares the data and runs what the README shows: ./run.sh help lists it.
# It needs no more than bash 3.2, macOS' shell. It stays in the caller's folder: relative paths are the caller's.
set -euo pipefail

usage() {
    cat <<'END'
./run.sh [VERB] [ARGUMENTS]    without a verb the arguments are train's; ./run.sh VERB --help shows a verb's options

train and decide
  train [OPTIONS]              train on every GPU, or on the CPU; a track's data are prepared first
                               (default: --track cpu; --track small where a GPU and FineWeb's shards are found)
  compare ARM ARM ...          arms against each other, in turn, with a verdict (default: six pairs of seeds)
  new NAME --part PART         write the file of a new variant, which runs, to be changed into yours
  check NAME[:OPTIONS]         what a variant costs, and whether it sees the future or other documents
  skills ARM ...               what small models with an arm's or a checkpoint's parts learn: recall, copying, state
  variants                     all variants: what they replace and what they cost

results
  generate --checkpoint FILE   texts from a checkpoint (default: 256 tokens, temperature 1)
  visualize WHAT FILE -o FILE  pictures: manifold, splanifold, stream
  runs ...                     past runs, a line each; --json for scripts
  clean ...                    delete the files of runs that did not finish, after asking
  board COMMAND                the records: add, check, render, stats

data, tasks and measurements
  data NAME ...                run data/NAME.py, which makes shards, or Laplacians for topological attention
  task NAME ...                run tasks/NAME.py, which makes a synthetic task and marks a checkpoint's answers
  study NAME ...               run studies/NAME.py, an experiment
  bench NAME ...               run benchmarks/NAME.py, which says how fast

environment
  test [PYTEST'S ARGUMENTS]    the linter and the tests (default: all tests, a process for each core)
  python [ARGUMENTS]           Python in this environment; the checkout's modules can be imported from every folder
  help                         this text

variables
  PYTHON                       the interpreter that the environment is made from, 3.11 or newer (default: python3)
  VENV                         the environment's folder (default: .venv beside run.sh)
  PIP_EXTRA_INDEX_URL, ...     pip's own settings; PyTorch's index of CPU wheels saves gigabytes where there is no GPU
  GOMP_SPINCOUNT, OMP_WAIT_POLICY, KMP_BLOCKTIME
                               how long idle threads spin (default: shortly, so that they leave the cores to other work)
END
}

say() { echo "run.sh: $*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# unknown KIND WORD NAME ...: the error for a word that is none of the names, with the nearest of them.
unknown() {
    local kind=$1 word=$2 nearest
    shift 2
    nearest=$("$base" -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1, 0.5))' \
        "$word" "$@" 2>/dev/null || :)
    fail "there is no $kind '$word'${nearest:+, the nearest is $nearest}; choose from: $*"
}

# The checkout is the folder of this file, whatever links lead to it. (GNU's readlink -f is not everywhere.)
file=${BASH_SOURCE[0]}
while [ -L "$file" ]; do
    target=$(readlink "$file")
    case "$target" in
    /*) file=$target ;;
    *) file=$(dirname "$file")/$target ;;
    esac
done
checkout=$(CDPATH='' cd -- "$(dirname "$file")" && pwd -P)
case "$checkout" in
*:*) fail "$checkout has a colon in its name, which Python's path cannot hold; rename the folder" ;;
esac

requirements=$checkout/requirements.txt
venv=${VENV:-$checkout/.venv}
python=$venv/bin/python
base=${PYTHON:-python3}
stamp=$venv/requirements.installed.txt  # a copy of the requirements that are installed
lock=$venv/run.sh.lock                  # locked while the environment is made, not empty until that is done

verb=train
case "${1:-}" in
help | -h | --help)
    usage
    exit
    ;;
'' | -*) ;;
train | compare | new | check | skills | variants | generate | visualize | runs | clean | board | data | task | \
    study | bench | test | python)
    verb=$1
    shift
    ;;
*) unknown verb "$1" train compare new check skills variants generate visualize runs clean board data task study bench \
    test python help ;;
esac
case "$verb" in  # of these verbs a name follows, that of a script in a folder
data) folder=data ;;
task) folder=tasks ;;
study) folder=studies ;;
bench) folder=benchmarks ;;
*) folder='' ;;
esac
if [ -n "$folder" ]; then
    names=$(grep -l __main__ "$checkout/$folder"/*.py | sed 's,.*/,,; s,\.py$,,')
    # no pipe into grep -q, which ends at its first match: what is written to it afterwards would be a failure
    case $'\n'"$names"$'\n' in
    *$'\n'"${1:-}"$'\n'*) ;;
    *)
        # shellcheck disable=SC2086  # a word for each name
        unknown "$verb script" "${1:-}" $names
        ;;
    esac
fi

# ---- environment ------------------------------------------------------------

# Are the requirements installed, and does PyTorch load? Sets gpus, their number.
is_ready() {
    local code=0
    cmp -s "$requirements" "$stamp" || return 1
    gpus=$("$python" -I -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || code=$?
    [ "$code" -le 128 ] ||
        fail "signal $((code - 128)) ended Python as it loaded PyTorch from $venv; if that repeats, delete the folder"
    return "$code"
}

# What keeps the environment in $venv from use, in words; nothing if it is sound or not there yet.
find_damage() {
    local content
    content=$(find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${lock##*/}" 2>/dev/null || :)
    if [ -s "$lock" ]; then
        echo "an earlier installation was cut off"
    elif [ -z "$content" ]; then
        return
    elif ! "$python" -I -c '' 2>/dev/null; then
        echo "it has no interpreter that runs here"
    elif cmp -s "$requirements" "$stamp"; then
        echo "PyTorch does not load from it"
    elif ! "$python" -I -m pip --version >/dev/null 2>&1; then
        echo "it has no pip"
    fi
}

# Was the environment's folder made here? Others are filled, but never cleared.
is_ours() { [ "$venv" = "$checkout/.venv" ] || [ -e "$lock" ] || [ -e "$stamp" ]; }

# Make or complete the environment. Calls at one time wait for each other; the system lifts a lock when its holder ends.
set_up() {
    local damage message
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$base is not Python 3.11 or newer; install one and name it: PYTHON=/path/to/python3.12 ./run.sh"
    damage=$(find_damage)
    [ -z "$damage" ] || is_ours ||
        fail "$venv: $damage, and it was not made here; delete it, or name another folder: VENV=/path/to/folder"
    { mkdir -p "$venv" && : >>"$lock"; } 2>/dev/null ||
        fail "cannot write to $venv; name another folder: VENV=/path/to/folder"

    trap 'exit 130' INT  # and not on with the next line, as after a child that has dealt with Ctrl-C itself
    exec 9>>"$lock"
    "$base" -c '
import fcntl, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("run.sh: waiting for another call that makes the same environment", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)' >&2 2>/dev/null ||
        say "$venv cannot be locked where it is; do not call this twice at once"
    if is_ready; then
        exec 9>&-
        return
    fi

    damage=$(find_damage)
    if [ -n "$damage" ]; then
        [ -e "$venv/pyvenv.cfg" ] || ! [ -e "$python" ] ||
            fail "$venv: $damage, and it is no virtual environment; repair it, or name another: VENV=/path/to/folder"
        say "$venv: $damage; it is made anew, with the requirements"
        find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${lock##*/}" -exec rm -rf {} +
    else
        say "installing the requirements into $venv (once)"
    fi
    echo $$ >"$lock"
    if ! [ -x "$python" ] && ! "$base" -m venv "$venv"; then
        : >"$lock"
        fail "$base cannot make a virtual environment; install its venv package (Debian: apt install python3-venv)"
    fi
    if ! "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements"; then
        : >"$lock"
        fail "pip could not install requirements.txt (its message is above); later calls try again"
    fi
    cp "$requirements" "$stamp"
    : >"$lock"
    if ! is_ready; then
        rm "$stamp"
        message=$("$python" -I -c 'import torch' 2>&1 | tail -n 1 || :)
        fail "PyTorch does not load though it is installed ($message); mend that, or delete $venv to install it again"
    fi
    exec 9>&-
}

is_ready || set_up
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"

# Threads that wait for others spin, which makes a step several times as long beside other work: they sleep after 20,000
# turns with GNU's OpenMP, and after a millisecond, its smallest unit, with LLVM's and Intel's.
if [ -z "${GOMP_SPINCOUNT+set}${OMP_WAIT_POLICY+set}${KMP_BLOCKTIME+set}" ]; then
    export GOMP_SPINCOUNT=20000 KMP_BLOCKTIME=1
fi

# ---- verbs ------------------------------------------------------------------

# prepare TRACK: its data, unless the caller's folder has its own of that name, where the trainer looks first.
prepare() {
    local folder=data/fineweb10B shards
    case "$1" in
    cpu | golf_cpu) folder=data/python_bytes ;;
    english_cpu) return ;;  # any English text, by data tokenize_text
    esac
    if [ -d "$folder" ] && ! [ "$folder" -ef "$checkout/$folder" ]; then
        return
    fi
    if [ "$folder" = data/python_bytes ]; then
        ls "$checkout/$folder/meta.json" "$checkout/$folder"/*_train_*.bin >/dev/null 2>&1 ||
            "$python" -P -m data.local_corpus
        return
    fi
    # a third more than the track's tokens: rows that begin with a document leave the ends of long documents out
    shards=$("$python" -P -c '
import math, sys, train_gpt
track = train_gpt.TRACKS.get(sys.argv[1])
print(math.ceil(track["tokens"] * 1.33 / 1e8) if track else 0)' "$1")
    [ "$shards" -eq 0 ] || "$python" -P -m data.cached_fineweb10B "$shards"
}

# train_or_compare SCRIPT ARGUMENTS: prepare the data of the track that the arguments name, then run the script.
train_or_compare() {
    local script=$1 track='' data='' previous='' word fineweb=data/fineweb10B
    shift
    for word in "$@"; do
        case "$previous" in
        --track) track=$word ;;
        --data | --resume) data=$word ;;
        esac
        case "$word" in
        --track=*) track=${word#*=} ;;
        --data=* | --resume=*) data=${word#*=} ;;
        -h | --help) exec "$python" "$checkout/$script" --help ;;
        esac
        previous=$word
    done
    if [ "$script" = compare.py ]; then
        [ -n "$data" ] || prepare "${track:-cpu}"
        exec "$python" "$checkout/$script" "$@"
    fi

    [ -d "$fineweb" ] || fineweb=$checkout/$fineweb
    if [ -z "$track$data" ] && [ "$gpus" -gt 0 ] && ls "$fineweb"/*train*.bin >/dev/null 2>&1; then
        track=small
        set -- "$@" --track small
    fi
    [ -n "$data" ] || prepare "${track:-cpu}"
    if [ "$gpus" -gt 1 ]; then
        exec "$python" -P -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$checkout/$script" "$@"
    fi
    exec "$python" "$checkout/$script" "$@"
}

# run_tests ARGUMENTS: the linter and, whatever it finds, pytest. Fails if one of them does.
run_tests() {
    local word linter=0 tests=0 workers='-n auto --dist loadfile --no-loadscope-reorder' paths=''
    "$python" -m ruff check "$checkout" || linter=$?
    for word in "$@"; do
        case "$word" in
        -n* | --numprocesses* | --pdb | --trace | no:xdist) workers='' ;;
        esac
        [ ! -e "${word%%::*}" ] || paths=given
    done
    if ! [ . -ef "$checkout" ]; then
        [ -n "$paths" ] || set -- "$@" "$checkout/tests"
        set -- -c "$checkout/pyproject.toml" "$@"
    fi
    # shellcheck disable=SC2086  # words or none
    "$python" -m pytest $workers "$@" || tests=$?
    [ "$linter" -eq 0 ] || say "the linter found faults; its list stands above the tests"
    [ "$tests" -ne 0 ] || tests=$linter
    exit "$tests"
}

case "$verb" in
train) train_or_compare train_gpt.py "$@" ;;
compare) train_or_compare compare.py "$@" ;;
generate | visualize) exec "$python" "$checkout/$verb.py" "$@" ;;
check | new) exec "$python" -P -m "variants.$verb" "$@" ;;
skills) exec "$python" -P -m tasks.skills "$@" ;;
variants) exec "$python" -P -m variants "$@" ;;
runs | clean) exec "$python" -P -m "records.$verb" "$@" ;;
board) exec "$python" -P -m records.leaderboard "$@" ;;
data | task | study | bench)
    name=$1
    shift
    exec "$python" -P -m "$folder.$name" "$@"
    ;;
test) run_tests "$@" ;;
python) exec "$python" "$@" ;;
esac
