#!/bin/bash
# Measurements on this machine's own kernel: the NBD front end beside qemu-storage-daemon's
# quorum over files of the same kind, the same with one copy behind the network, and the mirrors of
# 12 TiB.
#
# Usage: benches/native/bench.sh [quorum] [sums] [peer] [link] [scrub] [budget] [big]      default: all
#
# Results go to benches/out/raw. The files lie in memory where it is big enough and takes direct
# I/O, so that the programs are measured and not the disk below; where it is not, they lie under
# BENCH_DIR (default .cache/bench). They are removed at the end. Our release binaries have to be
# there. `big` without BENCH_BIG_FILL=no writes into every extent of 12 TiB, which takes minutes.
set -euo pipefail

project=$(cd "$(dirname "$0")/../.." && pwd)
out=$project/benches/out/raw
binaries=${UBLK_MIRROR_BIN:-${CARGO_TARGET_DIR:-$project/target}/release}
on_disk=${BENCH_DIR:-$project/.cache/bench}/$$
in_memory=$on_disk.memory
area=$on_disk
export UBLK_MIRROR_RUN_DIR=$area/run UBLK_MIRROR_SCRUB_DAYS=0 PATH=$binaries:$PATH
place=native
rounds=${BENCH_ROUNDS:-3} runtime=${BENCH_RUNTIME:-6}
storage_daemon=
server=
CREATE=()
mkdir -p "$out" "$area"

stop_everything() {
    set +e
    local name
    for name in bench big budget sums no-sums peer; do
        [ -e "$UBLK_MIRROR_RUN_DIR/$name.sock" ] && timeout 30 mirrorctl stop $name --force
    done
    [ -n "$storage_daemon" ] && kill "$storage_daemon" 2>/dev/null
    [ -n "$server" ] && kill "$server" 2>/dev/null && wait "$server"
    mountpoint -q "$in_memory" && umount "$in_memory"
    rm -rf "$on_disk" "$in_memory"
}
trap stop_everything EXIT
trap 'exit 130' INT TERM

# choose_area GIB : sets area to a file system in memory with this much room, or to one on disk.
choose_area() {
    area=$on_disk
    if [ -z "${BENCH_DIR:-}" ] && [ "$(id -u)" -eq 0 ] &&
        [ "$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)" -gt "$1" ]; then
        mkdir -p "$in_memory"
        mountpoint -q "$in_memory" && umount "$in_memory"
        if mount -t tmpfs -o size="$1g" tmpfs "$in_memory" &&
            dd if=/dev/zero of="$in_memory/probe" bs=4k count=1 oflag=direct status=none; then
            area=$in_memory
        fi
    fi
    echo "files of the following are $([ "$area" = "$on_disk" ] && echo on disk || echo in memory)"
}

status_of() {
    mirrorctl status "$1" --json | python3 -ISc '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    value = value[int(key)] if isinstance(value, list) else value[key]
print(value)' "$2"
}

result() {
    local name=$1
    shift
    python3 -ISc '
import json, sys
pairs = sys.argv[2:]
values = {pairs[i]: float(pairs[i + 1]) for i in range(0, len(pairs), 2)}
json.dump(values, open(sys.argv[1], "w"))' "$out/${place}__$name.result.json" "$@"
    echo "$place $name: $*"
}

now_ms() { date +%s%3N; }

# measure SUBJECT JOB ROUND URI FIO_OPTIONS...
measure() {
    local subject=$1 job=$2 round=$3 uri=$4
    shift 4
    fio --name="$job" --ioengine=nbd --uri="$uri" --eta=never --randrepeat=1 --norandommap \
        --output-format=json --output="$area/fio.json" "$@"
    cp "$area/fio.json" "$out/${place}__${subject}__${job}__$round.json"
    echo "$place $subject $job round $round: $(python3 -ISc '
import json, sys
job = json.load(open(sys.argv[1]))["jobs"][0]
iops = [job[way]["iops"] for way in ("read", "write")]
print(f"{max(iops):.0f} IOPS")' "$area/fio.json")"
}

fill() {
    fio --name=fill --ioengine=nbd --uri="$1" --rw=write --bs=1m --iodepth=4 --size="$2m" \
        --eta=never --output="$area/fill.log"
}

four_jobs() {
    local subject=$1 round=$2 uri=$3
    local timed=(--time_based --runtime="$runtime" --size=1g)
    measure "$subject" randwrite-4k-qd1 "$round" "$uri" --rw=randwrite --bs=4k --iodepth=1 "${timed[@]}"
    measure "$subject" randwrite-4k-qd32 "$round" "$uri" --rw=randwrite --bs=4k --iodepth=32 "${timed[@]}"
    measure "$subject" randread-4k-qd32 "$round" "$uri" --rw=randread --bs=4k --iodepth=32 "${timed[@]}"
    measure "$subject" seqwrite-128k-qd8 "$round" "$uri" --rw=write --bs=128k --iodepth=8 "${timed[@]}"
}

start_quorum() {
    local side options=()
    for side in 0 1; do
        rm -f "$area/q$side"
        truncate -s 1100M "$area/q$side"
        options+=(--blockdev "driver=file,node-name=f$side,filename=$area/q$side,cache.direct=on,aio=io_uring")
    done
    quorum_of "${options[@]}"
}

# quorum_of OPTIONS... : a mirror of the nodes f0 and f1, which the options make; sets URI.
quorum_of() {
    local socket=$area/quorum.sock
    rm -f "$socket"
    qemu-storage-daemon "$@" \
        --blockdev driver=quorum,node-name=q,vote-threshold=2,read-pattern=fifo,children.0=f0,children.1=f1 \
        --nbd-server addr.type=unix,addr.path="$socket" \
        --export type=nbd,id=e,node-name=q,name=q,writable=on &
    storage_daemon=$!
    while [ ! -S "$socket" ]; do
        kill -0 $storage_daemon
        sleep 0.05
    done
    URI="nbd+unix:///q?socket=$socket"
}

stop_quorum() {
    kill "$storage_daemon"
    wait "$storage_daemon" || true
    storage_daemon=
}

# start_mirror NAME SIZE START_OPTIONS... : creates over two new sparse files, with the options
# in CREATE; sets URI.
start_mirror() {
    local name=$1 size=$2
    shift 2
    rm -f "$area/m0" "$area/m1"
    mirrorctl create "$name" "${CREATE[@]}" --member "$area/m0" --member "$area/m1" --size "$size"
    mirrorctl start "$name" "$area/m0" "$area/m1" --front nbd "$@"
    URI=$(status_of "$name" device)
}

bench_quorum() {
    local round
    choose_area 5
    rm -f "$out/${place}__"{mirror,mirror-no-intent,mirror-no-sums,quorum}__*
    for round in $(seq "$rounds"); do
        start_quorum
        fill "$URI" 1024
        four_jobs quorum "$round" "$URI"
        stop_quorum
        start_mirror bench 1100M
        fill "$URI" 1024
        four_jobs mirror "$round" "$URI"
        mirrorctl stop bench
        start_mirror bench 1100M --no-intent-unsafe-for-benchmarks
        fill "$URI" 1024
        four_jobs mirror-no-intent "$round" "$URI"
        mirrorctl stop bench
        CREATE=(--no-checksums)
        start_mirror bench 1100M
        CREATE=()
        fill "$URI" 1024
        four_jobs mirror-no-sums "$round" "$URI"
        mirrorctl stop bench
    done
    rm -f "$area"/q? "$area"/m?
}

# What checksums cost: two mirrors, one with and one without, in turn and in short slices, so that
# whatever else the machine does strikes both.
bench_sums() {
    local round subject side uris=() uri
    local timed=(--time_based --runtime=2 --size=1g)
    choose_area 6
    rm -f "$out/${place}__"paired*
    for subject in sums no-sums; do
        CREATE=()
        [ $subject = no-sums ] && CREATE=(--no-checksums)
        for side in 0 1; do rm -f "$area/$subject$side"; done
        mirrorctl create $subject "${CREATE[@]}" --member "$area/${subject}0" \
            --member "$area/${subject}1" --size 1100M
        mirrorctl start $subject "$area/${subject}0" "$area/${subject}1" --front nbd
        uri=$(status_of $subject device)
        fill "$uri" 1024
        uris+=("$uri")
    done
    CREATE=()
    for round in $(seq $((rounds * 5))); do
        for side in 0 1; do
            subject=paired-mirror
            [ $side = 1 ] && subject=paired-mirror-no-sums
            measure $subject randwrite-4k-qd32 "$round" "${uris[$side]}" --rw=randwrite --bs=4k \
                --iodepth=32 "${timed[@]}"
            measure $subject seqwrite-128k-qd8 "$round" "${uris[$side]}" --rw=write --bs=128k \
                --iodepth=8 "${timed[@]}"
        done
    done
    for subject in sums no-sums; do
        mirrorctl stop $subject
        rm -f "$area/$subject"?
    done
}

# serve COMMAND... : runs a server of the file p1 until stop_server; sets PORT for it before.
serve() {
    "$@" &
    server=$!
    while ! (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do
        kill -0 $server
        sleep 0.05
    done
}

stop_server() {
    kill "$server"
    wait "$server" || true
    server=
}

free_port() {
    PORT=$(python3 -ISc '
import socket
probe = socket.socket()
probe.bind(("127.0.0.1", 0))
print(probe.getsockname()[1])')
}

# start_peer ADDRESS : a mirror over the file p0 and this export of the file p1; sets URI.
start_peer() {
    rm -f "$area/p0"
    mirrorctl create peer --member "$area/p0" --member "$1" --size 1100M
    mirrorctl start peer "$area/p0" "$1" --front nbd
    URI=$(status_of peer device)
}

# new_disk : an empty file p1 to export.
new_disk() {
    rm -f "$area/p1"
    truncate -s 1200M "$area/p1"
}

# full_resync : of a new disk in the place of the mirror's second one, and stops the mirror; sets TOOK,
# in ms.
full_resync() {
    local began
    mirrorctl fail peer 1
    mirrorctl remove peer 1
    stop_server
    new_disk && free_port
    serve mirrorctl export "$area/p1" --listen "127.0.0.1:$PORT" --name data
    began=$(now_ms)
    mirrorctl add peer "nbd://127.0.0.1:$PORT/data"
    mirrorctl wait peer
    TOOK=$(($(now_ms) - began))
    [ "$(status_of peer state)" = in-sync ]
    mirrorctl stop peer
    stop_server
}

# nbdcopy_of MIB : to a new disk behind the same server; sets TOOK, in ms.
nbdcopy_of() {
    local began
    new_disk && free_port
    serve mirrorctl export "$area/p1" --listen "127.0.0.1:$PORT" --name data --any-writer
    rm -f "$area/p2"
    dd if=/dev/urandom of="$area/p2" bs=1M count="$1" status=none
    began=$(now_ms)
    nbdcopy --flush "$area/p2" "nbd://127.0.0.1:$PORT/data"
    TOOK=$(($(now_ms) - began))
    stop_server
}

# The resync beside nbdcopy where the network is what limits both: the loopback of a network namespace
# of its own, at 1 Gbit/s.
bench_link() {
    local round place=native-link mib=512 resync=() copy=()
    if [ -z "${BENCH_IN_NAMESPACE:-}" ]; then
        local name=ublk-mirror-bench-$$
        if ! ip netns add "$name"; then
            echo "no network namespace is to be had here: the figure of a link stays empty"
            return
        fi
        BENCH_IN_NAMESPACE=yes ip netns exec "$name" "$0" link || { ip netns delete "$name" && return 1; }
        ip netns delete "$name"
        return
    fi
    ip link set lo up
    tc qdisc add dev lo root tbf rate 1gbit burst 256kb latency 50ms
    choose_area 4
    rm -f "$out/${place}__"*
    for round in $(seq "$rounds"); do
        new_disk && free_port
        serve mirrorctl export "$area/p1" --listen "127.0.0.1:$PORT" --name data
        start_peer "nbd://127.0.0.1:$PORT/data"
        fill "$URI" "$mib"
        full_resync && resync+=("$TOOK")
        nbdcopy_of "$mib" && copy+=("$TOOK")
        rm -f "$area"/p?
    done
    result resync mib "$mib" resync_ms "$(median "${resync[@]}")" nbdcopy_ms "$(median "${copy[@]}")"
}

# One copy here and one behind TCP on the loopback, in turn with qemu's quorum over the same, and
# with TLS; and a full resync beside nbdcopy to the same server.
bench_peer() {
    local round place=native-peer tls=$area/tls resync=() copy=()
    choose_area 5
    rm -f "$out/${place}__"*
    "$project/scripts/certificates.sh" "$tls" 127.0.0.1
    for round in $(seq "$rounds"); do
        new_disk && free_port
        serve qemu-nbd -t -f raw --cache=none --aio=io_uring -x q -b 127.0.0.1 -p "$PORT" "$area/p1"
        start_quorum_with_peer
        fill "$URI" 1024
        four_jobs quorum "$round" "$URI"
        stop_quorum
        stop_server

        new_disk && free_port
        serve mirrorctl export "$area/p1" --listen "127.0.0.1:$PORT" --name data --tls "$tls"
        start_peer "nbds://127.0.0.1:$PORT/data?tls-certificates=$tls"
        fill "$URI" 1024
        four_jobs mirror-tls "$round" "$URI"
        mirrorctl stop peer
        stop_server

        new_disk && free_port
        serve mirrorctl export "$area/p1" --listen "127.0.0.1:$PORT" --name data
        start_peer "nbd://127.0.0.1:$PORT/data"
        fill "$URI" 1024
        four_jobs mirror "$round" "$URI"
        full_resync && resync+=("$TOOK")
        nbdcopy_of 1024 && copy+=("$TOOK")
        rm -f "$area"/p?
    done
    result resync mib 1024 resync_ms "$(median "${resync[@]}")" nbdcopy_ms "$(median "${copy[@]}")"
    rm -rf "$tls"
}

# start_quorum_with_peer : over the file q0 and what qemu-nbd serves at PORT; sets URI.
start_quorum_with_peer() {
    rm -f "$area/q0"
    truncate -s 1200M "$area/q0"
    quorum_of \
        --blockdev "driver=file,node-name=f0,filename=$area/q0,cache.direct=on,aio=io_uring" \
        --blockdev "driver=nbd,node-name=f1,server.type=inet,server.host=127.0.0.1,server.port=$PORT,export=q"
}

scrub_is_over() {
    [ "$(mirrorctl scrub status bench --json | python3 -ISc '
import json, sys
status = json.load(sys.stdin)
print(status["totals"]["passes"])')" -gt "$1" ]
}

# sweep_once : a pass over everything; sets MS, what it took.
sweep_once() {
    local before began
    before=$(mirrorctl scrub status bench --json |
        python3 -ISc 'import json, sys; print(json.load(sys.stdin)["totals"]["passes"])')
    began=$(now_ms)
    mirrorctl scrub start bench
    while ! scrub_is_over "$before"; do sleep 0.05; done
    MS=$(($(now_ms) - began))
}

# read_members MIB : both members read from begin to end, side by side; sets MS.
read_members() {
    local began
    began=$(now_ms)
    fio --name=members --filename="$area/m0:$area/m1" --file_service_type=roundrobin --rw=read \
        --bs=1m --iodepth=16 --direct=1 --ioengine=io_uring --filesize="$1m" --size="$((2 * $1))m" \
        --eta=never --output="$area/members.log"
    MS=$(($(now_ms) - began))
}

# How fast an idle mirror is swept, beside the same thread reading both members, over files on a
# disk and in memory; and what a scrub costs the requests of an application.
bench_scrub() {
    local round where mib members sweep
    rm -f "$out/${place}__"{sweep,scrubbed}*
    for where in disk memory; do
        # Long enough that starting the commands does not count.
        area=$on_disk mib=4096
        if [ $where = memory ]; then choose_area 6 && mib=2048; fi
        start_mirror bench $((mib + 64))M
        fill "$URI" $mib
        # All of it cool.
        mirrorctl stop bench
        mirrorctl start bench "$area/m0" "$area/m1" --front nbd
        URI=$(status_of bench device)
        members=() sweep=()
        for round in $(seq "$rounds"); do
            sleep 2
            read_members $mib && members+=("$MS")
            sweep_once && sweep+=("$MS")
        done
        result "sweep-$where" mib $mib members_ms "$(median "${members[@]}")" sweep_ms "$(median "${sweep[@]}")"
        [ $where = disk ] || bench_foreground $mib
        mirrorctl stop bench
        rm -f "$area/m0" "$area/m1"
    done
}

median() { printf '%s\n' "$@" | sort -n | sed -n "$((($# + 1) / 2))p"; }

# member_bytes : what scrubs have read from members so far.
member_bytes() {
    mirrorctl scrub status bench --json | python3 -ISc '
import json, sys
status = json.load(sys.stdin)
print(status["totals"]["member-bytes"] + ((status.get("pass") or {}).get("member-bytes") or 0))'
}

# Seven parts reads and three parts writes at half of what it can do, without a scrub and with one.
# They go to the first half: the other one cools, and there the scrub has something to read.
bench_foreground() {
    local round rate before scrubbed=()
    local mixed=(--rw=randrw --rwmixread=70 --bs=4k --iodepth=8 --size="$(($1 / 2))m" --time_based)
    measure scrubbed-probe mixed-4k 0 "$URI" "${mixed[@]}" --runtime=5
    rate=$(python3 -ISc '
import json, sys
text = open(sys.argv[1]).read()
job = json.loads(text[text.index("{"):])["jobs"][0]
print(int((job["read"]["iops"] + job["write"]["iops"]) / 2))' "$area/fio.json")
    rm -f "$out/${place}__scrubbed-probe"*
    for round in $(seq $((rounds * 2))); do
        measure scrubbed-not mixed-4k "$round" "$URI" "${mixed[@]}" --runtime=30 \
            --rate_iops=$((rate * 7 / 10)),$((rate * 3 / 10))
        mirrorctl scrub start bench
        before=$(member_bytes)
        measure scrubbed mixed-4k "$round" "$URI" "${mixed[@]}" --runtime=30 \
            --rate_iops=$((rate * 7 / 10)),$((rate * 3 / 10))
        scrubbed+=($((($(member_bytes) - before) / 1048576)))
        mirrorctl scrub cancel bench || true
        if [ "${scrubbed[-1]}" -eq 0 ]; then
            echo "the scrub read nothing: this measures nothing" >&2
            exit 1
        fi
    done
    result scrubbed-work mib "$(median "${scrubbed[@]}")"
}

# Uniform random writes over a hundred times the budget of hot extents, on written extents. Enough
# of them that one cools before it is written again, so that nearly every write has to record its
# intent. How many were hot at the end is kept beside the figure. A number of writes rather than a
# time, because each takes new room in both files.
bench_budget() {
    local round subject options budget=4096 extents=409600
    choose_area 14
    rm -f "$out/${place}__budget"*
    for round in $(seq "$rounds"); do
        # What the intent costs, without checksums, which are kept for it; and both together.
        for subject in budget-mirror budget-mirror-no-intent budget-sums; do
            options=(--hot-budget $budget)
            CREATE=()
            [ $subject = budget-sums ] || CREATE=(--no-checksums)
            [ $subject = budget-mirror-no-intent ] && options+=(--no-intent-unsafe-for-benchmarks)
            start_mirror budget $((extents * 4))M "${options[@]}"
            touch_extents $extents 0
            measure $subject uniform-randwrite-4k-qd32 "$round" "$URI" --rw=randwrite --bs=4k \
                --iodepth=32 --size=$((extents * 4))m --number_ios=500000
            result "$subject-state" hot "$(status_of budget extents.hot)" budget $budget \
                map_commits "$(status_of budget io.map-commits)" \
                writes "$(status_of budget io.writes)"
            mirrorctl stop budget
            rm -f "$area/m0" "$area/m1"
        done
    done
    CREATE=()
}

# touch_extents COUNT FIRST : one 4 KiB write into each of these extents.
touch_extents() {
    fio --name=touch --ioengine=nbd --uri="$URI" --rw=write:4092k --bs=4k --iodepth=64 \
        --offset=$(($2 * 4))m --io_size=$(($1 * 4096)) --size=$(($1 * 4))m --eta=never \
        --output="$area/touch.log"
}

one_write() {
    fio --name=one --ioengine=nbd --uri="$URI" --rw=write --bs=4k --size=4k --end_fsync=1 \
        --eta=never --output="$area/one.log"
}

# Twelve TiB in sparse files: creation until it takes I/O and is redundant, and, with all extents
# written, the start after a clean stop.
bench_big() {
    local began created answered tebibyte extents_a_tib=$((1 << 18)) offset sums_at sums_len
    # On ext4 each of these writes reserves about a MiB around it for a while: 12 TiB of them need
    # more room than most disks have. In memory a TiB takes 2 GiB, and as much again for checksums,
    # until that is punched out.
    choose_area 12
    rm -f "$out/${place}__big"*
    began=$(now_ms)
    mirrorctl create big --member "$area/m0" --member "$area/m1" --size 12T
    created=$(now_ms)
    mirrorctl start big "$area/m0" "$area/m1" --front nbd
    URI=$(status_of big device)
    [ "$(status_of big state)" = in-sync ]
    one_write
    answered=$(now_ms)
    result big-create create_ms $((created - began)) ms $((answered - began))
    if [ "${BENCH_BIG_FILL:-yes}" = yes ]; then
        read -r offset sums_at sums_len < <(mirrorctl examine "$area/m0" --json | python3 -ISc '
import json, sys
member = json.load(sys.stdin)
sums = next(region for region in member["regions"] if region["kind"] == "checksums")
print(member["data-offset"], sums["copy-a"], sums["len"])')
        for tebibyte in $(seq 0 11); do
            # The last extent of all is left out: the superblock may round the size down.
            touch_extents $((extents_a_tib - (tebibyte == 11))) $((tebibyte * extents_a_tib))
            # The content does not matter here, nor its checksums: give their room on the disk back,
            # on both alike.
            for member in "$area/m0" "$area/m1"; do
                fallocate --punch-hole --offset $((offset + (tebibyte << 40))) --length $((1 << 40)) "$member"
                fallocate --punch-hole --offset "$sums_at" --length "$sums_len" "$member"
            done
            echo "written into every extent of $((tebibyte + 1)) TiB"
        done
    fi
    local written stopped
    written=$(($(status_of big extents.hot) + $(status_of big extents.cool)))
    began=$(now_ms)
    mirrorctl stop big
    stopped=$(now_ms)
    mirrorctl start big "$area/m0" "$area/m1" --front nbd
    URI=$(status_of big device)
    one_write
    answered=$(now_ms)
    result big-start written_extents "$written" stop_ms $((stopped - began)) ms $((answered - stopped))
    mirrorctl stop big
    rm -f "$area/m0" "$area/m1"
}

parts=("$@")
[ $# -gt 0 ] || parts=(quorum sums peer link scrub budget big)
for part in "${parts[@]}"; do
    "bench_$part"
done
