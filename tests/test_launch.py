"""What launches several processes: accelerate's files, the Slurm script (with a Slurm that only notes what it is asked), the traps."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT
from torch.distributed import TCPStore

from recipes.common import args, processes
from recipes.common.errors import UserError

FILES = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))


@pytest.fixture
def slurm(tmp_path):
    """slurm(status, state) runs the script on a job of two tasks whose trainings end with `status`; returns (process, notes so far)."""
    notes = tmp_path / "notes"

    def program(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    def start(status, state="RUNNING", seconds=0):
        python = program("python", f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >> {notes}\nsleep {seconds}\n'
                         f'exit {status}')
        program("srun", '[ "$1" = --kill-on-bad-exit=1 ] || exit 9\nshift\nfor i in 0 1; do\n'
                        'SLURM_PROCID=$i SLURM_LOCALID=$((i % 1)) "$@" || status=$?\ndone\nexit ${status:-0}')
        program("scontrol", f'case "$1 $2" in "show hostnames") printf "node7\\nnode8\\n";; "show job") echo "   JobState={state} ";;\n'
                            f'*) echo "scontrol $*" >> {notes};; esac')
        return subprocess.Popen(
            ["bash", str(ROOT / "recipes/slurm/train.sbatch"), "--recipe", "lora", "--output_dir", "runs/a b"], stdout=subprocess.PIPE,
            text=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), "SLURM_JOB_ID": "1234567",
                            "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[7-8]"})

    return start, lambda: notes.read_text().splitlines() if notes.exists() else []


ASKED = "2 node7:24567 scripts/train.py --recipe lora --output_dir runs/a b --resume_from_checkpoint"


@pytest.mark.parametrize(("status", "state", "requeued"), [(0, "RUNNING", False), (1, "RUNNING", False), (75, "RUNNING", True),
                                                           (75, "CANCELLED", False)])
def test_slurm_runs_a_process_a_task_and_queues_anew_what_a_signal_stopped(status, state, requeued, slurm):
    start, notes = slurm
    assert start(status, state).wait(20) == status
    assert notes() == [f"0 0 {ASKED}", f"1 0 {ASKED}"] + ["scontrol requeue 1234567"] * requeued


def test_slurm_waits_for_the_processes_when_it_is_signalled_itself(slurm):
    start, notes = slurm
    job = start(75, seconds=1)
    while not notes():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75 and notes()[-1] == "scontrol requeue 1234567"


def test_slurm_asks_for_a_signal_in_time():
    asked = re.findall(r"^#SBATCH (\S+)", (ROOT / "recipes/slurm/train.sbatch").read_text(), re.M)
    assert "--requeue" in asked and "--signal=TERM@300" in asked


def launched(path, *more):
    """accelerate's own reading of the command line and a file: the arguments that it launches with."""
    options = launch_command_parser().parse_args(["--config_file", str(path), *more, "scripts/train.py", "--recipe", "lora"])
    return _validate_launch_command(options)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_every_file(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    options = launched(path)
    kind = {"one_process": None, "ddp": "multi_gpu", "fsdp": "use_fsdp", "cpu_processes": "use_fsdp", "deepspeed": "use_deepspeed",
            "machines": "multi_gpu"}[path.stem]
    assert [name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(options, name)] == ([kind] if kind else [])
    assert options.training_script_args == ["--recipe", "lora"] and options.training_script == "scripts/train.py"


def test_accelerate_refuses_a_broken_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text((ROOT / "recipes/accelerate/ddp.yaml").read_text() + "no_such_key: 1\n")
    with pytest.raises(ValueError, match="no_such_key"):
        load_config_from_file(str(path))


# The traps: a launcher that starts one process instead of several, or several that don't meet


GROUP = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environ(monkeypatch):
    """environ(name=value, ...) sets these, and nothing else of a launcher."""
    for name in [name for name in os.environ if name in args.MEETING or name.startswith(("SLURM_", "ACCELERATE_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(("values", "said"), [
    ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "started a single one"),
    ({"WORLD_SIZE": "2"}, r"\(WORLD_SIZE=2\), but RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT are not set"),
    ({"RANK": "1"}, "one of several .RANK=1.*WORLD_SIZE and LOCAL_RANK"),
    ({name: value for name, value in GROUP.items() if name != "MASTER_ADDR"}, "but MASTER_ADDR is not set"),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, r"4 processes were launched \(SLURM_NTASKS\) that form no group"),
    ({"SLURM_STEP_NUM_TASKS": "2", "RANK": "0"}, r"2 processes were launched \(SLURM_STEP_NUM_TASKS\)"),
    ({"OMPI_COMM_WORLD_SIZE": "3"}, r"3 processes were launched \(OMPI_COMM_WORLD_SIZE\)"),
    ({"PMI_SIZE": "3"}, r"3 processes were launched \(PMI_SIZE\)"),
    (GROUP | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2, where 2 processes were announced: it counts from 0 to 1"),
    (GROUP | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1, where 1 process was announced"),
    (GROUP | {"RANK": "2"}, "RANK=2, where 2 processes were announced"),
])
def test_processes_that_would_train_alone_are_refused_with_the_right_command(values, said, environ):
    args.check_launch()
    environ(**values)
    with pytest.raises(UserError, match=said) as error:
        args.check_launch()
    assert "accelerate launch --config_file recipes/accelerate/cpu_processes.yaml" in str(error.value)
    assert "torchrun --nproc_per_node 2" in str(error.value) and "recipes/slurm/train.sbatch" in str(error.value)
    assert (ROOT / "recipes/accelerate/cpu_processes.yaml").is_file()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"])
def test_a_number_that_is_none_is_named(name, environ):
    environ(**GROUP | {name: "two"})
    assert processes.rank() in (0, 1) and processes.count() in (1, 2)
    with pytest.raises(UserError, match=f"{name}=two in the environment is not a whole number"):
        args.check_launch()


def test_groups_beside_each_other_are_refused(environ):
    environ(**GROUP, SLURM_STEP_NUM_TASKS="2")
    args.check_launch()  # a task for each process of the group, as recipes/slurm/train.sbatch starts them
    environ(TORCHELASTIC_RUN_ID="none", GROUP_WORLD_SIZE="2")
    args.check_launch()
    environ(GROUP_WORLD_SIZE="1")
    with pytest.raises(UserError, match="2 tasks were started, but this process belongs to a group of 1.*torchrun --nnodes 2"):
        args.check_launch()


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, GROUP, {"SLURM_NTASKS": "1", "PMI_SIZE": "1"},
                                    {"SLURM_NTASKS": "8", **GROUP}, {"MASTER_ADDR": "node7"}])
def test_what_can_be_right_passes(values, environ):
    environ(**values)
    args.check_launch()


def test_a_launch_without_the_group_or_the_gpus_it_asked_for_is_refused(environ):
    environ(WORLD_SIZE="2")
    for device, file in (("cpu", "cpu_processes"), ("cuda", "ddp")):
        with pytest.raises(UserError, match=f"2 processes were launched that form no group.*accelerate/{file}.yaml"):
            args.check_group(1, device, False)
        args.check_group(2, device, False)
    environ(ACCELERATE_MIXED_PRECISION="no")
    with pytest.raises(UserError, match="asked for several GPUs, and there is none here.*cpu_processes.yaml"):
        args.check_group(2, "cpu", False)
    args.check_group(2, "cpu", True)
    args.check_group(2, "cuda", False)
    environ(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")  # cpu_processes.yaml
    args.check_group(2, "cpu", False)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_a_group_that_stays_incomplete_ends_in_time(environ):
    port = free_port()
    environ(**GROUP | {"WORLD_SIZE": "12", "RANK": "0", "MASTER_PORT": str(port)})
    with pytest.raises(UserError, match=f"of 12 processes, RANK 1, 2, .* 7, 8 and 3 more did not come to localhost:{port} within 0"):
        args.meet(0)
    environ(WORLD_SIZE="2", RANK="1")
    with pytest.raises(UserError, match=r"RANK 0 does not answer at localhost:\d+ \(.*; it was waited for 0 s\)"):
        environ(MASTER_PORT=str(free_port()))
        args.meet(0)


def test_two_processes_with_one_number_are_told(environ, monkeypatch):
    port = free_port()
    environ(**GROUP | {"MASTER_PORT": str(port)})
    store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    store.set("here/0", "node7, process 1")
    monkeypatch.setattr(processes, "_kept", [])
    args.meet(5)  # both are there
    store.set("here/1", "node7, process 2")
    with pytest.raises(UserError, match=r"two processes call themselves RANK 1 \(node7, process 2 and .*: number them from 0 to 1"):
        args.meet(5)
    environ(RANK="0")
    with pytest.raises(UserError, match=f"localhost:{port} is taken, by another run or by a second process with RANK 0"):
        args.meet(5)


def test_a_lost_process_is_no_bug(monkeypatch):
    error = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4711")
    assert not processes.lost(error)  # alone, there is none to lose
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.lost(error) and not processes.lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# Two machines


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_two_machines_are_given_the_command_of_the_readme(readme):
    benchmark = runpy.run_path(str(ROOT / "benchmarks/two_machines.py"))
    text = (ROOT / readme).read_text(encoding="utf-8")
    for host, own in ((1, "10.0.0.1"), (0, "10.0.0.2")):
        command = benchmark["COMMAND"].format(first="10.0.0.1", own=own, host=host)
        assert f"\n{command} --output_dir runs/machines\n" in text
    assert all(f" {name}=" in text for name in benchmark["NEEDED"])


def test_two_machines_need_root():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/two_machines.py")], capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 1 and done.stderr.startswith("error: network namespaces need root")
