#!/bin/bash
# Makes an authority, and certificates that it has signed, for peers over TLS.
#
# Usage: scripts/certificates.sh FOLDER SERVER [CLIENT]
#
# SERVER and CLIENT are the names in the certificates: host names or addresses, several with commas
# between them; the client's is `client` unless given. FOLDER gets the files that
# `mirrorctl export --tls FOLDER` and `nbds://` look for (and qemu, nbdkit and libnbd as well).
# A folder that has an authority keeps it. ca-key.pem signs further certificates: keep it away from
# both hosts. The others belong on the hosts, each with ca-cert.pem.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    sed -n '/^# Usage/,/^set/{/^#/s/^# \?//p}' "$0" >&2
    exit 2
fi
folder=$1 server=$2 client=${3:-client}
command -v openssl >/dev/null || { echo "openssl is missing; install it" >&2; exit 1; }
mkdir -p "$folder"
cd "$folder"
umask 077
days=3650
key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)

# names LIST : as subjectAltName has them
names() {
    local name out=
    for name in ${1//,/ }; do
        case $name in
        *:* | [0-9]*.[0-9]*.[0-9]*.[0-9]*) out+=",IP:$name" ;;
        *) out+=",DNS:$name" ;;
        esac
    done
    echo "${out#,}"
}

# sign SIDE PURPOSE NAMES
sign() {
    openssl req "${key[@]}" -keyout "$1-key.pem" -out "$1.csr" -subj "/CN=ublk-mirror $1" \
        2>/dev/null
    openssl x509 -req -in "$1.csr" -CA ca-cert.pem -CAkey ca-key.pem -days "$days" \
        -set_serial "0x$(openssl rand -hex 16)" -out "$1-cert.pem" -extfile <(
            echo "subjectAltName=$(names "$3")"
            echo "extendedKeyUsage=$2"
            echo "basicConstraints=critical,CA:FALSE"
            echo "keyUsage=critical,digitalSignature,keyEncipherment"
        ) 2>/dev/null
    rm "$1.csr"
}

if ! [ -e ca-key.pem ]; then
    openssl req -x509 "${key[@]}" -keyout ca-key.pem -out ca-cert.pem -days "$days" \
        -subj "/CN=ublk-mirror authority" -addext "keyUsage=critical,keyCertSign" 2>/dev/null
fi
sign server serverAuth "$server"
sign client clientAuth "$client"
chmod 644 ./*-cert.pem
