#!/usr/bin/env bash
# The measurements behind docs/results.md: bash benchmarks/evidence.sh DATA OUT [WHAT...]
#
#   DATA   folder:PATH of CIFAR-10's images, or cifar10
#   OUT    folder of all runs and tables
#   WHAT   cells: every cell of the space with three nodes is trained, twice (an hour of one core)
#          ablation: searches on that table, by look-up, for both generators, both orders, and three
#          kinds of data (15 hours)
#          paper: table2 and controls at --preset small (about 60 hours)
#          By default all of them, in this order.
#
# It can be stopped and repeated: what is done is not done again. SEEDS=20 is the number of searches
# of an arm, JOBS=1 of those at a time. KINDS="plain hard unequal", GENERATORS="real gan" and
# ORDERS="first second" choose parts of the ablation. SHORT=1 goes through all of it in miniature, on
# digits for example, and its figures say nothing.
set -euo pipefail
here=$(dirname "$0")
[ $# -ge 2 ] || { sed -n '2,17p' "$0"; exit 2; }
data=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- cells ablation paper
export OMP_NUM_THREADS=1
python=${PYTHON:-python}
seeds=${SEEDS:-20}
mkdir -p "$out"

nodes=3 preset=small train=() search=(--set search.steps=300) warm_rounds=1500 small=()
name=cifar10-jpeg
read -ra orders <<<"${ORDERS:-first second}"
read -ra kinds <<<"${KINDS:-plain hard unequal}"
read -ra generators <<<"${GENERATORS:-real gan}"
papers=(
    "table2 darts first" "controls darts first" "table2 darts second" "table2 pdarts first"
    "table2 pcdarts first"
)
if [ -n "${SHORT:-}" ]; then
    nodes=2 preset=smoke seeds=1 warm_rounds=2 name=short orders=(second) kinds=(hard)
    papers=("table2 darts second")
    train=(--set evaluation.epochs=1 --set data.train_images=100)
    search=(--set search.steps=2 --set data.search_images=300)
    small=(--set search.steps=2 --set search.generator.warmup_rounds=0)
fi
space=(--space nasbench201 --preset "$preset" --set search.nodes=$nodes)
cells=$out/cells.csv
lookup=(--lookup "$cells" --set lookup.dataset=$name)
quick=(--launcher workers --jobs "${JOBS:-1}" --keep results --threads 1 --seeds "$seeds")
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

# A generator per seed and kind of data, which all searches of the seed begin with.
warm_ups() {
    for seed in $(seq 0 $((seeds - 1))); do
        folder=$out/warm/$1/$seed
        [ ! -f "$folder/result.json" ] || continue
        if [ -f "$folder/config.yaml" ]; then
            "$python" -m lfmcw_app.run --resume "$folder" --lookup "$cells" --threads 1
            continue
        fi
        "$python" -m lfmcw_app.run "$data" "${space[@]}" "${search[@]}" --set search.steps=1 \
            "${warm_up[@]}" "${lookup[@]}" "${condition[@]}" --set search.order=first \
            --set search.generator.quality=end --threads 1 --seed "$seed" --out "$folder"
    done
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
    "$python" -m lfmcw_app.table ablation "$data" --order "$3" "${space[@]}" "${search[@]}" \
        "${lookup[@]}" "${generator[@]}" "${condition[@]}" "${quick[@]}" --runs "$out/runs" \
        --out "$out/tables/$2-$1-$3"
}

paper() { # table, space, order
    "$python" -m lfmcw_app.table "$1" "$data" --preset $preset --space "$2" --order "$3" \
        "${quick[@]}" --set search.generator.quality=end "${train[@]}" "${small[@]}" \
        --runs "$out/runs" --out "$out/tables/$1-$2-$3"
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
        for arguments in "${papers[@]}"; do
            paper $arguments
        done
        ;;
    *)
        echo "WHAT is cells, ablation or paper, got $what." >&2
        exit 2
        ;;
    esac
done
echo "Copy $out/tables/NAME/runs.csv to docs/data/runs/NAME.csv, and run make results."
