#!/usr/bin/env bash
# The instance's NVMe disks as one file system at /mnt/scratch (SCRATCH names another folder), for run.scratch or run.node_cache. As root:
#
#   sudo infra/mount_scratch.sh
#
# infra/aws.yaml has the same text as the user data of its workers. What is on the disks is lost with the instance, as p48ray expects it. Run
# again, it does nothing. Without such disks the folder lies on the root disk. MODEL: of the disks, as lsblk shows it (other clouds).
set -euo pipefail

folder=${SCRATCH:-/mnt/scratch}
model=${MODEL:-Instance Storage}

mkdir -p "$folder"
if ! mountpoint -q "$folder"; then
  mapfile -t disks < <(lsblk --nodeps --noheadings --paths --output NAME,MODEL | grep -F "$model" | cut -d ' ' -f 1)
  device=${disks[0]:-}
  if (( ${#disks[@]} > 1 )); then
    device=/dev/md/scratch
    mdadm --create "$device" --run --level=0 --raid-devices=${#disks[@]} "${disks[@]}"
  fi
  if [[ -n $device ]]; then
    mkfs.xfs -q -f -K "$device"
    mount -o noatime "$device" "$folder"
  else
    echo "no disks of model '$model': $folder lies on the root disk" >&2
  fi
fi
chmod 1777 "$folder"      # the container's user is not root
