# SQLite on ext4 on the mirror loses a member in the middle of its transactions and gets it back.
. "$(dirname "$0")/lib.sh"

nullb m0 192
nullb m1 192
make_mirror db /dev/m0 /dev/m1
modprobe ext4
mkfs.ext4 -q -F "$DEV"
mkdir -p "$WORK/mnt"
mount "$DEV" "$WORK/mnt"
sqlite3 "$WORK/mnt/db" "pragma journal_mode=wal; create table t(id integer primary key, v blob, h text);"

# Each row is a transaction of its own; its number is noted once it has been committed.
(
    for round in $(seq 1 60); do
        {
            echo "pragma synchronous=full;"
            for row in $(seq 1 5); do
                echo "insert into t(v) values (randomblob($((500 + row * 700))));"
            done
            echo "update t set h = hex(substr(v, 1, 8));"
        } | sqlite3 "$WORK/mnt/db"
        echo $((round * 5)) >"$WORK/committed"
    done
) &
writer=$!
committed() { [ "$(cat "$WORK/committed" 2>/dev/null || echo 0)" -ge "$1" ]; }
wait_for 600 committed 50
pull db 0
wait_for 600 committed 120
mirrorctl re-add db /dev/m0
mirrorctl wait db --timeout 60
# Now the other one: everything must be on the member that was away.
pull db 1
wait $writer || fail "the database saw an error"
[ "$(sqlite3 "$WORK/mnt/db" 'pragma integrity_check')" = ok ] || fail "the database is damaged"
[ "$(sqlite3 "$WORK/mnt/db" 'select count(*) from t')" -eq 300 ] || fail "rows are missing"
[ "$(sqlite3 "$WORK/mnt/db" 'select count(*) from t where h <> hex(substr(v,1,8))')" -eq 0 ] ||
    fail "rows are wrong"
umount "$WORK/mnt"
e2fsck -f -n "$DEV"
mirrorctl re-add db /dev/m1
mirrorctl wait db --timeout 60
mirrorctl stop db
compare_members /dev/m0 /dev/m1
