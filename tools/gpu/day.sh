#!/usr/bin/env bash
# Prove varl on this machine's GPU, in five parts of ten minutes together, without a network:
#
#   tools/gpu/day.sh [--only N] [--rehearse] [--out FOLDER] [--python PYTHON]
#
# Each part runs in its own process under a time limit and writes its result at once; one that fails costs the others
# nothing. FOLDER (by default runs/gpu-day) then holds at most 8 files, of which day.md is the table of the day.
# --only N repeats one part into the same folder. --rehearse runs all of it on the CPU at tiny sizes, cut off from the
# network and with twice the time (by default into runs/gpu-rehearsal). The exit status is 0 only if every part that ran
# passed.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
given=("$@")
python=python3 out='' only='' device=cuda small='' hook=''

refuse() {
    echo "day.sh: $*" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --rehearse) device=cpu small=--small ;;
        --only | --out | --python)
            [[ -n ${2:-} ]] || refuse "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        -h | --help)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) refuse "$1 is not known; see --help" ;;
    esac
    shift
done

[[ -z $only || $only =~ ^[0-9]+$ ]] || refuse "--only must be the number of a part, got $only"
command -v -- "$python" >/dev/null || refuse "--python must be Python 3.11 or newer, and there is no $python"
[[ $python != */* ]] || python=$(cd -- "$(dirname -- "$python")" && pwd)/${python##*/}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || refuse "--python must be Python 3.11 or newer, got $python"
if [[ -z $out ]]; then
    out=$root/runs/gpu-day
    [[ $device == cuda ]] || out=$root/runs/gpu-rehearsal
fi
mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)
log=$out/day.log

# A rehearsal starts itself again where only this machine can be reached.
if [[ $device == cpu && -z ${VARL_NO_NETWORK:-} ]]; then
    for way in "unshare -n" "unshare -rn"; do
        # shellcheck disable=SC2086  # two words
        if $way true 2>/dev/null; then
            VARL_NO_NETWORK=$way exec $way bash "$root/tools/gpu/day.sh" "${given[@]}"
        fi
    done
    export VARL_NO_NETWORK="a hook in Python, which sees no other sockets (unshare is not permitted)"
    hook=$root/tools/gpu/no_network:
fi

# What the parts see: the installed wheels (tools/gpu/install.py), the package, and the repository.
export PYTHONPATH=$hook$root/tools/gpu/.site:$root/src:$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

cd -- "$root"

parts=$("$python" -m tools.gpu.parts list ${small:+"$small"})
if [[ -n $only ]]; then
    parts=$(grep "^$only " <<<"$parts") || refuse "--only must be the number of a part, got $only"
else
    "$python" -m tools.gpu.parts clear --out "$out"
fi

# All output goes through one reader, which ends at the mark: a process that outlives its part cannot hold it open.
mark="end of the day $$"
stamp() {
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line != "$mark" ]] || return 0
        printf '%(%H:%M:%S)T %s\n' -1 "$line"
    done
}
exec 3> >(trap '' INT TERM; stamp | tee -a "$log")
reader=$!
say() {
    printf '%s\n' "$*" >&3
}

summary=() status=0 child='' number='' began=0
run_part() { # number, limit in seconds
    local code=0 install=''
    number=$1 began=$SECONDS
    [[ $number != 1 && -z $only ]] || install=--install
    say "part $number begins; it has $2 s"
    timeout -k 5 "$2" "$python" -m tools.gpu.parts run "$number" --device "$device" --out "$out" \
        ${small:+"$small"} ${install:+"$install"} >&3 2>&1 &
    child=$!
    wait "$child" || code=$?
    child=''
    end_part "$code"
}
end_part() { # exit status
    local line
    line=$("$python" -m tools.gpu.report "$out" --part "$number" --code "$1" --seconds "$((SECONDS - began))" 2>&1) ||
        status=1
    [[ $1 == 0 ]] || status=1
    summary+=("$line")
    say "$line"
}
finish() {
    say "the day, part by part:"
    say "$(printf '%s\n' "${summary[@]}")"
    say "the results are in $out; the table is day.md"
    say "$mark"
    exec 3>&-
    wait "$reader" || true
}
# shellcheck disable=SC2317  # called by a trap
stop() {
    trap '' INT TERM
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" || true
        end_part 130
    fi
    finish
    exit 130
}
trap stop INT TERM

say "$(date '+%Y-%m-%d'): device $device, python $python, results in $out"
if [[ $device == cpu ]]; then
    say "rehearsal; the network is cut off by ${VARL_NO_NETWORK:-}"
    "$python" -m tools.gpu.network >&3 2>&1 || { status=1; parts=''; say "nothing is run"; }
fi
[[ -n $only ]] || "$python" -m tools.gpu.report "$out"
while read -r number limit; do
    [[ -z $number ]] || run_part "$number" "$limit" </dev/null
done <<<"$parts"
finish
exit "$status"
