# A file system on the mirror, a process that dirties pages much faster than they can be written in
# a cgroup with little memory, and a member that stops answering meanwhile for longer than the
# mirror's deadline: nothing hangs, nobody above sees an error, and the member comes back with a
# delta.
. "$(dirname "$0")/lib.sh"

deadline=3
stallable_members 128
make_mirror storm --deadline $deadline /dev/m0 "$STALLABLE"
modprobe ext4
mkfs.ext4 -q -F -E lazy_itable_init=0 "$DEV"
mkdir -p "$WORK/mnt"
mount "$DEV" "$WORK/mnt"

cgroup small 32M
# The same files again and again, past no cache; each round ends with a sync.
run_in small bash -c '
    set -e
    for round in $(seq 1 1000); do
        for file in 1 2; do
            openssl enc -aes-128-ctr -nosalt -pass "pass:$round.$file" -pbkdf2 -in /dev/zero \
                2>/dev/null | dd of="$1/mnt/file$file" bs=64k count=384 iflag=fullblock \
                conv=notrunc status=none
        done
        sync -f "$1/mnt"
        printf . >>"$1/rounds"
        echo "$round" >"$1/last"
        [ ! -e "$1/enough" ] || exit 0
    done' storm "$WORK" >"$WORK/said" 2>&1 &
storm=$!
rounds() {
    kill -0 $storm || fail "the writer has ended: $(cat "$WORK/said")"
    [ "$(stat -c %s "$WORK/rounds" 2>/dev/null || echo 0)" -ge "$1" ]
}
wait_for 600 rounds 1

stall
wait_for $(((deadline + 20) * 10)) status_is storm state degraded
expect_status storm members.1.state faulty
wait_for 900 rounds $(($(stat -c %s "$WORK/rounds") + 1))
end_stall
return_member storm
touch "$WORK/enough"
wait $storm || { cat "$WORK/said"; fail "the writer saw an error"; }
expect_status storm io.errors 0
umount "$WORK/mnt"
e2fsck -f -n "$DEV"
mount "$DEV" "$WORK/mnt"
for file in 1 2; do
    seeded "$(cat "$WORK/last").$file" 24 | cmp - "$WORK/mnt/file$file"
done
umount "$WORK/mnt"
mirrorctl stop storm
compare_members /dev/m0 "$STALLABLE"
