# Swap on the mirror, a process that needs more memory than it may have, and a member that stops
# answering meanwhile for longer than the mirror's deadline: nothing hangs, nothing of the swapped
# memory is wrong, and the member is lost and comes back with a delta.
. "$(dirname "$0")/lib.sh"

deadline=3
stallable_members 128
mirrorctl create swap --member /dev/m0 --member "$STALLABLE"
cgroup daemon max
# With more requests under way all of the small cgroup's memory could be on its way out while the
# member stalls, and the kernel would kill for want of any that can be had.
run_in daemon mirrorctl start swap --front ublk --deadline $deadline --queue-depth 16
find_device swap
mkswap -q "$DEV"
swapon "$DEV"
[ "$(cat /proc/"$(status_of swap daemon-pid)"/oom_score_adj)" = -1000 ] ||
    fail "the daemon may be killed when memory is short"

# The process has twice as much memory as it may.
cgroup small 32M
run_in small python3 -IS "$GUEST_DIR/touch_memory.py" 64 "$WORK/rounds" >"$WORK/said" 2>&1 &
toucher=$!
rounds() {
    kill -0 $toucher || fail "the process has ended: $(cat "$WORK/said")"
    [ "$(stat -c %s "$WORK/rounds" 2>/dev/null || echo 0)" -ge "$1" ]
}
wait_for 600 rounds 1
[ "$(status_of swap io.written-bytes)" -gt $((32 << 20)) ] || fail "little was swapped out"

# The log of the daemon lies in memory, which can be swapped like any other: to the daemon's own
# device. Whoever writes to it then waits for that device, and a loss is something to write about.
# Without read-ahead, which could bring the log back by chance.
echo 0 >/proc/sys/vm/page-cluster
# Ends with an error because most of the daemon's memory is locked.
echo 256M swappiness=200 >"$WORK/cgroup/test-daemon/memory.reclaim" || true
[ "$(cat "$WORK/cgroup/test-daemon/memory.swap.current")" -gt 0 ] || fail "no log was swapped out"

stall
wait_for $(((deadline + 20) * 10)) status_is swap state degraded
expect_status swap members.1.state faulty
echo 3 >/proc/sys/vm/page-cluster
# It goes on while the member still hangs.
wait_for 900 rounds $(($(stat -c %s "$WORK/rounds") + 1))
end_stall
return_member swap
touch "$WORK/rounds.enough"
wait $toucher || { cat "$WORK/said"; fail "the process saw wrong memory or was killed"; }
cat "$WORK/said"
expect_status swap io.errors 0
swapoff "$DEV"
mirrorctl stop swap
compare_members /dev/m0 "$STALLABLE"
