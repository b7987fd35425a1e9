#!/usr/bin/env bash
# Compiles the kernels for sm_80 and sm_90a and reads the machine code: 16-byte loads, tensor cores, no spills.
# Needs no GPU. Without CUDA_HOME the toolkit is made of PyPI's wheels, in DIR.
#
#   kernels/check-cuda.sh [DIR]      DIR is kept for the next time, by default ~/.cache/dynamoe/cuda
#   kernels/check-cuda.sh --skip     succeeds where there is no CUDA_HOME and no way to fetch the wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
    echo "check-cuda: $*" >&2
    exit 1
}

skip=false
if [ "${1:-}" = --skip ]; then
    skip=true
    shift
fi

toolkit() {
    local dir=$1
    [ -x "$dir/nvidia/cu13/bin/nvcc" ] && [ -x "$dir/nvidia/cu13/bin/cuobjdump" ] && return
    rm -rf "$dir.part"
    # one call: a second one with --target would not merge into the folder nvidia/
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --no-deps --no-compile --only-binary=:all: \
        --root-user-action=ignore --target "$dir.part" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
        nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51 &&
        rm -rf "$dir" && mv "$dir.part" "$dir"
}

if [ -z "${CUDA_HOME:-}" ]; then
    if ! python3 -m pip --version >/dev/null 2>&1; then
        $skip && echo "check-cuda: skipped, neither CUDA_HOME nor pip" && exit
        fail "no CUDA_HOME, and no pip to make a toolkit with"
    fi
    dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/dynamoe/cuda}
    mkdir -p "$(dirname "$dir")"
    if ! toolkit "$dir"; then
        $skip && echo "check-cuda: skipped, the toolkit's wheels cannot be fetched" && exit
        fail "cannot fetch the toolkit's wheels with pip: set CUDA_HOME to a CUDA 13.0 toolkit"
    fi
    CUDA_HOME=$dir/nvidia/cu13
fi
export PATH=$CUDA_HOME/bin:$PATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# check ARCH KERNELS PATTERN WHAT: every kernel whose name matches KERNELS has an instruction that matches PATTERN
check() {
    awk -v kernels="$2" -v pattern="$3" '
        /Function :/ { name = $NF; if (name ~ kernels) seen[name] += 0 }
        name ~ kernels && $0 ~ pattern { ++seen[name] }
        END { for (k in seen) { ++all; if (!seen[k]) { print k; bad = 1 } } exit bad || !all }' \
        "$work/$1.sass" || fail "$1: the kernels above have no $4"
    echo "$1: all of $2 have $4"
}

# nvcc's names for architectures; the last letter of sm_90a opens instructions that only Hopper has
for arch in 80 90a; do
    (
        nvcc --cubin -O3 -std=c++17 -gencode=arch=compute_$arch,code=sm_$arch -Xptxas -v \
            -o "$work/sm_$arch.cubin" cu/dynamoe.cu 2>"$work/sm_$arch.log" || {
            cat "$work/sm_$arch.log" >&2
            exit 1
        }
        cuobjdump -sass "$work/sm_$arch.cubin" >"$work/sm_$arch.sass"
    ) &
done
for job in $(jobs -p); do wait "$job" || fail "nvcc failed"; done

for arch in sm_80 sm_90a; do
    kernels=$(grep -c 'Compiling entry function' "$work/$arch.log")
    spills=$(grep -c '[1-9][0-9]* bytes spill' "$work/$arch.log" || true)
    [ "$spills" = 0 ] || fail "$arch: $spills kernels spill: $(grep -B2 '[1-9][0-9]* bytes spill' "$work/$arch.log")"
    echo "$arch: $kernels kernels, no spills, at most $(grep -o 'Used [0-9]*' "$work/$arch.log" | sort -k2n | tail -1 | cut -d' ' -f2) registers"
    check $arch '^(route|decode_.*_(f32|f16|bf16|q4k))_' 'LDG[.A-Z0-9]*[.]128' 'loads of 16 bytes'
    check $arch '^decode_.*_q8_0_' 'LDGSTS[.A-Z0-9]*[.]128' 'asynchronous copies of 16 bytes'
    check $arch '^decode_.*_(q4k|q8_0)_' 'IDP[.]4A' 'dp4a'
    mma='(prefill|few)_(gate_up|down)_(f16|bf16|q4k_.*|q8_0_.*)(_16|_32|_64)?'
    check $arch "^($mma|decode_(gate_up|down)_(f16|bf16)_8)\$" 'HMMA[.]16816' 'products on tensor cores'
    check $arch "^$mma\$" 'LDSM' 'ldmatrix'
    check $arch '^(prefill|few_gate_up|few_down)_' 'LDGSTS[.A-Z0-9]*[.]128' 'asynchronous copies of 16 bytes'
    check $arch '^prefill_.*_(q4k|q8_0)_' 'LDG[.A-Z0-9]*[.]128' 'loads of 16 bytes'
done

! grep -i 'wgmma.*serialized' "$work/sm_90a.log" || fail "sm_90a: the compiler waits for each product of wgmma"
check sm_90a '_wgmma128$' 'HGMMA[.]64x128x16' 'asynchronous products on tensor cores'
check sm_90a '_wgmma256$' 'HGMMA[.]64x256x16' 'asynchronous products on tensor cores'
check sm_90a '_wgmma' 'FENCE[.]VIEW[.]ASYNC' 'fences between copies and products'
