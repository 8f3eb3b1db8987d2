#!/usr/bin/env bash
# Every GPU test, and every benchmark that says something about a GPU, in one command of at most ten minutes (beside the
# installation). Rows are shown as they are measured. Writes one file with the card's name, anew after each step, so that
# what is done stays where the rest is cut off; a step that fails is in the file, and in the exit code.
#
# There are three parts: kernels (the fused loss), engines (of mlo) and search; PARTS names those that are wanted.
#
#   benchmarks/gpu.sh                                # gpu-results-CARD.md in the current folder
#   benchmarks/gpu.sh results                        # in another one; OUT=results does the same
#   PYTHON=python benchmarks/gpu.sh                  # with what is installed: PyTorch with CUDA, pytest, this project's needs
#   PARTS=search benchmarks/gpu.sh                   # one part, or several: PARTS="kernels search"
#   DEVICE=cpu SIZE=tiny benchmarks/gpu.sh           # a trial without a GPU, which shows that every part runs
#
# Without PYTHON the Makefile's environment is used, and made where it is missing. BUDGET: seconds for all steps together, 570 or on a CPU 3600.
# Exit code: 0 all steps passed, 1 some did not, 2 it could not begin.
set -uo pipefail

OUT=${1:-${OUT:-.}}
DEVICE=${DEVICE:-cuda}
SIZE=${SIZE:-paper}
if [ "$DEVICE" = cuda ]; then BUDGET=${BUDGET:-570}; else BUDGET=${BUDGET:-3600}; fi
PARTS=${PARTS:-kernels engines search}

give_up() {
    echo "gpu.sh: $1" >&2
    exit 2
}

case "$DEVICE" in cuda | cpu) ;; *) give_up "DEVICE is cuda or cpu, got '$DEVICE'" ;; esac
case "$SIZE" in paper | small | tiny) ;; *) give_up "SIZE is paper, small or tiny, got '$SIZE'" ;; esac
for name in $PARTS; do
    case "$name" in kernels | engines | search) ;; *) give_up "PARTS holds kernels, engines, search, got '$name'" ;; esac
done
[ -n "${PARTS// /}" ] || give_up "PARTS is empty"
case "$BUDGET" in '' | *[!0-9]*) give_up "BUDGET is a number of seconds, got '$BUDGET'" ;; esac
mkdir -p "$OUT" || give_up "the folder '$OUT' cannot be made"
OUT=$(cd "$OUT" && pwd) || give_up "the folder cannot be entered"
if [ -n "${PYTHON:-}" ]; then
    PYTHON=$(command -v "$PYTHON") || give_up "there is no such PYTHON"
    PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || give_up "the repository cannot be entered"
if [ -z "${PYTHON:-}" ]; then
    make .venv/.installed-test || give_up "the environment could not be made (make .venv/.installed-test)"
    PYTHON=$PWD/.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

parts=$(mktemp -d) || give_up "no temporary folder"
trap 'rm -rf "$parts"' EXIT

environment() {
    "$PYTHON" - "$DEVICE" <<'PROGRAM'
import platform
import subprocess
import sys

import torch

device = sys.argv[1]
card = "cpu"
lines = [("Python", platform.python_version()), ("PyTorch", torch.__version__), ("CUDA of PyTorch", torch.version.cuda)]
if device == "cuda":
    if not torch.cuda.is_available():
        sys.exit("gpu.sh: this machine, or this build of PyTorch, has no CUDA. A trial without: DEVICE=cpu SIZE=tiny")
    card = torch.cuda.get_device_name()
    about = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown (no nvidia-smi)"
    lines += [
        ("card", card),
        ("cards", torch.cuda.device_count()),
        ("memory", f"{about.total_memory / 2**30:.0f} GiB"),
        ("compute capability", f"{about.major}.{about.minor}"),
        ("driver", driver),
        ("cuDNN", torch.backends.cudnn.version()),
    ]
try:
    import triton

    lines.append(("Triton", triton.__version__))
except ImportError:
    lines.append(("Triton", "not installed"))
print(card)
print("\n".join(f"| {name} | {value} |" for name, value in lines))
PROGRAM
}

described=$(environment) || give_up "no environment to measure in"
card=$(head -n 1 <<< "$described")
file=$OUT/gpu-results-$(tr -cs 'A-Za-z0-9\n' '-' <<< "$card").md
commit=$(git rev-parse HEAD 2> /dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2> /dev/null)" ] || commit="$commit, with changes"

failed=0
count=0
summary=$parts/summary
began=$SECONDS
: > "$summary"
: > "$parts/body"

# write_file: the results so far. It is replaced as a whole, so that it is never cut off.
write_file() {
    {
        printf '# Results on %s\n\n' "$card"
        [ "$DEVICE" = cuda ] || printf '**A trial on a CPU: no GPU was used, and the GPU tests were skipped.**\n\n'
        [ "$failed" -eq 0 ] || printf '**%d of %d parts failed.**\n\n' "$failed" "$count"
        printf '| | |\n|---|---|\n'
        tail -n +2 <<< "$described"
        printf '| parts | %s |\n| date | %s |\n| commit | %s |\n\n' "$PARTS" "$(date -u +%Y-%m-%d)" "$commit"
        printf '| part | result | s |\n|---|---|---|\n'
        cat "$summary" "$parts/body"
    } > "$file.new" && mv "$file.new" "$file" || give_up "$file cannot be written"
}

# note TITLE RESULT SECONDS KIND: adds what a step has printed, a test's last lines or a benchmark's tables, to the file.
note() {
    local title=$1 result=$2 seconds=$3 kind=$4
    [ "$result" = passed ] || failed=$((failed + 1))
    echo "    $result, $seconds s" >&2
    echo "| $title | $result | $seconds |" >> "$summary"
    {
        printf '\n## %s\n\n' "$title"
        [ "$result" = passed ] || printf '**%s**\n\n' "$result"
        if [ "$kind" = tests ]; then
            printf '```\n'
            tail -n 60 "$parts/out"
            printf '```\n'
        else
            cat "$parts/out"
        fi
        if [ "$result" != passed ] && [ -s "$parts/err" ]; then
            printf '\n```\n'
            tail -n 40 "$parts/err"
            printf '```\n'
        fi
    } >> "$parts/body"
    write_file
}

# part TITLE LIMIT KIND COMMAND...: runs a step, at most LIMIT seconds and as long as the budget lasts.
part() {
    local limit=$2 left code
    title=$1 kind=$3 start=$SECONDS
    shift 3
    count=$((count + 1))
    left=$((BUDGET - (SECONDS - began)))
    # On a CPU, which may be busy with other things, a step has all the time that is left.
    { [ "$DEVICE" = cuda ] && [ "$limit" -le "$left" ]; } || limit=$left
    echo "$title (at most $limit s)" >&2
    : > "$parts/out"
    : > "$parts/err"
    if [ "$limit" -le 0 ]; then
        note "$title" "NOT RUN: no time was left" 0 "$kind"
        return
    fi
    {
        timeout --kill-after=10 "$limit" "$@" 2> "$parts/err" &
        echo $! > "$parts/pid"
        wait $!
        echo $? > "$parts/code"
    } | tee "$parts/out" >&2 &
    wait $! # a signal interrupts it
    code=$(cat "$parts/code")
    case $code in
        0) note "$title" passed $((SECONDS - start)) "$kind" ;;
        124 | 137) note "$title" "FAILED: stopped after $limit s" $((SECONDS - start)) "$kind" ;;
        *) note "$title" "FAILED: exit code $code" $((SECONDS - start)) "$kind" ;;
    esac
}

# A signal ends the step that runs; what it has printed is kept.
stopped() {
    trap - INT TERM
    kill "$(cat "$parts/pid")" && wait
    note "$title" "FAILED: stopped by a signal" $((SECONDS - start)) "$kind"
    exit 1
}
trap stopped INT TERM

tests() { part "$1" "$2" tests "$PYTHON" -m pytest -q -p no:cacheprovider "${@:3}"; }
benchmark() { part "$1" "$2" benchmark "$PYTHON" "benchmarks/$3" --device "$DEVICE" "${@:4}"; }

if [ "$DEVICE" = cuda ]; then export REQUIRE_GPU=1; fi
if [ "$SIZE" = tiny ]; then
    fused=(--quick --repeats 1)
    steps=(--size tiny --repeats 1 --only "first order")
    rounds=(--size tiny --only "DARTS, first order")
    overhead=(--quick)
else
    fused=(--repeats 5)
    steps=(--size "$SIZE" --repeats 3)
    rounds=(--size "$SIZE")
    overhead=(--repeats 200)
fi
kernel_tests=tests/gpu/test_class_weighted_kernels.py
engine_tests=tests/gpu/test_engines_on_the_device.py

kernels() {
    tests "GPU tests of the kernels" 120 "$kernel_tests"
    benchmark "The fused class-weighted loss" 110 fused_loss.py "${fused[@]}"
    benchmark "The fused class-weighted loss, bfloat16" 80 fused_loss.py --dtype bfloat16 "${fused[@]}"
}

engines() {
    tests "GPU tests of the engines" 100 "$engine_tests"
    benchmark "Overhead over PyTorch by hand" 60 overhead.py "${overhead[@]}"
    benchmark "Overhead, without the check for lost numbers" 60 overhead.py --on-nonfinite none "${overhead[@]}"
}

search() {
    tests "GPU tests of the search, and all others" 150 tests/gpu "--ignore=$kernel_tests" "--ignore=$engine_tests"
    benchmark "Launches, waits, and equal rounds" 120 gpu_rounds.py "${rounds[@]}"
    benchmark "Search steps beside the original operations" 180 search_step.py "${steps[@]}"
    if [ "$DEVICE" = cuda ] && [ "$SIZE" = paper ]; then
        local size=(--size paper --batch-size 64 --repeats 5 --no-steps)
        benchmark "Supernets at the paper's batch" 60 search_step.py "${size[@]}"
        benchmark "Supernets at the paper's batch, TF32" 60 search_step.py "${size[@]}" --tf32
    fi
}

for name in kernels engines search; do
    if [[ " $PARTS " == *" $name "* ]]; then "$name"; fi
done

echo "$file: $((count - failed)) of $count parts passed"
[ "$failed" -eq 0 ]
