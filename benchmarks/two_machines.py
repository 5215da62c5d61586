"""Lose one of two machines, and see what a training ends with:

    sudo .venv/bin/python benchmarks/two_machines.py

The machines are two network namespaces with addresses of their own, joined by a virtual cable; their disk is the same, as a cluster's is.
Both are given the command of README.md for several machines. Once the training has written a checkpoint, the cable of the second machine is
pulled and everything on it killed; then the machine comes back and is given the same command. The weights are compared with those of the
same training undisturbed. Needs root (it makes network namespaces, whose traffic stays in them) and `ip` of iproute2; some minutes.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINES = {"recipes-a": "10.213.7.1", "recipes-b": "10.213.7.2"}
# README.md's command.
COMMAND = ("torchrun --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id dialogue --rdzv_endpoint {first}:29400 "
           "--rdzv_conf is_host={host} --local_addr {own} --max_restarts 3 scripts/train.py --recipe lora --data data/customer_service "
           "--save_strategy steps --save_steps 20 --resume_from_checkpoint")
# The first one, as torch 2.13 otherwise forgets to tell a machine that comes back where the others meet.
NEEDED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "cable"}
# A small training; flags on this script's command line take their place.
SMALL = ("--max_train_samples 32 --max_eval_samples 4 --max_length 96 --num_train_epochs 3 --per_device_train_batch_size 1 "
         "--eval_strategy no --save_total_limit 9 --disable_tqdm True")
WAIT = 600  # seconds that anything may take


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def up() -> None:
    """Two machines and the cable between them."""
    for name in MACHINES:
        ip("netns", "add", name)
    one, other = MACHINES
    ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
    for name, address in MACHINES.items():
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        plug(name, "up")
        ip("-n", name, "link", "set", "lo", "up")


def plug(name: str, state: str) -> None:
    ip("-n", name, "link", "set", "cable", state)


def down() -> None:
    """Remove what `up` made, and end what still runs there."""
    for name in MACHINES:
        kill_all(name)
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def kill_all(name: str) -> None:
    """Kill every process of a machine."""
    found = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True).stdout.split()
    for pid in map(int, found):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def launch(name: str, folder: Path, run: Path, flags: list[str]) -> subprocess.Popen:
    words = shlex.split(COMMAND.format(first=MACHINES["recipes-a"], own=MACHINES[name], host=int(name == "recipes-a")))
    words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    environment = os.environ | NEEDED | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    log = (folder / f"{run.name}-{name}.log").open("a")
    return subprocess.Popen(["ip", "netns", "exec", name, *words, "--output_dir", str(run), *flags], cwd=ROOT, stdout=log, stderr=log,
                            env=environment)


def until(what: str, happened, *processes: subprocess.Popen) -> None:
    """Wait until `happened()`. Ends the script where it takes too long or all processes ended first."""
    begun = time.monotonic()
    while not happened():
        if time.monotonic() - begun > WAIT or (processes and all(process.poll() is not None for process in processes)):
            sys.exit(f"error: waited in vain for {what}")
        time.sleep(0.2)


def main() -> None:
    if os.geteuid() or not shutil.which("ip"):
        sys.exit("error: network namespaces need root and the command `ip` (iproute2): use sudo")
    flags = sys.argv[1:] or shlex.split(SMALL)
    folder = Path(tempfile.mkdtemp(prefix="two-machines-"))
    print(f"logs and runs in {folder}")
    first, second = MACHINES
    try:
        up()
        whole, broken = folder / "undisturbed", folder / "disturbed"
        both = [launch(name, folder, whole, flags) for name in MACHINES]
        until("the undisturbed training", lambda: all(process.poll() is not None for process in both))
        begun = time.monotonic()
        one, other = (launch(name, folder, broken, flags) for name in MACHINES)
        until("a checkpoint", lambda: any(broken.glob("checkpoint-*/manifest.json")), one, other)
        plug(second, "down")
        kill_all(second)
        lost = time.monotonic()
        had = sorted(path.name for path in broken.glob("checkpoint-*"))
        print(f"{lost - begun:.0f} s: {second} is lost; there are {', '.join(had)}")
        time.sleep(5)
        plug(second, "up")
        other = launch(second, folder, broken, flags)
        until("the end of the disturbed training", lambda: one.poll() is not None and other.poll() is not None)
        print(f"{time.monotonic() - begun:.0f} s: ended with {one.returncode} and {other.returncode}")
        if one.returncode or other.returncode:
            sys.exit(f"error: the disturbed training failed; its logs in {folder} say why")
        compare(whole, broken)
    finally:
        down()


def compare(whole: Path, broken: Path) -> None:
    from safetensors.torch import load_file

    records = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in (whole, broken)]
    states = [load_file(run / "trained_parameters.safetensors") for run in (whole, broken)]
    print("\n".join(f"step {event['step']}: {event['event']}" for event in records[1].get("events", [])))
    difference = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
    print(f"{records[1]['steps']} steps; weights differ from those of the undisturbed training by at most {difference:g}; dev loss "
          f"{records[1]['metrics']['dev_loss']:.6f} and {records[0]['metrics']['dev_loss']:.6f}")
    if difference or not any("resumed" in event["event"] for event in records[1].get("events", [])):
        sys.exit("error: the trainings did not end alike, or nothing was resumed")


if __name__ == "__main__":
    main()
