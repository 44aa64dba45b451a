#!/bin/bash
# From a clone to instance masks on two CPU workers: installs into .venv, serves, submits pictures, stops again.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
venv_install serve

out=out/quickstart
folder=$(mktemp -d) # the path of a socket has at most 107 bytes, which a clone's may exceed
endpoint=ipc://$folder/client.sock
python=.venv/bin/python
rm -rf "$out"
mkdir -p "$out"

echo "Starting the daemon on cpu:0 and cpu:1 with the demo model; its log is $out/daemon.log"
$python -m blendmaskd --devices cpu:0 cpu:1 --set model.config=configs/demo/demo.yaml \
  --set model.weights=configs/demo/model_final.pth --set "endpoints.clients=[$endpoint]" \
  --set endpoints.metrics=null --set "warm_up=[[256, 320]]" 2>$out/daemon.log &
daemon=$!
trap 'kill $daemon 2>/dev/null || true; wait $daemon 2>/dev/null || true; rm -rf "$folder"' EXIT

$python scripts/submit.py "$endpoint" configs/demo/images --out $out --score-threshold 0.5 --wait 120 --timeout 300 ||
  { tail -20 $out/daemon.log >&2; exit 1; }
sleep 2 # stats are taken once per second
$python scripts/stats.py "$endpoint"

echo "Draining and stopping the daemon"
workers=$(cat "/proc/$daemon/task/$daemon/children")
kill -TERM $daemon
wait $daemon
trap - EXIT
rm -rf "$folder"
for pid in $workers; do
  if kill -0 "$pid" 2>/dev/null; then echo "worker $pid was left behind" >&2; exit 1; fi
done
echo "Done: overlays and results.json are in $out. Next: docs/deployment.md, to NPUs, GPUs or a service of your own."
