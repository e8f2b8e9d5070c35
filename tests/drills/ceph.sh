#!/bin/bash
# Ceph object gateway of one node, on loopback, with all data in FOLDER: a monitor, a manager, an OSD and a gateway.
#
#   apt-get install --no-install-recommends ceph-common ceph-mon ceph-mgr ceph-osd radosgw
#   tests/drills/ceph.sh start FOLDER    # prints the variables by which clients find it
#   tests/drills/ceph.sh stop FOLDER
set -euo pipefail
verb=${1:?start or stop} folder=$(realpath -m "${2:?a folder}")
conf=$folder/ceph.conf

stop() {
    for file in "$folder"/*.pid; do
        [ -e "$file" ] || continue
        kill "$(cat "$file")" 2>/dev/null || true
        rm "$file"
    done
}

if [ "$verb" = stop ]; then
    stop
    exit
fi

mkdir -p "$folder"/{mon,mgr,osd,rgw,run}
read -r mon mgr rgw < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in held))')
fsid=$(cat /proc/sys/kernel/random/uuid)
cat >"$conf" <<END
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:$mon]
public_network = 127.0.0.0/8
cluster_network = 127.0.0.0/8
public_addr = 127.0.0.1
ms_bind_ipv4 = true
ms_bind_ipv6 = false
ms_bind_msgr1 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = $folder/keyring
run_dir = $folder/run
admin_socket = $folder/run/\$name.\$pid.asok
pid_file = $folder/\$name.pid
log_file = $folder/\$name.log
log_to_stderr = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_crit = 1
mgr_initial_modules =
[mon.a]
mon_data = $folder/mon
[mgr.a]
mgr_data = $folder/mgr
[osd.0]
osd_data = $folder/osd
osd_objectstore = bluestore
bluestore_block_size = 10737418240
osd_memory_target = 939524096
osd_class_dir = $(dirname "$(find /usr/lib -name libcls_rgw.so -print -quit)")
[client.rgw.a]
rgw_data = $folder/rgw
rgw_frontends = beast endpoint=127.0.0.1:$rgw
rgw_dns_name = localhost
rgw_enable_apis = s3, s3website, swift, swift_auth, admin, sts, iam
END
trap 'echo "see the logs in $folder" >&2; stop' ERR
c() { ceph --conf "$conf" --name client.admin "$@"; }

ceph-authtool --create-keyring "$folder/keyring" --gen-key --name mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$folder/keyring" --gen-key --name client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
ceph-authtool "$folder/keyring" --gen-key --name mgr.a --cap mon 'allow profile mgr' --cap osd 'allow *' >/dev/null
ceph-authtool "$folder/keyring" --gen-key --name osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd' >/dev/null
ceph-authtool "$folder/keyring" --gen-key --name client.rgw.a --cap mon 'allow rw' --cap osd 'allow rwx' >/dev/null
monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$mon]" "$folder/monmap" >/dev/null
ceph-mon --conf "$conf" --id a --mkfs --monmap "$folder/monmap" --keyring "$folder/keyring"
ceph-mon --conf "$conf" --id a
for name in mgr.a osd.0 client.rgw.a; do
    c auth import -i "$folder/keyring" 2>/dev/null && break
done
ceph-mgr --conf "$conf" --id a
ceph-osd --conf "$conf" --id 0 --mkfs --osd-uuid "$(cat /proc/sys/kernel/random/uuid)" >/dev/null 2>&1
c osd new "$(cat "$folder/osd/fsid")" 0 >/dev/null
ceph-osd --conf "$conf" --id 0
c osd crush add osd.0 1 root=default host=localhost 2>/dev/null
radosgw --conf "$conf" --name client.rgw.a

key=$(head -c 10 /dev/urandom | od -An -tx1 | tr -d ' \n') secret=$(head -c 20 /dev/urandom | od -An -tx1 | tr -d ' \n')
radosgw-admin --conf "$conf" --name client.rgw.a user create --uid=drill --display-name=drill --access-key="$key" --secret="$secret" >/dev/null
for _ in $(seq 120); do
    python3 -c "import socket; socket.create_connection(('127.0.0.1', $rgw))" 2>/dev/null && break
    sleep 0.5
done
cat <<END
export AWS_ENDPOINT_URL_S3=http://127.0.0.1:$rgw
export AWS_ACCESS_KEY_ID=$key
export AWS_SECRET_ACCESS_KEY=$secret
export AWS_DEFAULT_REGION=us-east-1
END
