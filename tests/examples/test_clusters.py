"""The examples for clusters: configurations that Accelerate takes, and a job script that starts the right command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from for_each import for_each

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = {  # what each is for
    "one_gpu": (DistributedType.NO, 1, 1),
    "two_gpus": (DistributedType.MULTI_GPU, 1, 2),
    "two_cpus": (DistributedType.MULTI_GPU, 1, 2),  # as Accelerate calls what torchrun starts
    "eight_gpus": (DistributedType.MULTI_GPU, 1, 8),
    "fsdp2": (DistributedType.FSDP, 1, 8),
    "multi_node": (DistributedType.MULTI_GPU, 2, 16),
}
BINARIES = {  # a machine that is the second of three
    "scontrol": 'echo "[$*]" >&2; for host in first second third; do sleep 0.05; echo $host; done',
    "srun": 'shift; SLURM_NODEID=1 SLURM_GPUS_ON_NODE=4 exec "$@"',
    "accelerate": 'printf "%s\\n" "$@"',
}


def test_every_configuration_is_known():
    assert {path.stem for path in (EXAMPLES / "accelerate_configs").iterdir()} == set(CONFIGS)


@for_each("name", CONFIGS)
def test_accelerate_takes_the_configuration(name):
    config = load_config_from_file(str(EXAMPLES / "accelerate_configs" / f"{name}.yaml"))  # raises for unknown keys
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_machines, config.num_processes) == CONFIGS[name]
    assert config.use_cpu is (name == "two_cpus")
    wanted = "no" if config.use_cpu else "bf16"
    assert config.mixed_precision == wanted, "float32 weights, and corruptions that they do not swallow"
    flags = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= flags, "each key of the plugin is a flag of the launcher"
    assert config.fsdp_config.get("fsdp_version", 2) == 2


def test_the_job_script(tmp_path):
    for name, body in BINARIES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "3",
    }
    done = subprocess.run(
        ["bash", str(script), "train.py", "--output_dir", "a b"],
        cwd=EXAMPLES.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "[show hostnames node[1-3]]\n"
    launcher, *arguments = done.stdout.splitlines()
    assert launcher == "launch"
    assert arguments[-3:] == ["train.py", "--output_dir", "a b"]
    parsed = launch_command_parser().parse_args(arguments)
    assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (3, 12, 1)
    assert (parsed.main_process_ip, parsed.main_process_port) == ("first", 23456)
    assert (EXAMPLES.parent / parsed.config_file).is_file()
    assert parsed.training_script == "train.py"
