#!/usr/bin/env bash
# Every GPU test, and every benchmark that says something about a GPU, in one command of at most ten minutes (beside the
# installation). Writes one file with the card's name; a part that fails is in the file, and in the exit code.
#
#   benchmarks/gpu.sh                                # gpu-results-CARD.md in the current folder
#   benchmarks/gpu.sh results                        # in another one; OUT=results does the same
#   PYTHON=python benchmarks/gpu.sh                  # with what is installed: PyTorch with CUDA, pytest, this project's needs
#   DEVICE=cpu SIZE=tiny benchmarks/gpu.sh           # a trial without a GPU, which shows that every part runs
#
# Without PYTHON the Makefile's environment is used, and made where it is missing. BUDGET: seconds for all parts together.
# Exit code: 0 all parts passed, 1 some did not, 2 it could not begin.
set -uo pipefail

OUT=${1:-${OUT:-.}}
DEVICE=${DEVICE:-cuda}
SIZE=${SIZE:-paper}
BUDGET=${BUDGET:-570}

give_up() {
    echo "gpu.sh: $1" >&2
    exit 2
}

case "$DEVICE" in cuda | cpu) ;; *) give_up "DEVICE is cuda or cpu, got '$DEVICE'" ;; esac
case "$SIZE" in paper | small | tiny) ;; *) give_up "SIZE is paper, small or tiny, got '$SIZE'" ;; esac
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

# part TITLE LIMIT COMMAND...: runs a part, at most LIMIT seconds and as long as the budget lasts, and notes how it went.
part() {
    local title=$1 limit=$2 left result code start=$SECONDS
    shift 2
    count=$((count + 1))
    left=$((BUDGET - (SECONDS - began)))
    [ "$limit" -le "$left" ] || limit=$left
    echo "$title (at most $limit s)" >&2
    if [ "$limit" -le 0 ]; then
        code=124
        result="NOT RUN: no time was left"
        : > "$parts/out"
        : > "$parts/err"
    else
        timeout --kill-after=10 "$limit" "$@" > "$parts/out" 2> "$parts/err"
        code=$?
        case $code in
            0) result=passed ;;
            124 | 137) result="FAILED: stopped after $limit s" ;;
            *) result="FAILED: exit code $code" ;;
        esac
    fi
    [ "$code" -eq 0 ] || failed=$((failed + 1))
    echo "    $result, $((SECONDS - start)) s" >&2
    echo "| $title | $result | $((SECONDS - start)) |" >> "$summary"
    {
        printf '\n## %s\n\n' "$title"
        [ "$code" -eq 0 ] || printf '**%s**\n\n' "$result"
        if [[ "$*" == *pytest* ]]; then
            printf '```\n'
            tail -n 60 "$parts/out"
            printf '```\n'
        else
            cat "$parts/out"
        fi
        if [ "$code" -ne 0 ] && [ -s "$parts/err" ]; then
            printf '\n```\n'
            tail -n 40 "$parts/err"
            printf '```\n'
        fi
    } >> "$parts/body"
}

python_part() { part "$1" "$2" "$PYTHON" "${@:3}"; }

if [ "$DEVICE" = cuda ]; then export REQUIRE_GPU=1; fi
if [ "$SIZE" = tiny ]; then
    fused=(--quick --repeats 1)
    steps=(--size tiny --repeats 1 --only "first order")
    overhead=(--quick)
else
    fused=(--repeats 5)
    steps=(--size "$SIZE" --repeats 3)
    overhead=(--repeats 200)
fi
python_part "GPU tests" 200 -m pytest -q -p no:cacheprovider tests/gpu
python_part "Overhead over PyTorch by hand" 60 benchmarks/overhead.py --device "$DEVICE" "${overhead[@]}"
python_part "Overhead, without the check for lost numbers" 60 \
    benchmarks/overhead.py --device "$DEVICE" --on-nonfinite none "${overhead[@]}"
python_part "The fused class-weighted loss" 110 benchmarks/fused_loss.py --device "$DEVICE" "${fused[@]}"
if [ "$DEVICE" = cuda ] && [ "$SIZE" = paper ]; then
    python_part "Supernets at the paper's batch" 60 \
        benchmarks/search_step.py --device cuda --size paper --batch-size 64 --repeats 5 --no-steps
    python_part "Supernets at the paper's batch, TF32" 60 \
        benchmarks/search_step.py --device cuda --size paper --batch-size 64 --repeats 5 --no-steps --tf32
fi
python_part "Search steps beside the original operations" 180 \
    benchmarks/search_step.py --device "$DEVICE" "${steps[@]}"

{
    printf '# Results on %s\n\n' "$card"
    [ "$DEVICE" = cuda ] || printf '**A trial on a CPU: no GPU was used, and the GPU tests were skipped.**\n\n'
    [ "$failed" -eq 0 ] || printf '**%d of %d parts failed.**\n\n' "$failed" "$count"
    printf '| | |\n|---|---|\n'
    tail -n +2 <<< "$described"
    printf '| date | %s |\n| commit | %s |\n\n' "$(date -u +%Y-%m-%d)" "$commit"
    printf '| part | result | s |\n|---|---|---|\n'
    cat "$summary" "$parts/body"
} > "$file" || give_up "$file cannot be written"
echo "$file: $((count - failed)) of $count parts passed"
[ "$failed" -eq 0 ]
