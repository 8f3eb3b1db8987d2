#!/usr/bin/env bash
# The measurements behind docs/results.md: bash benchmarks/evidence.sh DATA OUT [WHAT...]
#
#   DATA   folder:PATH of CIFAR-10's images, in a folder named cifar10-jpeg; or cifar10
#   OUT    folder of all runs and tables
#   WHAT   cells: every cell of the space with three nodes is trained, twice (an hour of one core)
#          ablation: searches on that table, by look-up, for both generators, both orders, and three
#          kinds of data (15 hours). In place of cells, docs/data/nasbench201_3_nodes_cifar10.csv
#          can be copied to OUT/cells.csv.
#          paper: table2 and controls at --preset small (about 60 hours)
#          By default all of them, in this order.
#
# It can be stopped and repeated: what is done is not done again. SEEDS=20 is the number of searches
# of an arm from FIRST_SEED=0 on, JOBS=1 of those, or of their warm-ups, at a time.
# KINDS="plain hard unequal", GENERATORS="real gan" and ORDERS="first second" choose parts of the
# ablation, and PAPERS="table2-darts-first ..." tables of the paper. With REUSE=docs/data/runs, the
# runs that a table's file in that folder has are not made again. If it has none of them, that is an
# error.
# SHORT=1 goes through all of it in miniature, on digits for example, and its figures say nothing.
set -euo pipefail
here=$(dirname "$0")
[ $# -ge 2 ] || { sed -n '2,/^set/{/^#/p;}' "$0"; exit 2; }
data=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- cells ablation paper
export OMP_NUM_THREADS=1
python=${PYTHON:-python}
seeds=${SEEDS:-20} first_seed=${FIRST_SEED:-0} jobs=${JOBS:-1}
mkdir -p "$out"

nodes=3 preset=small train=() search=(--set search.steps=300) warm_rounds=1500 small=()
name=cifar10-jpeg
read -ra orders <<<"${ORDERS:-first second}"
read -ra kinds <<<"${KINDS:-plain hard unequal}"
read -ra generators <<<"${GENERATORS:-real gan}"
papers=(
    table2-darts-first controls-darts-first table2-darts-second table2-pdarts-first
    table2-pcdarts-first
)
if [ -n "${SHORT:-}" ]; then
    nodes=2 preset=smoke seeds=${SEEDS:-1} warm_rounds=2 name=short orders=(second) kinds=(hard)
    papers=(table2-darts-second)
    train=(--set evaluation.epochs=1 --set data.train_images=100)
    search=(--set search.steps=2 --set data.search_images=300)
    small=(--set search.steps=2 --set search.generator.warmup_rounds=0)
fi
if [ -n "${PAPERS:-}" ]; then read -ra papers <<<"$PAPERS"; fi
space=(--space nasbench201 --preset "$preset" --set search.nodes=$nodes)
cells=$out/cells.csv
lookup=(--lookup "$cells" --set lookup.dataset=$name)
quick=(--launcher workers --jobs "$jobs" --keep results --threads 1)
quick+=(--seeds "$seeds" --first-seed "$first_seed")
search+=(--set search.architecture.lr=0.03)
warm_up=(
    --set search.generator.name=resnet
    --set search.generator.warmup_rounds=$warm_rounds
    --set search.generator.warmup_batch_size=32
    --set search.generator.warmup_lr=0.001
    --set search.generator.warmup_discriminator_lr=0.001
)

# The kinds of data: as they are, a class made hard, and classes of unequal size. The table of cells
# was trained on data as they are.
conditions() {
    case $1 in
    plain) condition=() ;;
    hard)
        of=cat as=dog
        if [ -n "${SHORT:-}" ]; then of=3 as=5; fi
        condition=(
            --set "data.wrong_labels=[{of: '$of', as: ['$as'], share: 0.5}]"
            --set data.conditions_apply_to=search
        )
        ;;
    unequal) condition=(--set data.imbalance=0.1 --set data.conditions_apply_to=search) ;;
    esac
}

table_of_cells() {
    "$python" "$here/cell_table.py" "$data" --named $name --out "$cells" --preset $preset \
        --set search.nodes=$nodes --set evaluation.weights.lr=0.1 \
        --set evaluation.augmentation.flip=true --set evaluation.augmentation.crop_padding=2 \
        "${train[@]}" --seeds 0 1
}

# The options that take the runs of tables from REUSE.
reused() { # names of tables
    reuse=()
    [ -n "${REUSE:-}" ] || return 0
    local name
    for name in "$@"; do
        if [ -f "$REUSE/$name.csv" ]; then reuse+=(--reuse "$REUSE/$name.csv"); fi
    done
}

# A generator per seed and kind of data, which all searches of the seed begin with.
warm_ups() { # kind of data
    trap 'kill $(jobs -p) 2>/dev/null' EXIT # if one fails, or at Ctrl-C, the others save and stop
    for seed in $(seq "$first_seed" $((first_seed + seeds - 1))); do
        [ ! -f "$out/warm/$1/$seed/result.json" ] || continue
        if [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; then wait -n; fi
        generator_of "$seed" "$out/warm/$1/$seed" &
    done
    while [ -n "$(jobs -p)" ]; do wait -n; done
    trap - EXIT
}

# Called with &: `exec` replaces the subshell, so a signal to it reaches the run.
generator_of() { # seed, folder
    if [ -f "$2/config.yaml" ]; then
        exec "$python" -m lfmcw_app.run --resume "$2" --lookup "$cells" --threads 1
    fi
    exec "$python" -m lfmcw_app.run "$data" "${space[@]}" "${search[@]}" --set search.steps=1 \
        "${warm_up[@]}" "${lookup[@]}" "${condition[@]}" --set search.order=first \
        --set search.generator.quality=end --threads 1 --seed "$1" --out "$2"
}

ablation() { # kind of data, generator, order
    conditions "$1"
    generator=(--set search.generator.name=real --set search.generator.quality=never)
    if [ "$2" = gan ]; then
        warm_ups "$1"
        generator=(
            --set search.generator.name=resnet --set search.generator.quality=end
            --set "search.generator.init.run=$out/warm/$1/{seed}"
        )
    fi
    local table=nasbench201-$2-$3
    if [ "$1" != plain ]; then table=nasbench201-$2-$1-$3; fi
    reused "$table"
    "$python" -m lfmcw_app.table ablation "$data" --order "$3" "${space[@]}" "${search[@]}" \
        "${lookup[@]}" "${generator[@]}" "${condition[@]}" "${quick[@]}" "${reuse[@]}" \
        --runs "$out/runs" --out "$out/tables/$table"
}

paper() { # table-space-order
    local table space_name order
    IFS=- read -r table space_name order <<<"$1"
    local results=("$1")
    if [ "$table" = controls ]; then results+=("table2-$space_name-$order"); fi # has its arms
    reused "${results[@]}"
    "$python" -m lfmcw_app.table "$table" "$data" --preset $preset --space "$space_name" \
        --order "$order" "${quick[@]}" --set search.generator.quality=end "${train[@]}" \
        "${small[@]}" "${reuse[@]}" --runs "$out/runs" --out "$out/tables/$1"
}

for what in "$@"; do
    case $what in
    cells) table_of_cells ;;
    ablation)
        for order in "${orders[@]}"; do
            for kind in "${kinds[@]}"; do
                for generator in "${generators[@]}"; do
                    ablation $kind $generator $order
                done
            done
        done
        ;;
    paper)
        for name_of_table in "${papers[@]}"; do
            paper "$name_of_table"
        done
        ;;
    *)
        echo "WHAT is cells, ablation or paper, got $what." >&2
        exit 2
        ;;
    esac
done
echo "Copy $out/tables/NAME/runs.csv to docs/data/runs/NAME.csv, and run make results."
